"""One model over many devices: torch's FSDP2 and HSDP, activation checkpointing and compile, applied from outside.

A step is spread over shares: `size` processes times `accumulate` parts. Random numbers, losses and gradients are those of
the whole step (`agra.draws`), so how it is spread changes speed and memory, and the result by rounding alone.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from agra.precision import local_device
from agra.training.lora import attach
from agra.training.objective import Objective
from agra.training.stages import StageConfig, freeze


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a step is spread. No part of a run's config: a run may go on with another one."""

    shards: int | None = None
    """Processes that hold one copy of the model between them (FSDP2); None: all. With fewer there are several copies
    (HSDP): say, the GPUs of a node."""
    accumulate: int = 1
    """Parts that a process takes its share of the batch in, one after another."""
    checkpoint_activations: float = 0.0
    """Share of the blocks, evenly spread, of which only the inputs are kept for the backward pass: they run again in it.
    0 none, 1 all; `agra plan` says what each takes and saves."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients over processes after every micro-batch instead of once a step: more traffic, but no process holds
    its gradients whole."""
    compile: bool | None = None
    """Compile the blocks; None compiles them on GPUs."""
    gather_bfloat16: bool = False
    """Gather parameters over processes in bfloat16 instead of float32: half the traffic, and no bfloat16 copies of the
    weights kept for the backward pass. Where a stage computes in bfloat16 the products are the same; biases and the
    affine norms of the bridge are rounded too."""
    deterministic: bool = False
    """Only operations that give the same bits every time; an operation that has none raises RuntimeError. On the CPU all
    are so anyway; on a GPU they are slower."""

    def __post_init__(self) -> None:
        for name in ("shards", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{name}: expected at least 1, got {value}")
        if not 0 <= self.checkpoint_activations <= 1:
            raise ValueError(
                f"parallel.checkpoint_activations: expected a share of 0 to 1, got {self.checkpoint_activations}"
            )


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """None where one process holds everything."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files and shows its progress."""
        return self.rank == 0

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over processes of every value; all give the same names."""
        if self.mesh is None:
            return dict(values)
        total = torch.tensor([*values.values()], dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def first_signal(self, received: Sequence[int]) -> int | None:
        """The signal that stops the run: any process's, the same in all; of different ones the highest number."""
        if self.mesh is None:
            return received[0] if received else None
        number = torch.tensor(received[0] if received else 0)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number.item()) or None

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.mesh is not None:
            dist.barrier()

    def gather(self, value: str) -> list[str]:
        """Every process's `value`, by rank."""
        if self.mesh is None:
            return [value]
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, value)
        return found


