"""Memory, FLOPs, time and cost of a run before its launch.

A step and a validation are counted on fake tensors (`agra.training.memory_estimate`) and laid out on the machines. Two
numbers are assumptions: a step's fraction of a GPU's peak, and the rate of communication. Encoders' memory is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from agra.config import RunConfig
from agra.training.memory_estimate import StepCost, cached_name, encoding_flops_per_sample, measure
from agra.training.parallelize import check_batch_size

PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bfloat16 FLOPs per second, from the makers' data sheets."""
CHECKPOINTED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Fractions of activation checkpointing that a plan compares."""
_PLANNED = 0.92
"""Fraction of a GPU's memory that a plan uses. The rest is left to the allocator, the libraries and NCCL."""
UTILISATIONS = (0.2, 0.35, 0.5)
"""Fractions of a GPU's peak for which a plan gives the time."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines that a run is planned for."""

    gpus: int  # number of GPUs
    gpu_memory: float = 80.0
    """GB of each GPU."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"  # kind of GPU, whose bfloat16 peak is assumed
    shard_degree: int | None = None
    """GPUs that hold one copy of the model together. By default all of them."""
    utilisation: float = 0.35
    """Assumed fraction of the GPU's peak that a step reaches. Public runs of video DiTs of this size show up to 0.18.
    The plan prints the time for 0.2, 0.35 and 0.5 as well."""
    gather_bfloat16: bool = False
    """Gather parameters in bfloat16 (`--parallel.gather-bfloat16`)."""
    bandwidth: float | None = None
    """Assumed rate at which a GPU receives from the others, GB/s. By default 450 for up to 8 GPUs (the NVLink of an
    H100 node), and 50 for more (a 400 Gb/s port for each GPU)."""
    price: float = 0.0
    """Price of a GPU per hour."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "utilisation", "rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"plan: {name}: expected more than 0, got {getattr(self, name)}")
        if self.shard_degree is not None and (self.shard_degree < 1 or self.gpus % self.shard_degree):
            raise ValueError(
                f"plan: shard_degree: {self.gpus} GPUs do not divide into copies of {self.shard_degree}; choose a divisor"
            )

    @property
    def rate(self) -> float:
        """`bandwidth` or its default."""
        if self.bandwidth is not None:
            return self.bandwidth
        return 450.0 if self.gpus <= 8 else 50.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A step laid out on the GPUs."""

    activation_checkpointing: float
    """Fraction of the blocks that run again in the backward pass."""
    reduce_every_micro_batch: bool
    """True where gradients are reduced after every micro-batch, so that no GPU holds them whole."""
    states: int
    """Bytes on a GPU, at the fullest moment, that do not depend on the number of samples."""
    per_sample: int
    """Bytes on a GPU for each sample in flight, at that moment."""
    samples: int
    """Samples in flight that fit, 0 where none does."""
    gradient_accumulation_steps: int
    """Micro-batches into which a GPU's samples are divided, so that they fit. 0 where they never fit."""
    compute_seconds: float
    """Time of a step's products, infinite where it does not fit."""
    traffic: float
    """Bytes that a GPU receives from the others in a step."""
    seconds: float
    """Time of a step where all traffic overlaps with products: the longer of the two."""
    validation_seconds: float
    """Time of a validation, which reads as many windows as a step."""

    @property
    def flags(self) -> list[str]:
        """Flags of `agra train` for this layout."""
        fraction, count = self.activation_checkpointing, self.gradient_accumulation_steps
        flags = [f"--parallel.activation-checkpointing {fraction:g}"] if fraction else []
        flags += [f"--parallel.gradient-accumulation-steps {count}"] if count > 1 else []
        return flags + (["--parallel.reduce-every-micro-batch True"] if self.reduce_every_micro_batch else [])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Result of `plan`."""

    step_cost: StepCost
    layouts: tuple[Layout, ...]
    """Layouts from no activation checkpointing to that of all blocks."""
    encoding: dict[str, float]
    """FLOPs of encoding a sample while training, by feature. Empty where everything is cached."""
    hours: float
    """Time of all steps and validations."""
    cost: float

    @property
    def best(self) -> Layout:
        """The quickest layout, or the first where none fits."""
        return min(self.layouts, key=lambda layout: layout.seconds)


def peak_flops(device: torch.device) -> float | None:
    """Look up a GPU's peak by its name. Returns None for an unlisted GPU and for a CPU."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)


