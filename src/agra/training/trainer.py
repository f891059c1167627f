"""The training loop.

A step is a pure function of (config, step, weights, optimiser), so a resumed run gives the same bits.
"""

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from agra import files
from agra.batch import Batch
from agra.checkpoints import distributed_checkpoint, write
from agra.checkpoints.folder import ADAPTERS, BEST, OPTIMIZER, best, newest, note_best, verify
from agra.checkpoints.read import load_parts, part_tensors, read_config, read_shards, stored_names
from agra.config import RunConfig, first_difference
from agra.data.sampling.prefetch import on_device
from agra.lora import is_adapter
from agra.methods.method import LossDenominators, Losses, Method
from agra.precision import autocast
from agra.rng import sharded_rng
from agra.training.distributed import DistributedContext, stop_signals
from agra.training.loggers import Log, Pictures, open_loggers
from agra.training.metrics import ThroughputMeter, progress
from agra.training.nan_check import first_module, suspects
from agra.training.optimization import clip_gradients, freeze, parameter_groups, total_norm, trained_names
from agra.training.parallelize import ParallelConfig, gathered
from agra.weights import write_tensors

MicroBatch = tuple[Batch, LossDenominators | None]
"""Samples, and the denominators of their losses where a step has several micro-batches or processes."""
Monitor = Callable[[Method], Mapping[str, float | np.ndarray]]
"""Figures, pictures (H, W, 3) and videos (F, H, W, 3) uint8 of a method at the moment of validation, by name."""
_VALIDATION_STEP = 2**31
"""The step number of validation's random numbers, which are the same at every step."""


