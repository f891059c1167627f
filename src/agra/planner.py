"""What a run will need, before it is launched: memory, FLOPs, time, cost.

The numbers are counted, not guessed: a training step of the recipe's own model runs on fake tensors, which have shapes but
no storage, while what autograd keeps for the backward pass and the FLOPs of every product are added up. Only the share
of a GPU's peak that a step reaches is an assumption, named as such.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from agra.batch import Batch
from agra.config import RunConfig
from agra.training.lora import attach
from agra.training.objective import Objective
from agra.training.sharding import ParallelConfig, apply, blocks
from agra.training.stages import freeze, modules
from agra.wam.model import WAM

PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bfloat16 products a second, from the makers' data sheets."""
_TEACHER_WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536, "so400m": 1152}
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}
"""torch counts the GPU's kernels of attention; on the CPU, where the fake step runs, it has another name."""
_RESERVED = 0.92
"""Share of a GPU's memory that is planned for; the rest is the allocator's, the libraries' and NCCL's."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A training step of one process, in bytes and FLOPs; "saved" is what autograd keeps for the backward pass."""

    parameters: dict[str, int]
    """Of each part of the model, and `trained`, those that this stage trains."""
    trained: int
    largest_block: int
    """Parameters of the block that is gathered whole while it runs."""
    root: int
    """Parameters outside the blocks, whole while a step runs."""
    saved_fixed: int
    saved_per_sample: int
    working_per_sample: int
    """What the block with the most needs once more while its backward pass runs."""
    flops_per_sample: float
    """Forward and backward, without what checkpointing repeats; of a checkpointed step the forward alone."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one step lies on the GPUs."""

    checkpoint_activations: bool
    states: int
    """Bytes on a GPU of parameters, gradients, AdamW's moments and gathered blocks."""
    per_sample: int
    """Bytes on a GPU for each sample in flight."""
    samples: int
    """Samples in flight that fit; 0 if none does."""
    accumulate: int
    """Parts that a GPU's share of the batch needs, so that it fits; 0 if it never does."""


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


def teacher_width(config: RunConfig) -> int | None:
    """Width of the alignment's targets, by the name of its teacher; None without alignment. ValueError if unknown."""
    if not config.aligns:
        return None
    assert config.alignment is not None
    teacher = config.alignment.teacher
    name = "small" if teacher.kind == "packaged_dinov2_small" else teacher.source
    found = [width for part, width in _TEACHER_WIDTHS.items() if part in name]
    if not found:
        raise ValueError(f"alignment.teacher.source: the width of {name!r} is not known here; name a public teacher")
    return found[0] * max(1, len(teacher.depths))


def measure(config: RunConfig, *, checkpoint_activations: bool = False) -> Footprint:
    """Run a step on fake tensors with one sample and with two: what grows and what doesn't."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective, width, least = _objective(config)
        apply(objective, ParallelConfig(checkpoint_activations=checkpoint_activations))
        one = _step(objective, config, width, least)
        two = _step(objective, config, width, 2 * least, backward=not checkpoint_activations)
        own = {name: _count(part) for name, part in modules(objective).items()}
        inside = {id(p) for block in blocks(objective) for p in block.parameters()}
        projection = config.model.video_dit.text_projection_dim is not None
        idle = _count(objective.wam.video_dit.transformer.crossattn_proj) if projection else 0
        return Footprint(
            parameters=own,
            trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
            largest_block=max(_count(block) for block in blocks(objective)),
            root=sum(p.numel() for p in objective.parameters() if id(p) not in inside) - idle,
            saved_fixed=max(0, 2 * one.saved - two.saved),
            saved_per_sample=(two.saved - one.saved) // least,
            working_per_sample=two.working // (2 * least),
            flops_per_sample=two.flops / (2 * least),
        )


def flops_per_sample(config: RunConfig) -> float:
    """Of a step's forward and backward passes: what model FLOPs utilisation is measured in."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective, width, least = _objective(config)
        return _step(objective, config, width, least, backward=True).flops / least


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
        _layout(found, plain, on, local=local, shards=shards, room=gpu_memory * 1e9 * _RESERVED)
        for found, on in ((plain, False), (checkpointed, True))
    )
    repeated = [1.0 if not layout.checkpoint_activations else 4 / 3 for layout in layouts if layout.accumulate]
    work = plain.flops_per_sample * local * min(repeated, default=float("inf"))
    seconds = work / (peak * utilisation)
    hours = seconds * config.stage.steps / 3600
    return Plan(
        footprint=plain,
        layouts=(layouts[0], layouts[1]),
        step_seconds=seconds,
        hours=hours,
        cost=hours * gpus * price,
    )


