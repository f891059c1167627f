"""What a run will need, before it is launched: memory, FLOPs, time, cost.

A step is counted on fake tensors (`agra.footprint`) and laid on the machines. Only the share of a GPU's peak that a step
reaches, and the rate at which GPUs hear from each other, are assumptions, named as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from agra.config import RunConfig
from agra.footprint import Footprint, measure

PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bfloat16 products a second, from the makers' data sheets."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the blocks, that run again in the backward pass: what a plan chooses from."""
_RESERVED = 0.92
"""Share of a GPU's memory that is planned for; the rest is the allocator's, the libraries' and NCCL's."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The machines that a run is planned for."""

    gpus: int
    gpu_memory: float = 80.0
    """GB of each GPU."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    shards: int | None = None
    """GPUs that hold one copy of the model between them; by default all."""
    utilisation: float = 0.35
    """Share of the GPU's peak that a step is assumed to reach."""
    bandwidth: float | None = None
    """GB a second that a GPU is assumed to receive from the others; by default 450, the NVLink of an H100's machine, for
    up to 8 GPUs, and 50, a 400 Gb/s port for each, for more."""
    price: float = 0.0
    """Of a GPU for an hour."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "utilisation", "rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"plan: {name}: expected more than 0, got {getattr(self, name)}")
        if self.shards is not None and (self.shards < 1 or self.gpus % self.shards):
            raise ValueError(f"plan: {self.gpus} GPUs don't divide into copies of {self.shards}")

    @property
    def rate(self) -> float:
        """`bandwidth` or its default."""
        if self.bandwidth is not None:
            return self.bandwidth
        return 450.0 if self.gpus <= 8 else 50.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one step lies on the GPUs."""

    checkpoint_activations: float
    """Share of the blocks that run again in the backward pass."""
    states: int
    """Bytes on a GPU, at the step's fullest moment, that do not depend on the number of samples."""
    per_sample: int
    """Bytes on a GPU for each sample in flight, at that moment."""
    samples: int
    """Samples in flight that fit; 0 if none does."""
    accumulate: int
    """Parts that a GPU's share of the batch needs, so that it fits; 0 if it never does."""
    compute_seconds: float
    """Of a step's products; infinite if it does not fit."""
    traffic: float
    """Bytes that a GPU receives from the others in a step."""
    seconds: float
    """Of a step, if all traffic runs beside products: the longer of the two."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found."""

    footprint: Footprint
    layouts: tuple[Layout, ...]
    """From no activation checkpointing to all."""
    hours: float
    cost: float

    @property
    def best(self) -> Layout:
        """The quickest layout; the first where none fits."""
        return min(self.layouts, key=lambda layout: layout.seconds)


def peak_flops(device: torch.device) -> float | None:
    """Of the GPU, by its name; None where it isn't known, or for a CPU."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def plan(config: RunConfig, machines: Machines) -> Plan:
    """Lay a step of a recipe's stage on machines. Raises ValueError where the batch does not divide over them."""
    shares = track(SHARES, "counting a step", console=Console(stderr=True), transient=True)
    return lay_out(config, machines, [measure(config, checkpoint_activations=share) for share in shares])


def lay_out(config: RunConfig, machines: Machines, counted: Sequence[Footprint]) -> Plan:
    """`plan` with a step already counted, without activation checkpointing and then with more and more of it."""
    if config.stage.batch_size % machines.gpus:
        raise ValueError(f"stage.batch_size: {config.stage.batch_size} does not divide over {machines.gpus} GPUs")
    local = config.stage.batch_size // machines.gpus
    layouts = tuple(_layout(found, local=local, machines=machines) for found in counted)
    hours = min(layout.seconds for layout in layouts) * config.stage.steps / 3600
    return Plan(
        footprint=counted[0],
        layouts=layouts,
        hours=hours,
        cost=hours * machines.gpus * machines.price,
    )