class Trainer:
    """Trains one stage of a run: method, optimiser, data and the output folder.

    `batch(step)` returns this process's rows (rank::world_size) of a step's batch, and `sample_names(step)` their names
    for error messages. `validation()` returns this process's rows of the held-out windows, as many as in a batch.
    `extra_files` are written into every checkpoint. `monitors` measure at every validation, and their figures are
    logged under their names. With a mesh in `context` the method must be built for it (`parallelize.build`).
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        *,
        batch: Callable[[int], Batch],
        validation: Callable[[], Batch] | None,
        output: Path,
        extra_files: write.Writers,
        monitors: Mapping[str, Monitor] | None = None,
        sample_names: Callable[[int], Sequence[str]] | None = None,
        context: DistributedContext | None = None,
        parallel: ParallelConfig | None = None,
        meter: ThroughputMeter | None = None,
        loggers: Sequence[str] | None = None,
    ) -> None:
        self.config, self.stage = config, config.stage
        self.context, self.parallel = context or DistributedContext(), parallel or ParallelConfig()
        self.method = method if self.context.mesh is not None else method.to(self.context.device)
        self.batch, self.validation, self.monitors = batch, validation, monitors or {}
        self.sample_names = sample_names or (lambda step: ())
        self.output, self.extra_files = output, extra_files
        self.loggers = loggers
        self.meter = meter or ThroughputMeter(device=self.context.device)
        if self.stage.keep_best and validation is None and not self.monitors:
            raise ValueError(
                f"stage.keep_best: {self.stage.keep_best!r} needs a validation, and there are neither held-out windows "
                "nor monitors; raise data.validation_fraction, turn a monitor on, or leave keep_best empty"
            )
        if self.stage.keep_best.endswith("alignment_cosine_gain"):
            raise ValueError(
                "stage.keep_best: alignment_cosine_gain depends on the number of samples in a micro-batch; choose "
                "min:validation/alignment_loss"
            )
        freeze(self.method, self.stage)
        groups = list(parameter_groups(self.method, self.stage))
        self.optimizer = torch.optim.AdamW(groups, betas=self.stage.betas, fused=True)
        self.names = trained_names(self.method)
        self.step, self.saved = 0, -1
        self._held_out: list[MicroBatch] | None = None
        self._best_is_known = False
        """True once a validation of this process has logged the figure of `keep_best`."""
        self.stopped_by: int | None = None
        """The signal that ended `run` early."""
        self._pending: distributed_checkpoint.PendingSave | None = None
        # Checkpoints are written while training continues, so their messages need a separate group.
        self._saving: Any = None if self.context.mesh is None else dist.new_group(backend="gloo")

    def run(self) -> bool:
        """Train to the end, from the newest checkpoint if there is one. Returns False if SIGTERM stopped it early.

        After SIGTERM or SIGINT to any process, all processes finish the present step and save. SIGINT then raises
        KeyboardInterrupt, and a second SIGINT at once. A loss or gradient that is not finite raises ValueError and
        leaves the last checkpoint as it is.
        """
        self._resume()
        try:
            with (
                stop_signals() as received,
                progress(self.stage.name, self.stage.steps, self.step, shown=self.context.is_main) as advance,
                open_loggers(self.loggers, self.output, self.step, self.config, enabled=self.context.is_main) as log,
            ):
                self.meter.start(self.step)
                while self.step < self.stage.steps and self.stopped_by is None:
                    row = self._train_step(self.step, received)
                    self.step += 1
                    self._log(row, log)
                    if self.step % self.stage.save_every == 0 and self.step < self.stage.steps:
                        self.save()
                    advance(self.step, row["loss"])
                # Before the loggers close, which may fail or hang, and while signals are still collected.
                self.save()
                self._finish_save()
        finally:
            self._finish_save()
        done = self.step >= self.stage.steps
        if self.stopped_by == signal.SIGINT and not done:
            raise KeyboardInterrupt
        return done

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the present step if there is none yet, with a mesh in the background."""
        if self.saved == self.step:
            return
        self._finish_save()
        state = json.dumps({"step": self.step}) + "\n"  # evaluated now, since it may be written later
        writers: dict[str, Callable[[Path], object]] = {
            "config.json": lambda path: files.write_text(path, self.config.to_json()),
            "trainer.json": lambda path: files.write_text(path, state),
            **self.extra_files,
        }
        keep = self.stage.keep_checkpoints
        if self._saving is not None:
            self._pending = distributed_checkpoint.save(
                self.output, self.step, self._tensors(), writers, keep=keep, group=self._saving
            )
        else:
            write.save(self.output, self.step, writers | self._weight_writers(), keep=keep)
        self.saved = self.step

    def _weight_writers(self) -> dict[str, Callable[[Path], object]]:
        """Return the writers of every part's weights, of the adapters, and of the optimiser's state."""
        contents: dict[str, dict[str, Tensor]] = {}
        for name, value in part_tensors(self.method.parts()).items():
            file = ADAPTERS if is_adapter(name) else f"{name.split('.')[0]}.safetensors"
            contents.setdefault(file, {})[name] = value
        contents[OPTIMIZER] = write.optimizer_tensors(self.optimizer, self.names)
        return {
            file: lambda path, tensors=tensors: write_tensors(path, tensors)  # one file in memory at a time
            for file, tensors in contents.items()
        }

    def _finish_save(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint by their names in it."""
        return part_tensors(self.method.parts()) | write.optimizer_tensors(self.optimizer, self.names)

    def _resume(self) -> None:
        folder = newest(self.output)
        if folder is None:
            return
        verify(folder, part=self.context.rank, parts=self.context.world_size)
        saved = read_config(folder)
        if (difference := first_difference(saved, self.config)) is not None:
            raise ValueError(
                f"{folder}: made by another config ({difference}); choose another output folder, or resume with the "
                "same settings"
            )
        if (saved.data.path, saved.data.cache) != (self.config.data.path, self.config.data.cache):
            self._check_moved_data(folder)
        if saved.stage.keep_best != self.stage.keep_best and self.context.is_main:
            (self.output / BEST).unlink(missing_ok=True)  # of another figure
        if self.context.mesh is None and not (folder / "sharded").is_dir():
            load_parts(self.method.parts(), folder)
            write.load_optimizer(self.optimizer, folder / OPTIMIZER, self.names)
        else:
            stored = folder / "sharded" if (folder / "sharded").is_dir() else folder
            write.make_optimizer_state(self.optimizer, stored_names(stored), self.names)
            read_shards(self._tensors(), stored, self._saving)
        self.step = self.saved = json.loads((folder / "trainer.json").read_text())["step"]

    def _check_moved_data(self, folder: Path) -> None:
        """Compare what the data determine in a checkpoint, such as their statistics, with what they determine now.

        Raises ValueError for other data.
        """
        with TemporaryDirectory() as temporary:
            for name, write_file in self.extra_files.items():
                path, stored = Path(temporary) / name, folder / name
                write_file(path)
                if stored.is_file() and files.sha256(path) != files.sha256(stored):
                    raise ValueError(
                        f"{stored}: differs from that of the data in {self.config.data.path} and the cache "
                        f"{self.config.data.cache}; resume with the data and features that the run started with"
                    )

    # --- a step -------------------------------------------------------------------------------------------------------

    def _train_step(self, step: int, received: Sequence[int]) -> dict[str, float]:
        stage = self.stage
        factor = stage.learning_rate_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.method.train()
        with self.meter.waiting():
            micro_batches = self._micro_batches(self.batch(step))
        self.optimizer.zero_grad(set_to_none=True)
        rows = []
        for index, micro_batch in enumerate(self._on_device(micro_batches)):
            self._reduce_gradients(last=index == len(micro_batches) - 1)
            losses = self._losses(micro_batch, step, index)
            (losses.total / len(micro_batches)).backward()
            rows.append(losses.row)
        row = self.context.mean(_mean(rows))
        self.stopped_by = self.context.first_signal(received)
        if not math.isfinite(row["loss"]):
            self._report_not_finite(step, micro_batches, f"the loss is {row['loss']}")
        if (step + 1) % stage.log_every == 0:
            row |= self._gradient_norms()
            row["learning_rate"] = max(group["lr"] for group in self.optimizer.param_groups)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = clip_gradients(trained, stage.clip_norm)
        if not math.isfinite(norm):
            parts = [name.split("/")[1] for name, value in self._gradient_norms().items() if not math.isfinite(value)]
            self._report_not_finite(step, micro_batches, f"the gradient of {', '.join(parts)} is not finite")
        self.optimizer.step()
        self._average(trained, step)
        self.method.update_averages()
        return row

    @torch.no_grad()
    def _average(self, trained: Sequence[Tensor], step: int) -> None:
        """Update the exponential averages in the optimiser's state. A parameter's first gradient starts its average."""
        decay = self.stage.ema_decay_at(step)
        if decay is None:
            return
        for parameter in trained:
            state = self.optimizer.state[parameter]
            if "exp_avg" not in state:
                continue
            if "ema" in state:
                state["ema"].lerp_(parameter.detach(), 1 - decay)
            else:
                state["ema"] = parameter.detach().clone()

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """Divide this process's samples into micro-batches, each with the denominators of its losses."""
        count = self.parallel.gradient_accumulation_steps
        if count == 1 and self.context.world_size == 1:
            return [(batch, None)]
        total = self.context.mean(self.method.counts(batch))
        means = {name: torch.tensor(max(v / count, 1e-9), device=self.context.device) for name, v in total.items()}
        return [(batch.micro_batch(index, count), means) for index in range(count)]

    def _on_device(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Move the micro-batches to this process's device, one at a time."""
        batches = on_device((batch for batch, _ in micro_batches), self.context.device)
        return zip(batches, (denominators for _, denominators in micro_batches), strict=True)

    def _reduce_gradients(self, *, last: bool) -> None:
        """Reduce sharded gradients over processes in a step's last micro-batch alone.

        Before it every process holds whole gradients. `reduce_every_micro_batch` saves that memory.
        """
        if isinstance(self.method, FSDPModule) and not self.parallel.reduce_every_micro_batch:
            self.method.set_requires_gradient_sync(last)

    def _losses(self, micro_batch: MicroBatch, step: int, index: int) -> Losses:
        """Compute a micro-batch's losses, with the random numbers of its samples: every count-th of the step's."""
        size = self.context.world_size
        shard = {
            "index": self.context.rank + size * index,
            "count": size * self.parallel.gradient_accumulation_steps,
        }
        with sharded_rng(self.stage.seed, step, samples=len(micro_batch[0]), **shard), self._autocast():
            return self.method(*micro_batch)

    def _autocast(self) -> AbstractContextManager:
        # No cache with activation checkpointing: bfloat16 copies of the weights would stay through the forward pass.
        return autocast(self.context.device, self.stage.precision, cache=not self.parallel.activation_checkpointing)

    def _gradient_norms(self) -> dict[str, float]:
        norms = {}
        for name, module in self.method.parts().items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                norms[f"gradient_norm/{name}"] = total_norm(gradients)
        return norms

    def _report_not_finite(self, step: int, micro_batches: Sequence[MicroBatch], problem: str) -> NoReturn:
        """Raise ValueError in every process, naming the first module and the samples with values that are not
        finite.
        """
        names, reports = self.sample_names(step), []
        for index, micro_batch in enumerate(self._on_device(micro_batches)):
            module = first_module(self.method, lambda part=micro_batch, index=index: self._losses(part, step, index))
            reports.append((module, suspects(micro_batch[0], names[index :: len(micro_batches)])))
        culprits = [report for report in reports if report[0]] or reports
        text = "; ".join(f"first in {module}, {samples}" if module else samples for module, samples in culprits)
        texts = self.context.gather(text)
        located = [text for text in texts if text.startswith("first in")] or texts
        raise ValueError(
            f"step {step}: {problem} ({'; '.join(located)}); the last checkpoint in {self.output} is intact. Lower the "
            "learning rate, or check these samples"
        )

    # --- validation and logs ------------------------------------------------------------------------------------------

    def _log(self, row: dict[str, float], log: Log) -> None:
        """Log a step's figures every `log_every` steps, and those of validation every `validate_every` steps."""
        stage = self.stage
        if self.step % stage.log_every == 0 or self.step == stage.steps:
            speed = self.meter.read(self.step, stage.batch_size, self.context.world_size)
            log({"step": self.step, **row, **self.context.mean(speed)})
        if self.step % stage.validate_every == 0 or self.step == stage.steps:
            figures, pictures = self._validate()
            if figures or pictures:
                log({"step": self.step, **figures}, pictures)
            self._keep_best(figures)

    def _keep_best(self, figures: Mapping[str, float]) -> None:
        """Save a checkpoint where the figure of `keep_best` is the best so far.

        A validation may leave the figure out where an earlier one had it, as monitors do with a ratio that is not
        finite. Otherwise its absence saves a checkpoint and raises ValueError.
        """
        if not self.stage.keep_best:
            return
        # The main process decides for all, since monitors' figures may differ in rounding.
        verdict = self.context.gather(self._verdict(figures))[0]
        if verdict == "worse":
            return
        self.save()
        self._finish_save()
        name = self.stage.keep_best.split(":", 1)[1]
        if verdict == "unknown":
            raise ValueError(
                f"stage.keep_best: no figure is logged as {name!r}; choose one of {', '.join(sorted(figures))}"
            )
        if self.context.is_main:
            note_best(self.output, self.step, figures[name])

    def _verdict(self, figures: Mapping[str, float]) -> Literal["best", "worse", "unknown"]:
        """Compare the figure of `keep_best` with the best so far. It is unknown where no validation has had it."""
        direction, name = cast(str, self.stage.keep_best).split(":", 1)
        earlier = best(self.output)
        if name not in figures:
            return "worse" if self._best_is_known or earlier is not None else "unknown"
        self._best_is_known = True
        value = figures[name]
        if not math.isfinite(value):
            return "worse"
        if earlier is None or (value < earlier[1] if direction == "min" else value > earlier[1]):
            return "best"
        return "worse"

    @torch.no_grad()
    def _validate(self) -> tuple[dict[str, float], Pictures]:
        """Compute the losses of held-out windows, always with the same noise, and the monitors' figures and pictures.

        The windows are spread over processes and micro-batches as a step's are. The losses are therefore the same for
        any spread, and the memory is that of a micro-batch without gradients. `alignment_cosine_gain` compares with the
        mean of a micro-batch, so it depends on the spread. FLARE's `target_variance` agrees in expectation.
        """
        figures: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        self.method.eval()
        if self.validation is not None:
            if self._held_out is None:
                self._held_out = self._micro_batches(self.validation())  # once, since encoding is costly
            rows = [
                self._losses(micro_batch, _VALIDATION_STEP, index).row
                for index, micro_batch in enumerate(self._on_device(self._held_out))
            ]
            figures = {f"validation/{name}": value for name, value in self.context.mean(_mean(rows)).items()}
        with gathered(self.method), self._autocast():
            for name, monitor in self.monitors.items():
                for key, value in monitor(self.method).items():
                    if isinstance(value, np.ndarray):
                        pictures[f"{name}/{key}"] = value
                    else:
                        figures[f"{name}/{key}"] = value
        return figures, pictures


def _mean(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Average every value over micro-batches. All values are copied to the CPU together."""
    stacked = torch.stack([torch.stack([row[name].detach().float() for name in rows[0]]) for row in rows])
    return dict(zip(rows[0], stacked.double().mean(dim=0).tolist(), strict=True))
