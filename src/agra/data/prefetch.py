"""Batches made ahead of time, so that reading does not keep the training step waiting."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from agra.batch import Batch


class Prefetched:
    """`batch(step)`, with the next steps' batches in the making meanwhile.

    What a step gets is exactly `batch(step)`, whatever was asked before; an error in the making is raised by the step
    that it belongs to. Threads, as decoding and reading release the interpreter.
    """

    def __init__(self, batch: Callable[[int], Batch], *, ahead: int = 2, workers: int = 1) -> None:
        self._batch, self._ahead = batch, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batch")
        self._made: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of a step; those of the `ahead` following steps are begun."""
        for wanted in range(step, step + 1 + self._ahead):
            if wanted not in self._made:
                self._made[wanted] = self._pool.submit(self._batch, wanted)
        made = self._made.pop(step)
        for stale in [other for other in self._made if not step < other <= step + self._ahead]:
            self._made.pop(stale).cancel()
        return made.result()

    def close(self) -> None:
        """Let go of what is in the making."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
