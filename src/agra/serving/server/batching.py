"""Requests of different clients, one forward: whatever waits when the policy is free goes into the next batch.

No timer holds a request back: while a forward runs others arrive, and that is the batch. A single request on an idle
server is answered at once.
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
    future: "asyncio.Future[Served]"
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A chunk, how long it waited for the policy (seconds) and how many were computed with it."""

    chunk: ActionChunk
    queued: float
    batch: int


class Batcher:
    """Runs a policy in a thread of its own, several requests at a time. For one event loop.

    Frames of more than `small` bytes count as large: a forward takes at most `max_large` bytes of them, and at least one
    frame, so that clients with small frames do not wait for many large ones.
    """

    def __init__(
        self, policy: BatchPolicy, *, max_batch: int = 16, small: int = 2**20, max_large: int = 16 * 2**20
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, got {max_batch}")
        self.policy, self.max_batch, self.small, self.max_large = policy, max_batch, small, max_large
        self.running_since: float | None = None
        self._waiting: deque[_Waiting] = deque()
        self._arrived, self._free = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def waiting(self) -> int:
        """Requests that no forward has begun with."""
        return len(self._waiting)

    @property
    def stuck_for(self) -> float:
        """Seconds since the running forward began, 0 between forwards."""
        since = self.running_since
        return 0.0 if since is None else time.perf_counter() - since

    async def submit(self, request: PolicyRequest) -> Served:
        """The policy's answer. Raises what the policy raises for this request; cancelled, it is not computed any more."""
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def rest(self) -> None:
        """Wait until no forward is running."""
        while self.running_since is not None:
            await self._free.wait()

    async def call(self, function: Callable[[], None]) -> None:
        """Run something between two forwards, such as a swap of the policy."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def close(self) -> None:
        """Finish the running forward; whoever still waits is cancelled."""
        self._task.cancel()
        await asyncio.wait([self._task])
        for waiting in self._waiting:
            waiting.future.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not self._waiting:
                self._arrived.clear()
            if batch:
                await self._forward(batch)

    def _take(self) -> list[_Waiting]:
        """The next batch, in order of arrival; requests whose client gave up are dropped."""
        batch, rest, large = [], deque(), 0
        for one in self._waiting:
            if one.future.done():
                continue
            size = one.request.observation.frame.nbytes
            fits = size <= self.small or large == 0 or large + size <= self.max_large
            if len(batch) == self.max_batch or not fits:
                rest.append(one)
                continue
            batch.append(one)
            large += size if size > self.small else 0
        self._waiting = rest
        return batch

    async def _forward(self, batch: list[_Waiting]) -> None:
        start = time.perf_counter()
        self.running_since = start
        self._free.clear()
        loop = asyncio.get_running_loop()
        try:
            chunks = await loop.run_in_executor(self._thread, self.policy.act_batch, [one.request for one in batch])
        except Exception as error:  # the policy's, of whatever kind: the server outlives it and the clients are told
            if isinstance(error, ValueError) and len(batch) > 1:
                # One of them does not fit the policy. It was found before anything was drawn: ask one by one.
                for one in batch:
                    await self._forward([one])
                return
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
            return
        finally:
            self.running_since = None
            self._free.set()
        for one, chunk in zip(batch, chunks, strict=True):
            if not one.future.done():
                one.future.set_result(Served(chunk=chunk, queued=start - one.since, batch=len(batch)))
