"""The processes of a run: rank, device, mesh, the values that they agree on, and the signals that stop them."""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from agra.precision import local_device


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """The processes of a run and the place of this one among them. By default there is one process, on the CPU."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """None where one process holds everything."""

    @property
    def is_main(self) -> bool:
        """True for the process that writes the run's files and shows its progress."""
        return self.rank == 0

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Average every value over processes. All processes must give the same names."""
        if self.mesh is None:
            return dict(values)
        total = torch.tensor([*values.values()], dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world_size).tolist(), strict=True))

    def first_signal(self, received: Sequence[int]) -> int | None:
        """Agree on the signal that stops the run. Of different signals the highest number wins."""
        if self.mesh is None:
            return received[0] if received else None
        number = torch.tensor(received[0] if received else 0)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number.item()) or None

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.mesh is not None:
            dist.barrier()

    def gather(self, value: str) -> list[str]:
        """Collect every process's `value`, in the order of ranks."""
        if self.mesh is None:
            return [value]
        values: list[str] = [""] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def distributed_context(device: str, *, shard_degree: int | None, deterministic: bool) -> Iterator[DistributedContext]:
    """Set up the processes that torchrun's environment variables describe. Without them there is one process.

    Raises ValueError where there are too few processes or GPUs for the mesh.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    with _deterministic_algorithms(deterministic):
        if world_size == 1:
            if (shard_degree or 1) > 1:
                raise ValueError(_too_few(shard_degree, 1))
            yield DistributedContext(device=_use(device))
        else:
            with _process_group(device, shard_degree, world_size) as context:
                yield context


@contextmanager
def stop_signals() -> Iterator[Sequence[int]]:
    """Collect SIGINT and SIGTERM in the list inside this context instead of raising. A second SIGINT acts as usual.

    Later SIGTERMs are collected too: a launcher may repeat the scheduler's while the checkpoint is written.
    """
    received: list[int] = []
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def make_mesh(device_type: str, shard_degree: int | None, world_size: int) -> DeviceMesh:
    """Make a mesh of the dimension "shard" (FSDP), or of the dimensions "copy" and "shard" (HSDP)."""
    degree = shard_degree or world_size
    if degree > world_size:
        raise ValueError(_too_few(shard_degree, world_size))
    if world_size % degree:
        raise ValueError(
            f"parallel.shard_degree: {world_size} processes do not divide into copies of {degree}; choose a divisor"
        )
    if degree == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world_size // degree, degree), mesh_dim_names=("copy", "shard"))


@contextmanager
def _process_group(device: str, shard_degree: int | None, world_size: int) -> Iterator[DistributedContext]:
    local = _use(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo")
    try:
        mesh = make_mesh(local.type, shard_degree, world_size)
        yield DistributedContext(rank=dist.get_rank(), world_size=world_size, device=local, mesh=mesh)
    finally:
        dist.destroy_process_group()


def _use(device: str) -> torch.device:
    """Make this process's device the current one, whose random numbers `agra.rng` stores."""
    local = local_device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    return local


@contextmanager
def _deterministic_algorithms(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _too_few(shard_degree: int | None, world_size: int) -> str:
    return (
        f"parallel.shard_degree: {shard_degree} processes are to share the model, but there "
        f"{'is' if world_size == 1 else 'are'} {world_size}; start more with torchrun --nproc-per-node, or use a lower "
        "degree"
    )
