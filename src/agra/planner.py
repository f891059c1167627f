"""What a run will need, before it is launched: memory, FLOPs, time, cost.

A step is counted on fake tensors (`agra.footprint`) and laid on the machines. Only the share of a GPU's peak that a step
reaches is an assumption, named as such.
"""

from dataclasses import dataclass

import numpy as np
import torch

from agra.config import RunConfig
from agra.footprint import Footprint, measure

PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bfloat16 products a second, from the makers' data sheets."""
_RESERVED = 0.92
"""Share of a GPU's memory that is planned for; the rest is the allocator's, the libraries' and NCCL's."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one step lies on the GPUs."""

    checkpoint_activations: bool
    states: int
    """Bytes on a GPU, at the step's fullest moment, that do not depend on the number of samples."""
    per_sample: int
    """Bytes on a GPU for each sample in flight, at that moment."""
    samples: int
    """Samples in flight that fit; 0 if none does."""
    accumulate: int
    """Parts that a GPU's share of the batch needs, so that it fits; 0 if it never does."""
    flops_per_sample: float
    """Of a step laid like this."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found."""

    footprint: Footprint
    layouts: tuple[Layout, Layout]
    """Without and with activation checkpointing."""
    step_seconds: float
    """With the better of the layouts that fit; infinite if none does."""
    hours: float
    cost: float


def peak_flops(device: torch.device) -> float | None:
    """Of the GPU, by its name; None where it isn't known, or for a CPU."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def plan(
    config: RunConfig,
    *,
    gpus: int,
    gpu_memory: float,
    shards: int | None = None,
    peak: float = PEAK_FLOPS["h100"],
    utilisation: float = 0.35,
    price: float = 0.0,
) -> Plan:
    """Lay a recipe's step on `gpus` GPUs of `gpu_memory` GB each, `shards` of which share one copy of the model.

    `peak` is a GPU's in FLOPs a second, `utilisation` the assumed share of it, `price` that of a GPU for an hour. Raises ValueError where the numbers
    make no sense.
    """
    shards = shards or gpus
    if gpus < 1 or gpu_memory <= 0 or gpus % shards:
        raise ValueError(f"plan: {gpus} GPUs of {gpu_memory} GB don't divide into copies of {shards}")
    if config.stage.batch_size % gpus:
        raise ValueError(f"stage.batch_size: {config.stage.batch_size} does not divide over {gpus} GPUs")
    plain = measure(config)
    checkpointed = measure(config, checkpoint_activations=True)
    local = config.stage.batch_size // gpus
    layouts = tuple(
        _layout(found, on, local=local, shards=shards, room=gpu_memory * 1e9 * _RESERVED)
        for found, on in ((plain, False), (checkpointed, True))
    )
    work = local * min((layout.flops_per_sample for layout in layouts if layout.accumulate), default=float("inf"))
    seconds = work / (peak * utilisation)
    hours = seconds * config.stage.steps / 3600
    return Plan(
        footprint=plain,
        layouts=(layouts[0], layouts[1]),
        step_seconds=seconds,
        hours=hours,
        cost=hours * gpus * price,
    )


def _layout(found: Footprint, on: bool, *, local: int, shards: int, room: float) -> Layout:
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
    return Layout(
        checkpoint_activations=on,
        states=int(constant[fullest]),
        per_sample=int(found.per_sample[fullest]),
        samples=samples,
        accumulate=fitting[0] if fitting else 0,
        flops_per_sample=found.flops_per_sample,
    )


def describe(found: Plan, config: RunConfig, *, gpus: int, gpu_memory: float) -> str:
    """The plan as text for a terminal."""
    footprint, total = found.footprint, sum(found.footprint.parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in footprint.parameters.items())
    lines = [
        f"parameters     {total:,} ({parts}); {footprint.trained:,} trained in the {config.stage.name} stage",
        f"work           {footprint.flops_per_sample / 1e12:.3g} TFLOPs a sample, forward and backward",
        f"on {gpus} GPUs of {gpu_memory:g} GB, batch {config.stage.batch_size} "
        f"({config.stage.batch_size // gpus} a GPU):",
    ]
    for layout in found.layouts:
        name = "checkpointed" if layout.checkpoint_activations else "plain"
        verdict = "does not fit"
        if layout.accumulate:
            flags = ["--parallel.checkpoint-activations True"] if layout.checkpoint_activations else []
            flags += [f"--parallel.accumulate {layout.accumulate}"] if layout.accumulate > 1 else []
            verdict = f"fits with {' '.join(flags) or 'no flags'}"
        lines.append(
            f"  {name:13}{layout.states / 1e9:6.1f} GB of states and {layout.per_sample / 1e9:.2f} GB a sample in flight: "
            f"{layout.samples} fit; the batch {verdict}"
        )
    if found.hours == float("inf"):
        return "\n".join([*lines, "no layout fits: take more GPUs, more memory, or a smaller model"])
    lines.append(
        f"time           {found.step_seconds:.2f} s a step, {found.hours:.1f} h for {config.stage.steps:,} steps"
        + (f", {found.cost:,.0f} in the price's currency" if found.cost else "")
    )
    return "\n".join(lines)
