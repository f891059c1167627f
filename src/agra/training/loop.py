"""The training loop: a step is a pure function of (config, step, weights, optimiser), so a resumed run is the same run."""

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from agra.batch import Batch
from agra.config import RunConfig
from agra.data.prefetch import on_device
from agra.draws import shared_draws
from agra.precision import autocast
from agra.training import checkpoint, sharded
from agra.training.logbook import Meter, logbook, progress
from agra.training.lora import is_adapter
from agra.training.nonfinite import first_module, suspects
from agra.training.objective import Kept, Losses, Objective
from agra.training.sharding import ParallelConfig, World, gathered
from agra.training.stages import freeze, modules, parameter_groups
from agra.wam.model import WAM

_COLUMNS = {
    "total": "loss",
    "video": "video_loss",
    "action": "action_loss",
    "alignment": "alignment_loss",
    "alignment_cosine_gain": "alignment_cosine_gain",
}


MicroBatch = tuple[Batch, Kept | None]
"""Samples, and the denominators of their losses where the step is spread over several micro-batches or processes."""
_VALIDATION_STEP = 2**31
"""Stands for the step in the random numbers of validation, which are the same at every step."""


class Trainer:
    """One stage of one run: objective, optimiser, data and the folder that they are saved in.

    `batch(step)` gives this process's rows of a step's batch (rank::size), `samples(step)` their names for error messages,
    `validation()` this process's rows of the held-out windows, of which there are as many as in a batch. `extra_files` are
    written into every checkpoint beside ours. Each of `monitors` measures whenever the trainer validates; its figures are
    logged under its name. With a mesh in `world` the objective must have been built for it (`sharding.build`).
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        *,
        batch: Callable[[int], Batch],
        validation: Callable[[], Batch] | None,
        output: Path,
        extra_files: Mapping[str, Callable[[Path], object]],
        monitors: Mapping[str, Callable[[WAM], Mapping[str, float]]] | None = None,
        samples: Callable[[int], Sequence[str]] | None = None,
        world: World | None = None,
        parallel: ParallelConfig | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.config, self.stage = config, config.stage
        self.world, self.parallel = world or World(), parallel or ParallelConfig()
        self.objective = objective if self.world.mesh is not None else objective.to(self.world.device)
        self.batch, self.validation, self.monitors = batch, validation, monitors or {}
        self.samples = samples or (lambda step: ())
        self.output, self.extra_files = output, extra_files
        self.meter = meter or Meter(device=self.world.device)
        freeze(self.objective, self.stage)
        groups = list(parameter_groups(self.objective, self.stage))
        self.optimizer = torch.optim.AdamW(groups, betas=self.stage.betas, fused=True)
        self.names: dict[Tensor, str] = {p: n for n, p in self.objective.named_parameters() if p.requires_grad}
        self.step, self.saved = 0, -1
        self._held_out: list[MicroBatch] | None = None
        self.stopped_by: int | None = None
        """The signal that ended `run` early."""
        self._pending: sharded.PendingSave | None = None
        # Saving happens beside training: its messages need a group of their own.
        self._saving: Any = None if self.world.mesh is None else dist.new_group(backend="gloo")

    def run(self) -> bool:
        """Train to the end, from the newest checkpoint if there is one. False if SIGTERM stopped it early.

        SIGTERM or SIGINT to any process ends the present step and saves; SIGINT then raises KeyboardInterrupt. A loss or
        gradient that is not finite raises ValueError and leaves the last checkpoint as it is.
        """
        self._resume()
        try:
            with (
                _stop_signals() as received,
                progress(self.stage.name, self.stage.steps, self.step, shown=self.world.leads) as advance,
                logbook(self.output, self.step, written=self.world.leads) as log,
            ):
                self.meter.start(self.step)
                while self.step < self.stage.steps and self.stopped_by is None:
                    row = self._train_step(self.step, received)
                    self.step += 1
                    self._log(row, log)
                    if self.step % self.stage.save_every == 0 and self.step < self.stage.steps:
                        self.save()
                    advance(self.step, row["loss"])
            if self.saved != self.step:
                self.save()
        finally:
            self._finish_save()
        done = self.step >= self.stage.steps
        if self.stopped_by == signal.SIGINT and not done:
            raise KeyboardInterrupt
        return done

    def save(self) -> None:
        """Write a checkpoint of the present step; with a mesh, in the background."""
        self._finish_save()
        state = json.dumps({"step": self.step}) + "\n"  # now: what is written in the background is written later
        files: dict[str, Callable[[Path], object]] = {
            "config.json": lambda path: checkpoint.write_text(path, self.config.to_json()),
            "trainer.json": lambda path: checkpoint.write_text(path, state),
            **self.extra_files,
        }
        keep = self.stage.keep_checkpoints
        if self._saving is not None:
            self._pending = sharded.save(self.output, self.step, self._tensors(), files, keep=keep, group=self._saving)
        else:
            weights = self.objective.wam.state_dict()
            adapters = {name: weights.pop(name) for name in [*weights] if is_adapter(name)}
            files[checkpoint.MODEL] = lambda path: checkpoint.write_tensors(path, weights)
            if adapters:
                files[checkpoint.ADAPTERS] = lambda path: checkpoint.write_tensors(path, adapters)
            files[checkpoint.OPTIMIZER] = lambda path: checkpoint.write_tensors(
                path, checkpoint.optimizer_tensors(self.optimizer, self.names)
            )
            if (projectors := self.objective.projectors) is not None:
                files["projectors.safetensors"] = lambda path: checkpoint.write_tensors(path, projectors.state_dict())
            checkpoint.save(self.output, self.step, files, keep=keep)
        self.saved = self.step

    def _finish_save(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint keeps, under the names that the files of one process have together."""
        projectors = self.objective.projectors
        return {
            **self.objective.wam.state_dict(),
            **({} if projectors is None else projectors.state_dict()),
            **checkpoint.optimizer_tensors(self.optimizer, self.names),
        }

    def _resume(self) -> None:
        found = checkpoint.newest(self.output)
        if found is None:
            return
        checkpoint.verify(found, part=self.world.rank, parts=self.world.size)
        saved = checkpoint.read_config(found)
        if saved != self.config:
            raise ValueError(
                f"{found}: made by another config ({_first_difference(saved, self.config)}); choose another "
                "output folder, or the same settings to resume"
            )
        if self.world.mesh is None and not (found / "sharded").is_dir():
            checkpoint.load_weights(self.objective.wam, found)
            if self.objective.projectors is not None:
                checkpoint.load_weights(self.objective.projectors, found, "projectors.safetensors")
            checkpoint.load_optimizer(self.optimizer, found / checkpoint.OPTIMIZER, self.names)
        else:
            for parameter in self.names:
                moments = (
                    ("exp_avg", "exp_avg_sq") if self.stage.ema_decay is None else ("exp_avg", "exp_avg_sq", "ema")
                )
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),  # fused AdamW reads it on the device
                    **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in moments},
                }
            folder = found / "sharded" if (found / "sharded").is_dir() else found
            checkpoint.read_shards(self._tensors(), folder, self._saving)
        self.step = self.saved = json.loads((found / "trainer.json").read_text())["step"]

    def _train_step(self, step: int, received: Sequence[int]) -> dict[str, float]:
        stage = self.stage
        factor = stage.learning_rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.objective.train()
        with self.meter.waiting():
            micro_batches = self._micro_batches(self.batch(step))
        self.optimizer.zero_grad(set_to_none=True)
        rows = []
        for index, micro_batch in enumerate(self._on_device(micro_batches)):
            self._reduce_gradients(last=index == len(micro_batches) - 1)
            losses = self._losses(micro_batch, step, index)
            (losses.total / len(micro_batches)).backward()
            rows.append(_row(losses))
        agreed = self.world.mean(_mean(rows))
        self.stopped_by = self.world.first_signal(received)
        if not math.isfinite(agreed["loss"]):
            self._complain(step, micro_batches, f"the loss is {agreed['loss']}")
        if (step + 1) % stage.log_every == 0:
            agreed |= self._gradient_norms()
            agreed["learning_rate"] = max(group["lr"] for group in self.optimizer.param_groups)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = _whole(torch.nn.utils.clip_grad_norm_(trained, stage.clip_norm)).item()
        if not math.isfinite(norm):
            odd = [name.split("/")[1] for name, value in self._gradient_norms().items() if not math.isfinite(value)]
            self._complain(step, micro_batches, f"the gradient of {', '.join(odd)} is not finite")
        self.optimizer.step()
        self._average(trained)
        return agreed

    @torch.no_grad()
    def _average(self, trained: Sequence[Tensor]) -> None:
        """Move the averages, which live with the optimiser's state; the first step begins them."""
        decay = self.stage.ema_decay
        if decay is None:
            return
        for parameter in trained:
            state = self.optimizer.state[parameter]
            if "ema" in state:
                state["ema"].lerp_(parameter.detach(), 1 - decay)
            else:
                state["ema"] = parameter.detach().clone()

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """This process's samples in `accumulate` micro-batches, each with the denominators of its losses."""
        count = self.parallel.accumulate
        if count == 1 and self.world.size == 1:
            return [(batch, None)]
        targets = len(batch) if batch.has_targets is None else batch.has_targets.sum().item()
        total = self.world.mean({"actions": batch.action_mask.sum().item(), "targets": targets})
        means = {k: torch.tensor(max(v / count, 1e-9), device=self.world.device) for k, v in total.items()}
        return [(batch.micro_batch(index, count), Kept(**means)) for index in range(count)]

    def _on_device(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on this process's device, one at a time."""
        batches = on_device((batch for batch, _ in micro_batches), self.world.device)
        return zip(batches, (denominators for _, denominators in micro_batches), strict=True)

    def _reduce_gradients(self, *, last: bool) -> None:
        """Leave the reduction of sharded gradients over processes to a step's last micro-batch.

        Until then a process holds its gradients whole; `reduce_every_micro_batch` saves that memory.
        """
        if isinstance(self.objective, FSDPModule) and not self.parallel.reduce_every_micro_batch:
            self.objective.set_requires_gradient_sync(last)

    def _losses(self, micro_batch: MicroBatch, step: int, index: int) -> Losses:
        """A micro-batch's losses; its samples are every count-th of the step's, and so are their random numbers."""
        size = self.world.size
        share = {"index": self.world.rank + size * index, "count": size * self.parallel.accumulate}
        with shared_draws(self.stage.seed, step, samples=len(micro_batch[0]), **share), self._autocast():
            return self.objective(*micro_batch)

    def _autocast(self) -> AbstractContextManager:
        # The copy would last through the forward pass, which checkpointing keeps small.
        return autocast(self.world.device, self.stage.precision, cache=not self.parallel.checkpoint_activations)

    def _gradient_norms(self) -> dict[str, float]:
        found = {}
        for name, module in modules(self.objective).items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                found[f"gradient_norm/{name}"] = _whole(torch.nn.utils.get_total_norm(gradients)).item()
        return found

    def _complain(self, step: int, micro_batches: Sequence[MicroBatch], problem: str) -> NoReturn:
        """Raise ValueError with the module and the samples that the trouble came from, the same in every process."""
        names, found = self.samples(step), []
        for index, part in enumerate(self._on_device(micro_batches)):
            module = first_module(self.objective, lambda part=part, index=index: self._losses(part, step, index))
            found.append((module, suspects(part[0], names[index :: len(micro_batches)])))
        bad = [pair for pair in found if pair[0]] or found
        reports = self.world.gather(
            "; ".join(f"first in {module}, {which}" if module else which for module, which in bad)
        )
        telling = [report for report in reports if report.startswith("first in")] or reports
        raise ValueError(
            f"step {step}: {problem} ({'; '.join(telling)}); the last checkpoint in {self.output} is intact. Lower the "
            "learning rate, or look at these samples"
        )

    def _log(self, row: dict[str, float], log: Callable[[dict[str, float]], None]) -> None:
        """Write what is due after a step: its figures, and those of held-out windows."""
        stage = self.stage
        if self.step % stage.log_every == 0 or self.step == stage.steps:
            log(
                {
                    "step": self.step,
                    **row,
                    **self.world.mean(self.meter.read(self.step, stage.batch_size, self.world.size)),
                }
            )
        if (self.step % stage.validate_every == 0 or self.step == stage.steps) and (found := self._validate()):
            log({"step": self.step, **found})
            self._keep_best(found)

    def _keep_best(self, found: Mapping[str, float]) -> None:
        """Save where the chosen figure is better than ever before. Raises ValueError where nobody measures it."""
        if not self.stage.keep_best:
            return
        way, name = self.stage.keep_best.split(":", 1)
        if name not in found:
            raise ValueError(f"stage.keep_best: nothing is logged as {name!r}; there are {', '.join(sorted(found))}")
        value, before = found[name], checkpoint.best(self.output)
        if not math.isfinite(value) or (before and (value >= before[1] if way == "min" else value <= before[1])):
            return
        if self.saved != self.step:
            self.save()
        self._finish_save()
        if self.world.leads:
            checkpoint.note_best(self.output, self.step, value)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """The same losses on held-out windows, always under the same noise, and the monitors' figures.

        The windows are spread over processes and micro-batches as a step's are, so the value is the same for any spread and
        the memory that of a micro-batch without gradients.
        """
        measured: dict[str, float] = {}
        self.objective.eval()
        if self.validation is not None:
            if self._held_out is None:
                self._held_out = self._micro_batches(self.validation())  # kept on the CPU: encoding it again is costly
            rows = [
                _row(self._losses(micro_batch, _VALIDATION_STEP, index))
                for index, micro_batch in enumerate(self._on_device(self._held_out))
            ]
            measured = {f"validation/{name}": value for name, value in self.world.mean(_mean(rows)).items()}
        with gathered(self.objective), self._autocast():
            for name, monitor in self.monitors.items():
                figures = monitor(self.objective.wam)
                measured |= {f"{name}/{key}": value for key, value in figures.items()}
        return measured


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _row(losses: Losses) -> dict[str, Tensor]:
    """The losses by their names in the log, still on the device."""
    return {_COLUMNS[f.name]: value.detach() for f in fields(losses) if (value := getattr(losses, f.name)) is not None}


def _mean(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of every name over micro-batches, brought to the CPU in one copy."""
    stacked = torch.stack([torch.stack([row[name].float() for name in rows[0]]) for row in rows])
    return dict(zip(rows[0], stacked.double().mean(dim=0).tolist(), strict=True))


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
def _stop_signals() -> Iterator[Sequence[int]]:
    """SIGINT and SIGTERM are noted in the list instead of raising; a second one acts as usual."""
    received: list[int] = []
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
