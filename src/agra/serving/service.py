"""What every wire of the server shares: a policy that can be swapped, episodes, metrics and stage times."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agra.serving.batching import Batcher
from agra.serving.messages import Question
from agra.serving.wire import WireError
from agra.types import ActionChunk, BatchPolicy, PolicyRequest, PolicySpec

log = logging.getLogger("agra.serving")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may cost. Sizes in bytes, times in seconds."""

    max_message: int = 8 * 2**20
    max_connections: int = 64
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
    stuck_after: float = 60.0
    """A forward that takes longer makes the server not ready."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")


class Busy(TimeoutError):
    """The policy did not get round to a request in time."""


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


class PolicyService:
    """A policy behind any number of wires. Make it inside the event loop that it serves."""

    def __init__(self, policy: BatchPolicy, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.spec: PolicySpec = policy.spec
        self.generation = 0
        self.draining = False
        self.times = StageTimes()
        self.registry = CollectorRegistry()
        self._batcher = Batcher(policy, max_batch=self.limits.max_batch)
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

    @property
    def ready(self) -> bool:
        """Whether a request made now would be answered."""
        return not self.draining and self._batcher.stuck_for < self.limits.stuck_after

    async def answer(
        self, question: Question, episode: Episode, *, decode: float = 0.0
    ) -> tuple[ActionChunk, dict[str, Any]]:
        """The chunk, and openpi's `server_timing` with the stages of this answer and p50 and p95 of the last ones, in ms.

        `decode` is how long reading the request took, seconds. Raises Busy after `request_timeout`, ValueError for what
        the policy cannot take, and whatever else the policy raises.
        """
        start = time.perf_counter()
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
        self._active += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                served = await self._batcher.submit(request)
        except TimeoutError as error:
            raise Busy(f"no answer within {self.limits.request_timeout:g} s; the policy is busy") from error
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
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

    async def settle(self, wire: str, outcome: str) -> None:
        """Count what became of a request; returns when its sender may be told.

        A bad request takes its turn at `bad_request_rate` and then waits for a pause between two forwards: whoever is
        told sends the next one, and reading it would keep the interpreter from the policy, whose forward is thousands
        of short calls. On an idle server a lone mistake is told at once.
        """
        self.outcomes.labels(wire, outcome).inc()
        if outcome not in BAD:
            return
        now = time.perf_counter()
        turn = max(self._bad_turn, now)
        self._bad_turn = turn + 1 / self.limits.bad_request_rate
        await asyncio.sleep(turn - now)
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_REST):
                await self._batcher.rest()

    async def swap(self, policy: BatchPolicy) -> bool:
        """Serve another policy from the next forward on; episodes begin anew on it, with their seeds.

        Answers whether clients have to learn a new spec: then their connections are to be closed.
        """
        before, after = self.spec, policy.spec

        def exchange() -> None:
            self._batcher.policy, self.spec = policy, after
            self.generation += 1

        await self._batcher.call(exchange)
        log.info("policy %s gave way to %s", before.name, after.name)
        return (before.horizon, before.embodiments) != (after.horizon, after.embodiments)

    def metrics(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)

    async def drain(self, timeout: float) -> None:
        """Take no more requests and wait for those that are running, at most `timeout` seconds."""
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
