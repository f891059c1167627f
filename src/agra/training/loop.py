"""The training loop: a step is a pure function of (config, step, weights, optimiser), so a resumed run is the same run."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from agra.batch import Batch
from agra.config import RunConfig
from agra.precision import autocast
from agra.training import checkpoint
from agra.training.objective import Losses, Objective
from agra.training.stages import Stage, freeze, modules, parameter_groups
from agra.wam.model import WAM

_COLUMNS = {
    "total": "loss",
    "video": "video_loss",
    "action": "action_loss",
    "alignment": "alignment_loss",
    "alignment_cosine_gain": "alignment_cosine_gain",
}


class Trainer:
    """One stage of one run: objective, optimiser, data and the folder that they are saved in.

    `batch(step)` and `validation()` give the data; `extra_files` are written into every checkpoint beside ours. Each of
    `monitors` is asked for figures wherever there is validation; they are logged under its name.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        *,
        batch: Callable[[int], Batch],
        validation: Callable[[], Batch] | None,
        output: Path,
        extra_files: Mapping[str, Callable[[Path], None]],
        monitors: Mapping[str, Callable[[WAM], Mapping[str, float]]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.stage = config, config.stage
        self.objective = objective.to(device)
        self.batch, self.validation, self.monitors = batch, validation, monitors or {}
        self.output, self.extra_files, self.device = output, extra_files, torch.device(device)
        freeze(self.objective, self.stage)
        self.optimizer = torch.optim.AdamW(list(parameter_groups(self.objective, self.stage)), betas=self.stage.betas)
        self.names: dict[Tensor, str] = {p: n for n, p in self.objective.named_parameters() if p.requires_grad}
        self.step = 0

    def run(self) -> bool:
        """Train to the end, from the newest checkpoint if there is one. False if a signal stopped it early.

        SIGINT and SIGTERM end the present step, save, and return. A loss that is not finite raises ValueError and
        leaves the last checkpoint as it is.
        """
        self._resume()
        stage = self.stage
        with (
            _stop_signals() as stopped,
            _progress(stage.name, stage.steps, self.step) as advance,
            self._writer() as log,
        ):
            clock, since = time.monotonic(), self.step
            while self.step < stage.steps and not stopped():
                row = self._train_step(self.step)
                self.step += 1
                if self.step % stage.log_every == 0 or self.step == stage.steps:
                    now = time.monotonic()
                    row["samples_per_second"] = (self.step - since) * stage.batch_size / (now - clock)
                    clock, since = now, self.step
                    log({"step": self.step, **row})
                due = self.step % stage.validate_every == 0 or self.step == stage.steps
                if due and (found := self._validate()):
                    log({"step": self.step, **found})
                if self.step % stage.save_every == 0 and self.step < stage.steps:
                    self.save()
                advance(self.step, row["loss"])
        if checkpoint.newest(self.output) != self.output / f"step_{self.step:06d}":
            self.save()
        return self.step >= stage.steps

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        files: dict[str, Callable[[Path], None]] = {
            "config.json": lambda path: checkpoint.write_text(path, self.config.to_json()),
            "model.safetensors": lambda path: checkpoint.write_tensors(path, self.objective.wam.state_dict()),
            "optimizer.safetensors": lambda path: checkpoint.write_tensors(
                path, checkpoint.optimizer_tensors(self.optimizer, self.names)
            ),
            "trainer.json": lambda path: checkpoint.write_text(path, json.dumps({"step": self.step}) + "\n"),
            **self.extra_files,
        }
        if (projectors := self.objective.projectors) is not None:
            files["projectors.safetensors"] = lambda path: checkpoint.write_tensors(path, projectors.state_dict())
        return checkpoint.save(self.output, self.step, files, keep=self.stage.keep_checkpoints)

    def _resume(self) -> None:
        found = checkpoint.newest(self.output)
        if found is None:
            return
        checkpoint.verify(found)
        saved = checkpoint.read_config(found)
        if saved != self.config:
            raise ValueError(
                f"{found}: made by another config ({_first_difference(saved, self.config)}); choose another "
                "output folder, or the same settings to resume"
            )
        checkpoint.load_weights(self.objective.wam, found / "model.safetensors")
        if self.objective.projectors is not None:
            checkpoint.load_weights(self.objective.projectors, found / "projectors.safetensors")
        checkpoint.load_optimizer(self.optimizer, found / "optimizer.safetensors", self.names)
        self.step = json.loads((found / "trainer.json").read_text())["step"]

    def _train_step(self, step: int) -> dict[str, float]:
        stage = self.stage
        factor = stage.learning_rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.objective.train()
        seed_everything(stage.seed, step)
        losses = self._losses(self.batch(step))
        if not math.isfinite(losses.total.item()):
            raise ValueError(
                f"step {step}: the loss is {losses.total.item()}; the last checkpoint in {self.output} is "
                "intact. Lower the learning rate, or look at the batch of this step"
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        row = _row(losses)
        if (step + 1) % stage.log_every == 0:
            for name, module in modules(self.objective).items():
                gradients = [p.grad for p in module.parameters() if p.grad is not None]
                if gradients:
                    row[f"gradient_norm/{name}"] = torch.nn.utils.get_total_norm(gradients).item()
            row["learning_rate"] = max(group["lr"] for group in self.optimizer.param_groups)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, stage.clip_norm)
        self.optimizer.step()
        return row

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """The same losses on held-out windows, always with the same noise, and the monitors' figures."""
        found = {}
        self.objective.eval()
        if self.validation is not None:
            seed_everything(self.stage.seed, 2**31)
            row = _row(self._losses(self.validation()))
            found = {f"validation/{name}": value for name, value in row.items()}
        for name, monitor in self.monitors.items():
            figures = monitor(self.objective.wam)
            found |= {f"{name}/{key}": value for key, value in figures.items()}
        return found

    def _losses(self, batch: Batch) -> Losses:
        with autocast(self.device, self.stage.precision):
            return self.objective(batch.to(self.device))

    @contextmanager
    def _writer(self) -> Iterator[Callable[[dict[str, float]], None]]:
        """metrics.jsonl and TensorBoard, both cut back to the step that the run resumes from."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "metrics.jsonl"
        kept = []
        if path.exists():
            rows = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [row for row in rows if row["step"] <= self.step]
        checkpoint.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        board = SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step)

        def log(row: dict[str, float]) -> None:
            with path.open("a") as handle:
                handle.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step":
                    board.add_scalar(name, value, int(row["step"]))

        try:
            yield log
        finally:
            board.close()


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generator with a hash of (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def initialize(objective: Objective, source: str | Path, stage: Stage) -> None:
    """Start a stage from a checkpoint of an earlier one, or from a pretrained video DiT.                            C.3

    From `adapt` the video DiT is taken and the rest stays fresh; from `joint` everything is. A `source` that is not a
    checkpoint of ours is a diffusers model: a folder or hub id whose `transformer` is the video DiT.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "transformer").is_dir():
        objective.wam.video_dit.load_pretrained(str(source))
        return
    found = checkpoint.resolve(folder)
    checkpoint.verify(found)
    earlier = checkpoint.read_config(found).stage.name
    weights = found / "model.safetensors"
    if earlier is Stage.ADAPT:
        checkpoint.load_weights(objective.wam.video_dit, weights, prefix="video_dit.")
        return
    if stage is Stage.ADAPT:
        raise ValueError(f"{found}: a {earlier} checkpoint does not start an adapt stage")
    checkpoint.load_weights(objective.wam, weights)
    if objective.projectors is not None and (found / "projectors.safetensors").is_file():
        checkpoint.load_weights(objective.projectors, found / "projectors.safetensors")


def _row(losses: Losses) -> dict[str, float]:
    return {_COLUMNS[f.name]: value.item() for f in fields(losses) if (value := getattr(losses, f.name)) is not None}


def _first_difference(saved: RunConfig, ours: RunConfig) -> str:
    ours_flat, saved_flat = _flat(json.loads(ours.to_json())), _flat(json.loads(saved.to_json()))
    key = next(k for k in sorted({*ours_flat, *saved_flat}) if ours_flat.get(k) != saved_flat.get(k))
    return f"{key} is {saved_flat.get(key)!r} there and {ours_flat.get(key)!r} here"


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name, child in tree.items() for k, v in _flat(child, f"{prefix}.{name}" if prefix else name).items()
    }


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM set a flag instead of raising; a second one acts as usual."""
    received: list[int] = []
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress(name: str, total: int, start: int) -> Iterator[Callable[[int, float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total, completed=start, loss=float("nan"))
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)