def check_shares(stage: StageConfig, parallel: ParallelConfig, size: int) -> None:
    """Raise ValueError where a step's samples, or those of its denoising pass, don't divide into equal shares."""
    shares, share = size * parallel.accumulate, stage.objective.video_share
    spread = f"{size} processes times {parallel.accumulate} parts"
    if stage.batch_size % shares:
        raise ValueError(f"stage.batch_size: {stage.batch_size} does not divide into {spread}")
    if shares > 1 and not (stage.batch_size // shares * share).is_integer():
        raise ValueError(
            f"stage.objective.video_share: {share} of {stage.batch_size} samples does not divide into {spread}"
        )


@contextmanager
def joined(config: ParallelConfig, device: str) -> Iterator[World]:
    """The world that torchrun's environment variables describe; without them, this process alone.

    Raises ValueError where processes or GPUs are too few for the mesh.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    with _same_bits(config.deterministic):
        if size == 1:
            if (config.shards or 1) > 1:
                raise ValueError(_too_few(config, 1))
            yield World(device=local_device(device))
        else:
            with _group(config, device, size) as world:
                yield world


@contextmanager
def _same_bits(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; read when it starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _group(config: ParallelConfig, device: str, size: int) -> Iterator[World]:
    own = local_device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=size, device=own, mesh=make_mesh(config, own.type, size))
    finally:
        dist.destroy_process_group()


def make_mesh(config: ParallelConfig, device_type: str, size: int) -> DeviceMesh:
    """One dimension of shards, or two: copies, and shards of each."""
    shards = config.shards or size
    if shards > size:
        raise ValueError(_too_few(config, size))
    if size % shards:
        raise ValueError(f"parallel.shards: {size} processes don't divide into copies of {shards}")
    if shards == size:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (size // shards, shards), mesh_dim_names=("copy", "shard"))


def _too_few(config: ParallelConfig, size: int) -> str:
    return (
        f"parallel.shards: {config.shards} processes are to share the model, but there "
        f"{'is' if size == 1 else 'are'} {size}; start more with torchrun --nproc-per-node, or ask for fewer"
    )


def build(
    make: Callable[[], Objective],
    stage: StageConfig,
    parallel: ParallelConfig,
    world: World,
    start: Callable[[Objective], None] | None,
) -> Objective:
    """An objective ready to train: with its stage's adapters, frozen as it wants, spread over the mesh, on its device.

    `start` fills the weights in; None leaves them to a checkpoint. With a mesh the first process alone makes the whole
    model, on the CPU, and hands it out tensor by tensor; the others never hold more than their shards.
    """
    if world.mesh is None:
        objective = make()
        if start is not None:
            start(objective)
        attach(objective.wam, stage.lora, stage.seed)
        objective = objective.to(world.device)
        freeze(objective, stage)
        apply(objective, parallel, world.device)
        return objective
    with torch.device("meta"):
        objective = make()
        attach(objective.wam, stage.lora, stage.seed)
    assert not [*objective.buffers()], "to_empty would leave a buffer undefined"
    freeze(objective, stage)
    apply(objective, parallel, world.device)
    shard(objective, world.mesh, parallel)
    objective.to_empty(device=world.device)
    if start is not None:
        whole: dict[str, Any] = {}
        if world.leads:
            source = make()
            start(source)
            attach(source.wam, stage.lora, stage.seed)
            whole = source.state_dict()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(objective, whole, options=options)
    return objective


def blocks(objective: Objective) -> list[nn.Module]:
    """The repeated parts that checkpointing, compile and sharding work on."""
    wam = objective.wam
    return [*wam.video_dit.transformer.transformer_blocks, *wam.bridge.blocks, *wam.action_dit.blocks]


def apply(objective: Objective, parallel: ParallelConfig, device: torch.device | None = None) -> None:
    """Compile and checkpoint the blocks in place; parameters keep their names. `device` is where they will run."""
    share = parallel.checkpoint_activations
    on_gpu = device is not None and device.type == "cuda"
    compiles = on_gpu if parallel.compile is None else parallel.compile
    for index, block in enumerate(blocks(objective)):
        if compiles:
            block.forward = torch.compile(block.forward)
        if int((index + 1) * share) > int(index * share):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(objective: Objective, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """FSDP2 over `mesh`: a group for each block, and one root, so that both video passes of a step run under it.

    Gradients are reduced in float32. Parameters are gathered in float32 as well, unless `gather_bfloat16`; where a stage
    computes in bfloat16 autocast casts them, as in one process.
    """
    dtype = torch.bfloat16 if parallel.gather_bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    parts = blocks(objective)
    if objective.wam.config.video_dit.text_projection_dim is not None:
        parts.append(objective.wam.video_dit.transformer.crossattn_proj)  # large, frozen, and idle under a cache
    place = partial(_dimension, mesh["shard"].size())
    for part in (*parts, objective):
        fully_shard(part, mesh=mesh, mp_policy=policy, shard_placement_fn=place)


def _dimension(shards: int, parameter: nn.Parameter) -> Shard:
    """Split rows; banks of fewer rows than shards are split along another axis where it divides."""
    if parameter.ndim and parameter.shape[0] < shards:
        even = [i for i in range(1, parameter.ndim) if parameter.shape[i] % shards == 0]
        return Shard(even[0] if even else 0)
    return Shard(0)


@contextmanager
def gathered(objective: Objective) -> Iterator[None]:
    """Parts of the objective may be called inside, not the root alone: the root's own parameters are whole meanwhile."""
    if not isinstance(objective, FSDPModule):
        yield
        return
    objective.unshard()
    try:
        yield
    finally:
        objective.reshard()
