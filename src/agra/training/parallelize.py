"""Sharding (FSDP2, HSDP), activation checkpointing and compilation, applied to a method from outside.

A step's samples are spread over processes, and over the micro-batches of each. Random numbers, losses and gradients are
those of the whole step (`agra.rng`). The spread therefore changes speed and memory, and the result by rounding alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from agra.lora import attach
from agra.methods.method import Method
from agra.precision import prepare_compilation
from agra.stages import StageConfig
from agra.training.distributed import DistributedContext
from agra.training.optimization import freeze


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The spread of a step over processes and micro-batches.

    Not part of RunConfig: a run may resume with another one.
    """

    shard_degree: int | None = None
    """Processes that hold one copy of the model together (FSDP2). By default all of them. A lower degree makes several
    copies (HSDP), for example one for each node."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of each process in a step."""
    activation_checkpointing: float = 0.0
    """Fraction of the blocks, evenly spread, that store only their inputs and run again in the backward pass.
    `agra plan` prints the memory and time of several fractions."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients over processes after every micro-batch instead of once a step. This needs more traffic, and less
    memory since no process holds whole gradients."""
    compile: bool | None = None
    """Compile the blocks. By default on GPUs alone."""
    gather_bfloat16: bool = False
    """Gather parameters over processes in bfloat16 instead of float32: half the traffic, and no bfloat16 copies of the
    weights for the backward pass. Matrix products of a stage that computes in bfloat16 are the same, but for those of the
    video DiT's noise levels. Their weights are rounded, and so are normalised queries and keys, the bridge's affine
    norms and the action head's tokens, which moves the gradient about as much as autocast does
    (tests/device/test_gather.py)."""
    deterministic: bool = False
    """Use deterministic operations alone. An operation without a deterministic version raises RuntimeError. CPU
    operations are always deterministic. On a GPU they are slower."""

    def __post_init__(self) -> None:
        for name in ("shard_degree", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{name}: expected at least 1, got {value}")
        if not 0 <= self.activation_checkpointing <= 1:
            raise ValueError(
                f"parallel.activation_checkpointing: expected a fraction of 0 to 1, got {self.activation_checkpointing}"
            )


def check_batch_size(batch_size: int, batch_multiple: int, micro_batches: int, world_size: int) -> None:
    """Check that a step's samples divide into equal micro-batches of a multiple of `batch_multiple` samples.

    One process with one micro-batch rounds instead. Raises ValueError.
    """
    count = world_size * micro_batches
    spread = f"{world_size} processes with {micro_batches} micro-batches each"
    if batch_size % count:
        raise ValueError(f"stage.batch_size: {batch_size} does not divide into {spread}; change one of the numbers")
    size = batch_size // count
    if count > 1 and size % batch_multiple:
        raise ValueError(
            f"stage.batch_size: {batch_size} over {spread} is {size} samples in a micro-batch; the method needs a "
            f"multiple of {batch_multiple}"
        )


def build(
    make: Callable[[], Method],
    stage: StageConfig,
    parallel: ParallelConfig,
    context: DistributedContext,
    initialize: Callable[[Method], None] | None,
) -> Method:
    """Make a method ready to train: with its stage's adapters and frozen parts, sharded, on its device.

    `initialize` sets the weights. With None they are left for a checkpoint to set. With a mesh the main process alone
    makes the whole model, on the CPU, and sends it tensor by tensor. The other processes never hold more than their
    shards.
    """
    if context.mesh is None:
        method = make()
        if initialize is not None:
            initialize(method)
        _attach(method, stage)
        method = method.to(context.device)
        freeze(method, stage)
        apply(method, parallel, context.device)
        return method
    with torch.device("meta"):
        method = make()
        _attach(method, stage)
    assert not [*method.buffers()], "to_empty would leave a buffer undefined"
    freeze(method, stage)
    apply(method, parallel, context.device)
    shard(method, context.mesh, parallel)
    method.to_empty(device=context.device)
    if initialize is not None:
        weights: dict[str, Any] = {}
        if context.is_main:
            source = make()
            initialize(source)
            _attach(source, stage)
            weights = source.state_dict()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(method, weights, options=options)
    return method


def apply(method: Method, parallel: ParallelConfig, device: torch.device | None = None) -> None:
    """Compile and checkpoint the blocks in place, for `device`. Parameters keep their names."""
    fraction = parallel.activation_checkpointing
    device = device or torch.device("cpu")
    compiles = device.type == "cuda" if parallel.compile is None else parallel.compile
    if compiles:
        prepare_compilation(device)
    for index, block in enumerate(method.blocks()):
        if compiles:
            block.forward = torch.compile(block.forward)
        if int((index + 1) * fraction) > int(index * fraction):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(method: Method, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Shard with FSDP2 over `mesh`: one group for each block and each module that no stage trains, and the method as
    the root.

    Gradients are reduced in float32. Parameters are gathered in float32 too, unless `gather_bfloat16` is set. In a
    stage that computes in bfloat16, autocast casts them, as in one process.
    """
    dtype = torch.bfloat16 if parallel.gather_bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = partial(_dimension, mesh["shard"].size())
    for module in (*method.blocks(), *method.always_frozen(), method):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=place)


@contextmanager
def gathered(method: Method) -> Iterator[None]:
    """Gather the root's parameters inside this context, so that modules of the method can be called directly."""
    if not isinstance(method, FSDPModule):
        yield
        return
    method.unshard()
    try:
        yield
    finally:
        method.reshard()


def _attach(method: Method, stage: StageConfig) -> None:
    attach(method.parts(), stage.lora, seed=stage.seed, leave_out=method.always_frozen())


def _dimension(shards: int, parameter: nn.Parameter) -> Shard:
    """Split a parameter along its rows, or along another axis where there are fewer rows than shards and that axis
    divides.
    """
    if parameter.ndim and parameter.shape[0] < shards:
        even = [i for i in range(1, parameter.ndim) if parameter.shape[i] % shards == 0]
        return Shard(even[0] if even else 0)
    return Shard(0)