def plan(config: RunConfig, machines: Machines) -> Plan:
    """Lay out a config's stage on machines. Raises ValueError, before counting, where the batch does not divide over them."""
    _check_gpus(config, machines)
    fractions = track(CHECKPOINTED, "counting a step", console=Console(stderr=True), transient=True)
    counted = [
        measure(config, activation_checkpointing=fraction, gather_bfloat16=machines.gather_bfloat16)
        for fraction in fractions
    ]
    return lay_out(config, machines, counted)


def lay_out(config: RunConfig, machines: Machines, counted: Sequence[StepCost]) -> Plan:
    """Plan with steps that are already counted, one for each fraction of activation checkpointing, in increasing
    order."""
    _check_gpus(config, machines)
    local, counts = config.stage.batch_size // machines.gpus, _accumulation_steps(config, machines)
    all_flops = encoding_flops_per_sample(config.method)
    encoding = {name: flops for name, flops in all_flops.items() if cached_name(name) not in config.data.cached}
    total = sum(encoding.values())
    layouts = tuple(_layout(step_cost, local, counts, machines, encoding=total) for step_cost in counted)
    best = min(layouts, key=lambda layout: layout.seconds)
    validations = 1 + config.stage.steps // config.stage.validate_every
    hours = (best.seconds * config.stage.steps + best.validation_seconds * validations) / 3600
    return Plan(
        step_cost=counted[0],
        layouts=layouts,
        encoding=encoding,
        hours=hours,
        cost=hours * machines.gpus * machines.price,
    )


def _check_gpus(config: RunConfig, machines: Machines) -> None:
    check_batch_size(config.stage.batch_size, config.method.batch_multiple, 1, machines.gpus)


