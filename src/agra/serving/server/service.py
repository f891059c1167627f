"""What every wire of the server shares: a policy that can be swapped, episodes, metrics and stage times."""

import asyncio
import ctypes
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agra.serving.server.batching import Batcher
from agra.serving.protocol.messages import Question
from agra.serving.server.checks import NotFinite, check_answer, trained_ranges, try_out
from agra.serving.protocol.wire import WireError
from agra.types import ActionChunk, BatchPolicy, PolicyRequest, PolicySpec, WarmsUp

log = logging.getLogger("agra.serving")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may cost. Sizes in bytes, times in seconds."""

    max_message: int = 8 * 2**20
    """Of a whole request, however many frames or parts it comes in."""
    max_pending: int = 256 * 2**20
    """Of all requests that are being read or not yet answered, on both wires together. Half of it is split into equal
    shares, one a connection; requests larger than a share wait for room in the other half."""
    max_connections: int = 64
    """Of each wire."""
    max_batch: int = 16
    request_rate: float = 100.0
    """Requests a second of one client; a faster one waits."""
    max_bad_requests: int = 20
    """Bad requests in a row after which a connection is closed."""
    bad_request_rate: float = 100.0
    """Bad requests a second of all clients together; beyond that their senders wait, and nobody else does."""
    request_timeout: float = 30.0
    idle_timeout: float = 600.0
    send_timeout: float = 10.0
    """For a client that does not read its answer."""
    handshake_timeout: float = 10.0
    receive_timeout: float = 10.0
    """For the rest of a request larger than a connection's share, once there is room for it."""
    input_stretch: float = 10.0
    """How far states and continuations may lie outside the range of the training data, in widths of that range. Dimensions
    that never changed in training are not checked."""
    check_timeout: float = 120.0
    """For a new checkpoint's answer to a made-up observation, beside the policy that serves."""
    stuck_after: float = 60.0
    """A forward that takes longer makes the server not ready."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.max_pending < 2 * self.max_message:
            raise ValueError(
                f"max_pending: expected at least twice max_message, {2 * self.max_message}, got {self.max_pending}"
            )

    @property
    def share(self) -> int:
        """Bytes that every connection may always have pending."""
        return min(self.max_message, self.max_pending // (4 * self.max_connections))

    @property
    def large_requests(self) -> int:
        """Requests beyond a share that may be pending at a time."""
        return self.max_pending // 2 // self.max_message


class Busy(TimeoutError):
    """The policy did not get round to a request in time, or takes none."""


BAD = ("garbage", "refused")
"""Outcomes that the sender is to blame for."""
MAX_REST = 1.0
"""Seconds for which the sender of a bad request waits for a pause between two forwards."""


def failure(error: Exception) -> tuple[str, str]:
    """What became of a request that raised `error`, and what its client is told."""
    kinds = ((WireError, "garbage"), (Busy, "busy"), (ValueError, "refused"))  # refused by us, or by the policy itself
    for kind, outcome in kinds:
        if isinstance(error, kind):
            return outcome, f"agra: {error}"
    log.error("the policy failed", exc_info=error)
    if isinstance(error, NotFinite):
        return "failed", f"agra: {error}; it was not sent"
    return "failed", "agra: the policy failed on this request; the server's log says how"


class Episode:
    """What the server keeps of one client between requests: its seed and the policy's random numbers."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.generation = -1
        self.state: Any = None


class StageTimes:
    """The last chunks' times by stage, milliseconds."""

    def __init__(self, kept: int = 500, fresh: float = 1.0) -> None:
        self._kept: dict[str, deque[float]] = {}
        self._size, self._fresh = kept, fresh
        self._found: dict[str, list[float]] = {}
        self._until = 0.0

    def add(self, times: Mapping[str, float]) -> None:
        """Note one chunk's times."""
        for stage, value in times.items():
            self._kept.setdefault(stage, deque(maxlen=self._size)).append(value)

    def percentiles(self) -> dict[str, list[float]]:
        """Stage -> [p50, p95], at most `fresh` seconds old."""
        now = time.monotonic()
        if now >= self._until:
            self._until = now + self._fresh
            self._found = {
                stage: [round(float(value), 3) for value in np.percentile(values, [50, 95])]
                for stage, values in self._kept.items()
            }
        return self._found