def _layout(found: Footprint, plain: Footprint, on: bool, *, local: int, shards: int, room: float) -> Layout:
    total = sum(plain.parameters.values())
    states = 4 * (total + 3 * plain.trained) // shards  # parameters; gradients and two moments
    if shards > 1:
        states += 4 * (plain.root * 2 + plain.largest_block * 3)  # whole, with gradients; the next block on its way
    states += found.saved_fixed
    per_sample = found.saved_per_sample + plain.working_per_sample
    samples = max(0, int((room - states) // per_sample))
    fitting = [parts for parts in range(1, local + 1) if local % parts == 0 and local // parts <= samples]
    accumulate = fitting[0] if fitting else 0
    return Layout(
        checkpoint_activations=on, states=states, per_sample=per_sample, samples=samples, accumulate=accumulate
    )


@dataclass(kw_only=True)
class _Counted:
    saved: int = 0
    working: int = 0
    flops: float = 0.0


def _objective(config: RunConfig) -> tuple[Objective, int | None, int]:
    """The model of a stage, the width of its targets, and the fewest samples that divide into its two passes."""
    width = teacher_width(config)
    objective = Objective(WAM(config.model), config.stage.objective, config.alignment if config.aligns else None, width)
    attach(objective.wam, config.stage.lora)
    freeze(objective, config.stage)
    return objective, width, round(1 / config.stage.objective.video_share)


def _step(
    objective: Objective, config: RunConfig, width: int | None, count: int, *, backward: bool = False
) -> _Counted:
    counted = _Counted()
    own = {_storage(p) for p in objective.parameters()}
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as flops:
        with _watched(objective, own, counted), torch.autocast("cpu", torch.bfloat16, enabled=_half(config)):
            loss = objective(_batch(config, width, count)).total
        if backward:
            loss.backward()
    objective.zero_grad(set_to_none=True)
    counted.flops = flops.get_total_flops()
    return counted


@contextmanager
def _watched(objective: Objective, own: set[int], counted: _Counted) -> Iterator[None]:
    """Add up the storages that autograd saves, besides the parameters: all of them, and the most that a block saves."""
    seen: dict[int, Tensor] = {}
    before: list[int] = [0]

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in own and key not in seen:
            seen[key] = tensor  # kept alive, so that no other storage takes its place
            counted.saved += tensor.untyped_storage().nbytes()
        return tensor

    def enter(*_: object) -> None:
        before[0] = counted.saved

    def leave(*_: object) -> None:
        counted.working = max(counted.working, counted.saved - before[0])

    handles = []
    for block in blocks(objective):
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _batch(config: RunConfig, width: int | None, count: int) -> Batch:
    model, head = config.model, config.model.action_dit
    ones = partial(torch.ones, dtype=torch.bool)
    return Batch(
        latents=torch.randn(count, *model.latent_shape),
        instruction=torch.randn(count, model.text.length, model.video_dit.text_dim),
        state=torch.randn(count, head.state_dim),
        actions=torch.randn(count, head.horizon, head.action_dim),
        action_mask=ones(count, head.horizon, head.action_dim),
        embodiment=torch.zeros(count, dtype=torch.long),
        targets=None if width is None else torch.randn(count, *model.token_grid, width),
    )


def _half(config: RunConfig) -> bool:
    """On a GPU `auto` is bfloat16."""
    return config.stage.precision != "float32"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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
