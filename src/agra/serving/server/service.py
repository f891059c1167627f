"""A policy behind any number of protocols: batching, episodes, swaps of the policy, outcomes, metrics and stage
times.
"""

import asyncio
import ctypes
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agra.serving.protocol.messages import InferRequest
from agra.serving.protocol.wire import WireError
from agra.serving.server.batching import Batcher
from agra.serving.server.config import Limits
from agra.serving.server.policy_checks import (
    NotFinite,
    check_finite,
    check_policy,
    check_range,
    trained_ranges,
    warn_without_past,
)
from agra.types import ActionChunk, BatchPolicy, PolicyRequest, PolicySpec, WarmsUp

log = logging.getLogger("agra.serving")

INVALID = ("garbage", "refused")
"""Outcomes of invalid requests: bytes that are not a message, and requests that the server or the policy refuses."""
MAX_REPLY_DELAY = 1.0
"""Longest time that an error reply waits for the running forward pass to end, seconds."""
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Busy(TimeoutError):
    """The policy did not answer a request in time, or the server takes no more requests."""


def error_reply(error: Exception) -> tuple[str, str]:
    """Return the outcome of a request that raised `error`, and the message for its client."""
    outcomes = ((WireError, "garbage"), (Busy, "busy"), (ValueError, "refused"))
    for kind, outcome in outcomes:
        if isinstance(error, kind):
            return outcome, f"agra: {error}"
    log.error("the policy failed", exc_info=error)
    if isinstance(error, NotFinite):
        return "failed", f"agra: {error}; it was not sent"
    return "failed", "agra: the policy failed on this request; see the server's log"


class Episode:
    """State of a client between requests: its seed and the policy's random numbers."""

    def __init__(self, seed: int = 0, warnings: set[str] | None = None) -> None:
        self.seed = seed
        self.generation = -1  # before the first request of an episode
        self.state: Any = None
        self.warnings = set() if warnings is None else warnings
        """Warnings that were logged for the client's connection."""


class StageTimes:
    """Times of the last chunks by stage, milliseconds."""

    def __init__(self, window: int = 500, max_age: float = 1.0) -> None:
        self._times: dict[str, deque[float]] = {}
        self._window, self._max_age = window, max_age
        self._percentiles: dict[str, list[float]] = {}
        self._expires = 0.0

    def add(self, times: Mapping[str, float]) -> None:
        """Add the times of a chunk."""
        for stage, value in times.items():
            self._times.setdefault(stage, deque(maxlen=self._window)).append(value)

    def percentiles(self) -> dict[str, list[float]]:
        """Return [p50, p95] of each stage, at most `max_age` seconds old."""
        now = time.monotonic()
        if now >= self._expires:
            self._expires = now + self._max_age
            self._percentiles = {
                stage: [round(float(value), 3) for value in np.percentile(values, [50, 95])]
                for stage, values in self._times.items()
            }
        return self._percentiles


class LargeRequestSlots:
    """Slots for requests larger than a connection's share, first come, first served. Held from reading to response."""

    def __init__(self, slots: int) -> None:
        self._slots, self.in_use = asyncio.Semaphore(slots), 0

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *raised: object) -> None:
        self.release()

    async def acquire(self) -> None:
        """Wait for a slot."""
        await self._slots.acquire()
        self.in_use += 1

    def release(self) -> None:
        """Free a slot. After the last one, return freed memory to the system, which glibc would keep."""
        self._slots.release()
        self.in_use -= 1
        if not self.in_use and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            asyncio.get_running_loop().run_in_executor(None, trim, 0)


