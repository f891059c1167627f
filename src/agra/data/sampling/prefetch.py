"""Batches made in advance, and their copies to a GPU during the computation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import TracebackType

import torch

from agra.batch import Batch


class Prefetched:
    """Call `batch(step)` in threads, in advance of the following steps.

    A step gets exactly `batch(step)`, independent of earlier requests. An error in the making of a batch is raised at
    its step. Threads suffice, since decoding and reading release the GIL. With `pin`, batches are in page-locked
    memory.
    """

    def __init__(self, batch: Callable[[int], Batch], *, ahead: int = 2, workers: int = 1, pin: bool = False) -> None:
        self._batch, self._ahead, self._pin = batch, ahead, pin
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batch")
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, and start the batches of the `ahead` following steps."""
        for upcoming in range(step, step + 1 + self._ahead):
            if upcoming not in self._pending:
                self._pending[upcoming] = self._pool.submit(self._make, upcoming)
        current = self._pending.pop(step)
        for stale in [other for other in self._pending if not step < other <= step + self._ahead]:
            self._pending.pop(stale).cancel()
        return current.result()

    def _make(self, step: int) -> Batch:
        batch = self._batch(step)
        return batch.pin_memory() if self._pin else batch

    def close(self) -> None:
        """Stop the workers and drop unfinished batches."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield every batch on `device`. On a GPU each batch is copied during the computation with the one before it.

    The first copy, and so that of a single batch, overlaps with no computation of this call. The CPU does not wait for
    the copy of a pinned batch. At most two batches are on the GPU.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = _copy_stream(device)

    def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        copied = torch.cuda.Event()
        with torch.cuda.stream(stream):
            moved = batch.to(device, non_blocking=True)
            copied.record(stream)
        return moved, copied

    upcoming = None
    for batch in batches:
        present, upcoming = upcoming, copy(batch)
        if present is not None:
            yield _ready(*present, device)
    if upcoming is not None:
        yield _ready(*upcoming, device)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a device's stream for copies. Memory that was freed on a stream serves that stream alone."""
    return torch.cuda.Stream(device)


def _ready(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Make the current stream wait for the copy of `batch`, and keep its memory until that stream has used it."""
    present = torch.cuda.current_stream(device)
    present.wait_event(copied)
    for tensor in batch.tensors.values():
        tensor.record_stream(present)
    return batch