def _layout(found: Footprint, *, local: int, machines: Machines) -> Layout:
    shards, room = machines.shards or machines.gpus, machines.gpu_memory * 1e9 * _RESERVED
    gradients = np.maximum(found.gradients, 4 * found.trained)  # where a step takes several parts they stay throughout
    constant = (found.states + gradients) / shards + found.fixed
    if shards > 1:  # whole, with gradients; the next block on its way
        constant = constant + 4 * (found.root * 2 + found.largest_block * 3)
    growing = found.per_sample > 0
    samples = max(0, int(((room - constant[growing]) // found.per_sample[growing]).min()))
    if constant.max() > room:
        samples = 0
    fullest = int(np.argmax(constant + max(samples, 1) * found.per_sample))
    fitting = [parts for parts in range(1, local + 1) if local % parts == 0 and local // parts <= samples]
    accumulate = fitting[0] if fitting else 0
    compute = local * found.flops_per_sample / (PEAK_FLOPS[machines.gpu] * machines.utilisation)
    traffic = accumulate * _traffic(found, shards, machines.gpus // shards)
    return Layout(
        checkpoint_activations=found.checkpointed,
        states=int(constant[fullest]),
        per_sample=int(found.per_sample[fullest]),
        samples=samples,
        accumulate=accumulate,
        compute_seconds=compute if fitting else float("inf"),
        traffic=traffic,
        seconds=max(compute, traffic / (machines.rate * 1e9)) if fitting else float("inf"),
    )


def _traffic(found: Footprint, shards: int, copies: int) -> float:
    """Bytes that a process receives for a part of a step, all float32: parameters gathered and gradients reduced
    over the shards, and the shards' gradients reduced over the copies."""
    gathered = (found.gathered + found.trained) * (shards - 1) / shards
    reduced = 2 * found.trained / shards * (copies - 1) / copies
    return 4 * (gathered + reduced)


def describe(found: Plan, config: RunConfig, machines: Machines) -> str:
    """The plan as text for a terminal."""
    footprint, total = found.footprint, sum(found.footprint.parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in footprint.parameters.items())
    lines = [
        f"parameters     {total:,} ({parts}); {footprint.trained:,} trained in the {config.stage.name} stage",
        f"work           {footprint.flops_per_sample / 1e12:.3g} TFLOPs a sample, forward and backward",
        f"on {machines.gpus} GPUs of {machines.gpu_memory:g} GB, batch {config.stage.batch_size} "
        f"({config.stage.batch_size // machines.gpus} a GPU):",
    ]
    for layout in found.layouts:
        share = layout.checkpoint_activations
        name = f"{share:.0%} run again" if share else "plain"
        verdict = "does not fit"
        if layout.accumulate:
            flags = [f"--parallel.checkpoint-activations {share:g}"] if share else []
            flags += [f"--parallel.accumulate {layout.accumulate}"] if layout.accumulate > 1 else []
            verdict = f"fits with {' '.join(flags) or 'no flags'}"
        lines.append(
            f"  {name:15}{layout.states / 1e9:6.1f} GB of states and {layout.per_sample / 1e9:.2f} GB a sample in flight: "
            f"{layout.samples} fit; the batch {verdict}"
            + (f", {layout.seconds:.2f} s a step" if layout.accumulate else "")
        )
    if found.hours == float("inf"):
        return "\n".join([*lines, "no layout fits: take more GPUs, more memory, or a smaller model"])
    best = found.best
    if machines.gpus > 1:
        lines.append(
            f"traffic        {best.traffic / 1e9:.1f} GB to each GPU a step, {best.traffic / machines.rate / 1e9:.2f} s "
            f"at {machines.rate:g} GB/s, beside {best.compute_seconds:.2f} s of products"
        )
    lines.append(
        f"time           {best.seconds:.2f} s a step, {found.hours:.1f} h for {config.stage.steps:,} steps"
        + (f", {found.cost:,.0f} in the price's currency" if found.cost else "")
    )
    return "\n".join(lines)