class Room:
    """Room for requests beyond a connection's share, from their reading to their answer; who asks first enters first."""

    def __init__(self, places: int) -> None:
        self._places, self.taken = asyncio.Semaphore(places), 0

    async def __aenter__(self) -> None:
        await self._places.acquire()
        self.taken += 1

    async def __aexit__(self, *raised: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give a place back. The last one to leave returns the freed memory to the system, which glibc would keep."""
        self._places.release()
        self.taken -= 1
        if not self.taken and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            asyncio.get_running_loop().run_in_executor(None, trim, 0)


class PolicyService:
    """A policy behind any number of wires. Make it inside the event loop that it serves."""

    def __init__(self, policy: BatchPolicy, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.spec: PolicySpec = policy.spec
        self.generation = 0
        self.draining = False
        self.room = Room(self.limits.large_requests)
        self.reloading = asyncio.Lock()
        self._ranges = trained_ranges(policy)
        self.warm = not isinstance(policy, WarmsUp)
        """False while a policy is being compiled."""
        self.times = StageTimes()
        self.registry = CollectorRegistry()
        self._batcher = Batcher(
            policy,
            max_batch=self.limits.max_batch,
            small=self.limits.share,
            max_large=2 * self.limits.max_message,
        )
        self._active = 0
        self._bad_turn = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self.outcomes = Counter("agra_requests", "Requests by outcome", ["wire", "outcome"], registry=self.registry)
        self.connections = Gauge("agra_connections", "Open connections", registry=self.registry)
        self._seconds = Histogram(
            "agra_stage_seconds", "Time by stage", ["stage"], registry=self.registry, buckets=_BUCKETS
        )
        self._batch = Histogram("agra_batch_size", "Requests a forward", registry=self.registry, buckets=_BATCHES)
        waiting = Gauge("agra_waiting_requests", "Requests that no forward has begun with", registry=self.registry)
        waiting.set_function(lambda: self._batcher.waiting)
        swaps = Gauge("agra_policy_generation", "How often the policy was swapped", registry=self.registry)
        swaps.set_function(lambda: self.generation)
        recompiles = Gauge("agra_policy_recompiles", "Compilations after the warm-up", registry=self.registry)
        recompiles.set_function(lambda: float(getattr(self._batcher.policy, "recompiles", 0)))

    @property
    def ready(self) -> bool:
        """Whether a request made now would be answered."""
        return self.warm and not self.draining and self._batcher.stuck_for < self.limits.stuck_after

    async def start(self) -> None:
        """Try the policy out and warm it up; until then the service is not ready. Raises ValueError where it does not
        answer."""
        policy = self._batcher.policy
        await asyncio.to_thread(try_out, policy)
        if isinstance(policy, WarmsUp):
            await self._batcher.call(partial(policy.warm_up, self.limits.max_batch))
        self.warm = True

    async def check(self, policy: BatchPolicy) -> None:
        """Have a policy answer an observation of each embodiment, beside the one that serves. Raises what it raises, and
        ValueError for an answer of the wrong shape, not finite, or later than `check_timeout`."""
        try:
            async with asyncio.timeout(self.limits.check_timeout):
                await asyncio.to_thread(try_out, policy)
        except TimeoutError as error:
            raise ValueError(f"policy {policy.spec.name}: no answer within {self.limits.check_timeout:g} s") from error

    @contextmanager
    def working(self) -> Iterator[None]:
        """A request that was read and is not yet answered; draining waits for the end of the block."""
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def answer(
        self, question: Question, episode: Episode, *, decode: float = 0.0
    ) -> tuple[ActionChunk, dict[str, Any]]:
        """The chunk, and openpi's `server_timing` with the stages of this answer and p50 and p95 of the last ones, in ms.

        `decode` is how long reading the request took, seconds. Raises Busy after `request_timeout`, ValueError for what
        the policy cannot take, and whatever else the policy raises.
        """
        start = time.perf_counter()
        self._check_range(question)
        if question.seed is not None:
            episode.seed, episode.generation = question.seed, -1
        if episode.generation != self.generation:
            episode.state, episode.generation = self._batcher.policy.episode(episode.seed), self.generation
        request = PolicyRequest(
            observation=question.observation,
            episode=episode.state,
            continuation=question.continuation,
            imagine=question.imagine,
        )
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                served = await self._batcher.submit(request)
        except TimeoutError as error:
            raise Busy(f"no answer within {self.limits.request_timeout:g} s; the policy is busy") from error
        check_answer(served.chunk)
        infer = time.perf_counter() - start
        stages = {"decode": decode, "queue": served.queued, **served.chunk.timings, "total": decode + infer}
        for stage, seconds in stages.items():
            self._seconds.labels(stage).observe(seconds)
        self._batch.observe(served.batch)
        milliseconds = {f"{stage}_ms": round(1000 * seconds, 3) for stage, seconds in stages.items()}
        self.times.add(milliseconds)
        timing: dict[str, Any] = {"infer_ms": 1000 * infer, **milliseconds, "batch": served.batch}
        timing |= {"p50_p95": self.times.percentiles(), "policy": self.spec.name, "generation": self.generation}
        return served.chunk, timing

    def _check_range(self, question: Question) -> None:
        ranges = self._ranges.get(question.observation.embodiment)
        if ranges is None:
            return
        ranges["state"].check("state", question.observation.state, self.limits.input_stretch)
        if question.continuation is not None:
            ranges["action"].check("continuation", question.continuation.actions, self.limits.input_stretch)

    async def settle(self, wire: str, outcome: str) -> None:
        """Count what became of a request; returns when its sender may be told.

        A bad request takes its turn at `bad_request_rate` and then waits for a pause between two forwards: whoever is
        told sends the next one, and reading it would keep the interpreter from the policy, whose forward is thousands
        of short calls. On an idle server a lone mistake is told at once.
        """
        self.outcomes.labels(wire, outcome).inc()
        if outcome not in BAD or self.draining:
            return
        now = time.perf_counter()
        turn = max(self._bad_turn, now)
        self._bad_turn = turn + 1 / self.limits.bad_request_rate
        await asyncio.sleep(turn - now)
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_REST):
                await self._batcher.rest()

    async def swap(self, policy: BatchPolicy) -> bool:
        """Serve another policy, which passed `check`, from the next forward on; episodes begin anew on it, with their seeds.

        The one that serves adopts its weights where it can; else the new one is warmed up before it takes over. Answers
        whether clients have to learn a new spec: then their connections are to be closed.
        """
        before, after = self.spec, policy.spec

        def exchange() -> None:
            current = self._batcher.policy
            if not (isinstance(current, WarmsUp) and current.adopt(policy)):
                if isinstance(policy, WarmsUp):
                    self.warm = False
                    policy.warm_up(self.limits.max_batch)
                self._batcher.policy = policy
            self.spec, self._ranges = after, trained_ranges(policy)
            self.generation += 1

        try:
            await self._batcher.call(exchange)
        finally:
            self.warm = True
        log.info("policy %s gave way to %s", before.name, after.name)
        return (before.horizon, before.embodiments) != (after.horizon, after.embodiments)

    def metrics(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    async def drain(self, timeout: float) -> None:
        """Take no more requests and wait for those that were read to be answered, at most `timeout` seconds."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests were still running after %g s", self._active, timeout)

    async def close(self) -> None:
        """Stop the policy's thread."""
        self.draining = True
        await self._batcher.close()


_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def check_key(key: str | None) -> bytes | None:
    """A server's key as its clients send it, without spaces around it. Raises ValueError for one that no header can carry."""
    if key is None:
        return None
    if not key.strip():
        raise ValueError("API key: expected some characters, got none; unset it to serve without")
    if not key.isascii() or not key.strip().isprintable():
        raise ValueError("API key: expected printable ASCII characters, which every client sends alike")
    return key.strip().encode("ascii")