class PolicyService:
    """A policy behind any number of protocols. Create it inside the event loop that serves it."""

    def __init__(self, policy: BatchPolicy, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.spec: PolicySpec = policy.spec
        self.generation = 0
        self.draining = False
        self.large_slots = LargeRequestSlots(self.limits.large_requests)
        self.reloading = asyncio.Lock()
        self.active = 0
        """Requests that were read and not yet answered."""
        self.warm = not isinstance(policy, WarmsUp)
        """False while a policy is being compiled."""
        self.times = StageTimes()
        self.registry = CollectorRegistry()
        self._ranges = trained_ranges(policy)
        self._batcher = Batcher(
            policy, max_batch=self.limits.max_batch, small=self.limits.share, max_large=2 * self.limits.max_message
        )
        self._next_error_reply = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self.outcomes = Counter("agra_requests", "Requests by outcome", ["wire", "outcome"], registry=self.registry)
        self.connections = Gauge("agra_connections", "Open connections", registry=self.registry)
        self._seconds = Histogram(
            "agra_stage_seconds", "Time by stage", ["stage"], registry=self.registry, buckets=_BUCKETS
        )
        self._batch = Histogram(
            "agra_batch_size", "Requests in a forward pass", registry=self.registry, buckets=_BATCHES
        )
        waiting = Gauge("agra_waiting_requests", "Requests in the queue", registry=self.registry)
        waiting.set_function(lambda: self._batcher.waiting)
        swaps = Gauge("agra_policy_generation", "Swaps of the policy", registry=self.registry)
        swaps.set_function(lambda: self.generation)
        recompiles = Gauge("agra_policy_recompiles", "Compilations after the warm-up", registry=self.registry)
        recompiles.set_function(lambda: float(getattr(self._batcher.policy, "recompiles", 0)))

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now."""
        return self.warm and not self.draining and self._batcher.stuck_for < self.limits.stuck_after

    async def start(self) -> None:
        """Check the policy and warm it up, after which the service is ready. Raises ValueError for a policy that does
        not answer."""
        policy = self._batcher.policy
        await asyncio.to_thread(check_policy, policy)
        if isinstance(policy, WarmsUp):
            await self._batcher.call(partial(policy.warm_up, self.limits.max_batch))
        self.warm = True

    async def check(self, policy: BatchPolicy) -> None:
        """Check another policy on a blank observation of each embodiment while the present one serves.

        Raises any error of the policy, and ValueError for a chunk of the wrong shape, with numbers that are not finite,
        or later than `check_timeout`.
        """
        try:
            async with asyncio.timeout(self.limits.check_timeout):
                await asyncio.to_thread(check_policy, policy, self._batcher.policy)
        except TimeoutError as error:
            raise ValueError(f"policy {policy.spec.name}: no answer within {self.limits.check_timeout:g} s") from error

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark a request as being answered. Draining waits for the end of the block."""
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def infer(
        self, request: InferRequest, episode: Episode, *, decode_seconds: float = 0.0
    ) -> tuple[ActionChunk, dict[str, Any]]:
        """Compute the chunk of a request. Returns it with openpi's `server_timing`.

        The timing has the stages of this response and p50 and p95 of the last ones, in milliseconds. Raises Busy after
        `request_timeout`, ValueError for a request that the policy refuses, and any other error of the policy.
        """
        start = time.perf_counter()
        check_range(request, self._ranges, self.limits.input_stretch)
        if request.seed is not None:
            episode.seed, episode.generation = request.seed, -1
        if episode.generation >= 0:
            warn_without_past(request, self.spec, episode.warnings)
        if episode.generation != self.generation:
            episode.state, episode.generation = self._batcher.policy.episode(episode.seed), self.generation
        policy_request = PolicyRequest(
            observation=request.observation,
            episode=episode.state,
            continuation=request.continuation,
            imagine=request.imagine,
        )
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                result = await self._batcher.submit(policy_request)
        except TimeoutError as error:
            raise Busy(f"no answer within {self.limits.request_timeout:g} s; the policy is busy") from error
        check_finite(result.chunk)
        infer_seconds = time.perf_counter() - start
        stages = {
            "decode": decode_seconds,
            "queue": result.queued,
            **result.chunk.timings,
            "total": decode_seconds + infer_seconds,
        }
        for stage, seconds in stages.items():
            self._seconds.labels(stage).observe(seconds)
        self._batch.observe(result.batch)
        milliseconds = {f"{stage}_ms": round(1000 * seconds, 3) for stage, seconds in stages.items()}
        self.times.add(milliseconds)
        timing: dict[str, Any] = {"infer_ms": 1000 * infer_seconds, **milliseconds, "batch": result.batch}
        timing |= {"p50_p95": self.times.percentiles(), "policy": self.spec.name, "generation": self.generation}
        return result.chunk, timing

    async def record_outcome(self, wire: str, outcome: str) -> None:
        """Count the outcome of a request. Returns when its response may be sent.

        Error replies to invalid requests are limited to `bad_request_rate` and sent between forward passes. A client
        retries as soon as it gets the error, and parsing that retry would hold the GIL during a forward pass. An idle
        server answers an isolated error immediately.
        """
        self.outcomes.labels(wire, outcome).inc()
        if outcome not in INVALID or self.draining:
            return
        now = time.perf_counter()
        send_at = max(self._next_error_reply, now)
        self._next_error_reply = send_at + 1 / self.limits.bad_request_rate
        await asyncio.sleep(send_at - now)
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_REPLY_DELAY):
                await self._batcher.wait_idle()

    async def swap(self, policy: BatchPolicy) -> bool:
        """Serve another policy, which passed `check`, from the next forward pass on.

        Running episodes continue on it, restarted from their seeds. If the present policy can adopt the new weights, it
        does. Otherwise the new policy is warmed up and replaces it. Returns whether the sizes of states or actions or
        the past observations changed, so that clients must connect again.
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
        log.info("replaced policy %s by %s", before.name, after.name)
        return any(getattr(before, name) != getattr(after, name) for name in ("horizon", "embodiments", "past"))

    def metrics(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    async def drain(self, timeout: float) -> None:
        """Take no more requests and wait up to `timeout` seconds for the responses to those that were read."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests were still running after %g s", self.active, timeout)

    async def close(self) -> None:
        """Stop the policy's thread."""
        self.draining = True
        await self._batcher.close()
