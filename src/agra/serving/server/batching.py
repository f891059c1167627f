"""Batches requests of different clients: everything that waits when the policy is free goes into the next forward pass.

No timer delays a request. Requests that arrive during a forward pass form the next batch. An idle server runs a single
request at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from agra.types import ActionChunk, BatchPolicy, PolicyRequest


@dataclass(eq=False)
class _Waiting:
    request: PolicyRequest
    future: "asyncio.Future[BatchedResult]"
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, kw_only=True)
class BatchedResult:
    """A chunk, its time in the queue (seconds) and the size of its batch."""

    chunk: ActionChunk
    queued: float
    batch: int


class Batcher:
    """Runs a policy on batches in a thread of its own. Belongs to one event loop.

    Requests with frames of more than `small` bytes count as large. A forward pass takes at most `max_large` bytes of
    them, and at least one request, so that clients with small frames do not wait for many large ones.
    """

    def __init__(
        self, policy: BatchPolicy, *, max_batch: int = 16, small: int = 2**20, max_large: int = 16 * 2**20
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, got {max_batch}")
        self.policy, self.max_batch, self.small, self.max_large = policy, max_batch, small, max_large
        self.running_since: float | None = None
        self._waiting: deque[_Waiting] = deque()
        self._arrived, self._idle = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    @property
    def stuck_for(self) -> float:
        """Seconds since the running forward pass began, 0 between forward passes."""
        since = self.running_since
        return 0.0 if since is None else time.perf_counter() - since

    async def submit(self, request: PolicyRequest) -> BatchedResult:
        """Queue a request and wait for its result. Raises the policy's error. A cancelled request is not computed."""
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def wait_idle(self) -> None:
        """Wait until no forward pass is running."""
        while self.running_since is not None:
            await self._idle.wait()

    async def call(self, function: Callable[[], None]) -> None:
        """Run a function between two forward passes, such as a swap of the policy."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def close(self) -> None:
        """Finish the running forward pass and cancel the requests in the queue."""
        self._task.cancel()
        await asyncio.wait([self._task])
        for waiting in self._waiting:
            waiting.future.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not self._waiting:
                self._arrived.clear()
            if batch:
                await self._forward(batch)

    def _next_batch(self) -> list[_Waiting]:
        """Take the next batch from the queue in order of arrival. Drops cancelled requests."""
        batch, remaining, large = [], deque(), 0
        for waiting in self._waiting:
            if waiting.future.done():
                continue
            observation = waiting.request.observation
            moments = (observation, *observation.past)
            size = sum(frame.nbytes for moment in moments for frame in (moment.frame, *moment.views.values()))
            fits = size <= self.small or large == 0 or large + size <= self.max_large
            if len(batch) == self.max_batch or not fits:
                remaining.append(waiting)
                continue
            batch.append(waiting)
            large += size if size > self.small else 0
        self._waiting = remaining
        return batch

    async def _forward(self, batch: list[_Waiting]) -> None:
        start = time.perf_counter()
        self.running_since = start
        self._idle.clear()
        loop = asyncio.get_running_loop()
        requests = [waiting.request for waiting in batch]
        try:
            chunks = await loop.run_in_executor(self._thread, self.policy.act_batch, requests)
        except Exception as error:  # any error of the policy: it goes to the clients, and the server keeps running
            if isinstance(error, ValueError) and len(batch) > 1:
                # The policy refused one of the requests, before it drew any random number: run them one by one.
                for waiting in batch:
                    await self._forward([waiting])
                return
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        finally:
            self.running_since = None
            self._idle.set()
        for waiting, chunk in zip(batch, chunks, strict=True):
            if not waiting.future.done():
                result = BatchedResult(chunk=chunk, queued=start - waiting.since, batch=len(batch))
                waiting.future.set_result(result)
