"""Section 4: training steps of the trainer itself, on one GPU: speed, memory, and the planner's word on both."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from statistics import median

import torch

from agra.batch import Batch
from agra.methods.method import Method
from agra.methods.wam import WAMMethod
from agra.stages import Stage
from agra.training.memory_estimate import fake_batch
from agra.training.parallelize import ParallelConfig, apply
from agra.training.plan import peak_flops
from agra.training.trainer import Trainer
from benchmarks.gpu import plan
from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting
from benchmarks.stock import StockMethod

_STATE_BYTES = 28
"""Bytes of a trained parameter that AdamW reads and writes in a step: weight, gradient and two moments, all float32."""


def run(setting: Setting, section: Section, counting: BaseProcess) -> None:
    """Joint steps in several layouts, the largest batch, the stock way, then the other two stages."""
    joint = Stepper(setting, counting, Stage.JOINT)
    for share, compiles, needs in ((1.0, False, 25), (1.0, True, 60)):
        section.measure(*joint.figure(share, compiles=compiles), needs=needs)
    stock = section.measure(*joint.figure(1.0, stock=True), needs=30)
    others = ((0.0, False, 12), (0.5, False, 15), (0.0, True, 30), (0.5, True, 30))
    for share, compiles, needs in setting.pick(others, ()):
        section.measure(*joint.figure(share, compiles=compiles), needs=needs)
    section.measure("joint, largest batch, checkpointing 1", lambda: joint.largest(1.0), needs=25)
    ours = section.figures.get("joint, compiled, checkpointing 1", {})
    if "samples_per_second" in ours and "samples_per_second" in stock:
        ours["times_stock"] = ours["samples_per_second"] / stock["samples_per_second"]
    del joint
    for stage, share in setting.pick(((Stage.ADAPT, 1.0), (Stage.FINETUNE, 0.0)), ((Stage.FINETUNE, 0.0),)):
        if section.report.left < 40:
            section.skip(stage, f"40 s needed, {section.report.left:.0f} s left")
            continue
        stepper = Stepper(setting, counting, stage)
        section.measure(*stepper.figure(share, compiles=True), needs=40)
        del stepper


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Steps of a trainer at one batch size."""

    samples: int
    seconds: float
    peak: int | None


class Stepper:
    """A method of a stage with random weights, and its steps in one layout after the other."""

    def __init__(self, setting: Setting, counting: BaseProcess, stage: Stage) -> None:
        self.setting, self.counting, self.stage = setting, counting, stage
        self.config = setting.config(stage)
        setting.reset_peak()
        self.method = setting.method(self.config)

    def figure(self, share: float, *, compiles: bool = False, stock: bool = False) -> tuple[str, Callable[[], Figures]]:
        """The name of a layout and the function that measures it."""
        way = "stock" if stock else "compiled" if compiles else "eager"
        parallel = ParallelConfig(activation_checkpointing=share, compile=compiles)
        return f"{self.stage}, {way}, checkpointing {share:g}", lambda: self.measure(parallel, stock=stock)

    def measure(self, parallel: ParallelConfig, *, stock: bool = False) -> Figures:
        """The step with as many samples as the planner says, or with fewer where they do not fit."""
        planned = self._planned(parallel.activation_checkpointing)
        samples = max(1, min(planned.most(self.setting.memory), self.setting.pick(64, 2)))
        with self._trainer(parallel, stock=stock) as trainer:
            timing = None
            while timing is None and samples:
                timing = self._try(trainer, samples)
                samples = samples if timing else int(samples * 0.85)
        if timing is None:
            raise RuntimeError("out of memory with one sample")
        return self._figures(timing, planned)

    def largest(self, share: float) -> Figures:
        """The largest batch that runs, raised by a fifth at a time from the planner's."""
        planned = self._planned(share)
        samples, best = max(1, planned.most(self.setting.memory)), None
        samples = self.setting.pick(samples, 2)
        with self._trainer(ParallelConfig(activation_checkpointing=share, compile=False)) as trainer:
            for _ in range(self.setting.pick(4, 2)):
                timing = self._try(trainer, samples)
                if timing is None:
                    break
                best, samples = timing, max(samples + 1, int(samples * 1.2))
        if best is None:
            raise RuntimeError(f"out of memory with the planner's {samples} samples")
        return self._figures(best, planned)

    def _planned(self, share: float) -> plan.Planned:
        return plan.planned(self.counting, self.setting.scratch, self.stage, share)

    def _trainer(self, parallel: ParallelConfig, *, stock: bool = False) -> "_Layout":
        assert isinstance(self.method, WAMMethod)
        return _Layout(self, StockMethod(self.method) if stock else self.method, parallel)

    def _try(self, trainer: Trainer, samples: int) -> Timing | None:
        """None where the samples do not fit."""
        batch = self._batch(samples)
        trainer.batch = lambda step: batch
        self.setting.reset_peak()
        try:
            seconds = self.setting.seconds(lambda: trainer._train_step(0, []), rounds=3)
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None
            trainer.optimizer.zero_grad(set_to_none=True)
            return None
        return Timing(samples=samples, seconds=median(seconds), peak=self.setting.peak())

    def _batch(self, samples: int) -> Batch:
        torch.manual_seed(0)
        batch = fake_batch(self.config.method, samples)
        return batch.pin_memory() if self.setting.device.type == "cuda" else batch

    def _figures(self, timing: Timing, planned: plan.Planned) -> Figures:
        rate, planned_peak = timing.samples / timing.seconds, planned.peaks[timing.samples - 1]
        figures: Figures = {
            "seconds": timing.seconds,
            "batch": timing.samples,
            "samples_per_second": rate,
            "flops": timing.samples * planned.flops_per_sample,
            "bytes": _STATE_BYTES * planned.trained,
            "peak_bytes": timing.peak,
            "planned_bytes": planned_peak,
        }
        if (peak := peak_flops(self.setting.device)) is not None:
            figures["mfu"] = rate * planned.flops_per_sample / peak
        if timing.peak is not None:
            figures["planned_over_peak"] = planned_peak / timing.peak
        return figures


class _Layout:
    """A trainer of a layout. The blocks are as before afterwards, and the optimiser's state is gone."""

    def __init__(self, stepper: Stepper, method: Method, parallel: ParallelConfig) -> None:
        self.stepper, self.method, self.parallel = stepper, method, parallel

    def __enter__(self) -> Trainer:
        setting, config = self.stepper.setting, self.stepper.config
        apply(self.method, self.parallel, setting.device)
        self.trainer = Trainer(
            replace(config, stage=replace(config.stage, log_every=1_000_000)),
            self.method,
            batch=lambda step: fake_batch(config.method, 1),
            validation=None,
            output=setting.scratch / "step",
            extra_files={},
            parallel=self.parallel,
            context=setting.context(),
        )
        self.trainer.meter.start(0)
        return self.trainer

    def __exit__(self, *_: object) -> None:
        for block in self.method.blocks():
            block.__dict__.pop("forward", None)
        self.trainer.optimizer.zero_grad(set_to_none=True)
        self.trainer.optimizer.state.clear()
        del self.trainer