def _accumulation_steps(config: RunConfig, machines: Machines) -> list[int]:
    """List the numbers of micro-batches of a GPU that `agra train` accepts."""
    local, multiple = config.stage.batch_size // machines.gpus, config.method.batch_multiple
    counts = [count for count in range(1, local + 1) if local % count == 0]
    return [count for count in counts if count * machines.gpus == 1 or local // count % multiple == 0]


def _layout(step_cost: StepCost, local: int, counts: Sequence[int], machines: Machines, *, encoding: float) -> Layout:
    """Choose the quicker of two layouts: gradients reduced once a step, or after every micro-batch to save memory."""
    once, repeatedly = (
        _reduced(step_cost, local, counts, machines, encoding=encoding, every=every) for every in (False, True)
    )
    return repeatedly if repeatedly.gradient_accumulation_steps and repeatedly.seconds < once.seconds else once


def _reduced(
    step_cost: StepCost, local: int, counts: Sequence[int], machines: Machines, *, encoding: float, every: bool
) -> Layout:
    shards = machines.shard_degree or machines.gpus
    samples, accumulate, constant = _fit(step_cost, local, counts, machines, every=every)
    fullest = int(np.argmax(constant + max(samples, 1) * step_cost.per_sample))
    rate = PEAK_FLOPS[machines.gpu] * machines.utilisation
    compute = local * (step_cost.flops_per_sample + encoding) / rate
    traffic = _traffic(step_cost, shards, machines.gpus // shards, micro_batches=accumulate, every=every)
    return Layout(
        activation_checkpointing=step_cost.checkpointed,
        reduce_every_micro_batch=every and accumulate > 1,
        states=int(constant[fullest]),
        per_sample=int(step_cost.per_sample[fullest]),
        samples=samples,
        gradient_accumulation_steps=accumulate,
        compute_seconds=compute if accumulate else float("inf"),
        traffic=traffic,
        seconds=max(compute, traffic / (machines.rate * 1e9)) if accumulate else float("inf"),
        validation_seconds=local * step_cost.validation_flops_per_sample / rate,
    )


def _fit(
    step_cost: StepCost, local: int, counts: Sequence[int], machines: Machines, *, every: bool
) -> tuple[int, int, np.ndarray]:
    """Return the samples in flight that fit, the micro-batches that a GPU's samples then need (0 where they never fit),
    and the (moments,) bytes that do not depend on the samples.

    The gradients of one micro-batch live during the backward pass alone. Those of several live for the whole step: a
    process's shard of them, or all of them where they are reduced once.
    """
    shards, room = machines.shard_degree or machines.gpus, machines.gpu_memory * 1e9 * _PLANNED
    whole = 4 * step_cost.trained
    gathered = np.zeros(())
    if shards > 1:  # the root with its gradients, a block with its gradients, and the next block in transfer
        gathered = step_cost.weight_bytes * (step_cost.root * 2 + step_cost.largest_block * 3)
    base = step_cost.states / shards + step_cost.fixed + gathered
    samples, constant = 0, base
    for accumulate in counts:
        gradients = step_cost.gradients / shards
        if accumulate > 1:
            accumulated = whole / shards if every or shards == 1 else whole
            gradients = np.maximum(gradients, accumulated)
        constant = base + gradients
        samples = _most_samples(constant, step_cost.per_sample, room)
        if local // accumulate <= samples:
            return samples, accumulate, constant
    return samples, 0, constant


def _most_samples(constant: np.ndarray, per_sample: np.ndarray, room: float) -> int:
    if constant.max() > room:
        return 0
    growing = per_sample > 0
    return max(0, int(((room - constant[growing]) // per_sample[growing]).min()))


def _traffic(step_cost: StepCost, shards: int, copies: int, *, micro_batches: int, every: bool) -> float:
    """Return the bytes that a process receives in a step.

    Parameters are gathered for each micro-batch. Float32 gradients are reduced over the shards and then over the
    copies, once or after each micro-batch.
    """
    gathered = micro_batches * step_cost.weight_bytes * step_cost.gathered
    reductions = micro_batches if every else min(micro_batches, 1)
    reduced = 4 * step_cost.trained * reductions
    over_copies = 4 * 2 * step_cost.trained / shards * (copies - 1) / copies * reductions
    return (gathered + reduced) * (shards - 1) / shards + over_copies


def describe(result: Plan, config: RunConfig, machines: Machines) -> str:
    """Write a plan as text for a terminal."""
    step_cost, total = result.step_cost, sum(result.step_cost.parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in step_cost.parameters.items())
    lines = [
        f"parameters     {total:,} ({parts}); {step_cost.trained:,} trained in the {config.stage.name} stage",
        f"work           {step_cost.flops_per_sample / 1e12:.3g} TFLOPs a sample, forward and backward"
        + _describe_encoding(result),
        f"on {machines.gpus} GPU{'s' * (machines.gpus > 1)} of {machines.gpu_memory:g} GB, batch {config.stage.batch_size} "
        f"({config.stage.batch_size // machines.gpus} a GPU), validation of as many windows included:",
    ]
    for layout in result.layouts:
        fraction, fits = layout.activation_checkpointing, layout.gradient_accumulation_steps > 0
        verdict = f"fits with {' '.join(layout.flags) or 'no flags'}" if fits else "does not fit"
        lines.append(
            f"  {f'{fraction:.0%} run again':15}{layout.states / 1e9:6.1f} GB of weights, gradients and optimiser, "
            f"{layout.per_sample / 1e9:.2f} GB for each sample in flight: {layout.samples} samples fit; the batch {verdict}"
            + (f", {layout.seconds:.2f} s a step" if fits else "")
        )
    if result.hours == float("inf"):
        return "\n".join([*lines, "no layout fits: take more GPUs, more memory, or a smaller model"])
    best = result.best
    if machines.gpus > 1:
        lines.append(
            f"traffic        {best.traffic / 1e9:.1f} GB to each GPU a step, {best.traffic / machines.rate / 1e9:.2f} "
            f"s at {machines.rate:g} GB/s, beside {best.compute_seconds:.2f} s of products"
        )
    times = ", ".join(
        f"{_hours(result, config, machines, utilisation):.1f} h at {utilisation:.0%}"
        for utilisation in sorted({*UTILISATIONS, machines.utilisation})
    )
    lines.append(f"time           {config.stage.steps:,} steps and their validations: {times} of the GPUs' peak")
    if result.cost:
        lines.append(f"cost           {result.cost:,.0f} in the price's currency, at {machines.utilisation:.0%}")
    return "\n".join(lines)


def _describe_encoding(result: Plan) -> str:
    if not result.encoding:
        return ""
    flops, names = sum(result.encoding.values()), " and ".join(result.encoding)
    fraction = flops / (flops + result.step_cost.flops_per_sample)
    text = f", and {flops / 1e12:.3g} for encoding {names} while training: {fraction:.0%} of a step"
    return text + ". Their memory is not counted"


def _hours(result: Plan, config: RunConfig, machines: Machines, utilisation: float) -> float:
    """Return the time of the best layout's steps and validations at another utilisation."""
    best, scale = result.best, machines.utilisation / utilisation
    step = max(best.compute_seconds * scale, best.traffic / (machines.rate * 1e9))
    validations = 1 + config.stage.steps // config.stage.validate_every
    return (step * config.stage.steps + best.validation_seconds * scale * validations) / 3600
