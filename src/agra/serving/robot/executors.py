"""Executors: turn chunks into a robot's actions while inference takes time, one decision per control step.

At every control step an executor gets the newest observation and returns a command: an action, or None if it has none
for this step, in which case the robot holds. Inference runs in a thread (`ThreadedInference`), or in simulated time
with a latency in control steps (`DelayedInference`), which is the same on a busy machine.
"""

import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from agra.types import ActionChunk, Continuation, Observation, Policy, past_of, with_past


class Inference(Protocol):
    """Requests to a policy, one at a time, with results that arrive later."""

    past: tuple[int, ...]
    """Control steps before the present one whose observations the policy reads. Empty until its first request."""

    @property
    def busy(self) -> bool:
        """Whether a request is pending."""
        ...

    def reset(self, seed: int) -> None:
        """Begin an episode. Drops the result of a pending request."""
        ...

    def submit(self, observation: Observation, continuation: Continuation | None) -> None:
        """Start a request. Only valid when not busy."""
        ...

    def poll(self) -> ActionChunk | None:
        """Return the result once, or None until it has arrived. Raises the policy's error."""
        ...

    def tick(self) -> None:
        """End a control step."""
        ...


def _act(policy: Policy, observation: Observation, continuation: Continuation | None) -> ActionChunk:
    # Only real-time chunking passes a continuation. The other executors work with policies that do not take one.
    if continuation is None:
        return policy.act(observation)
    return policy.act(observation, continuation=continuation)  # type: ignore[call-arg]


class ThreadedInference:
    """Runs a policy in a thread, in real time."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.past = policy, ()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self._result: Future[ActionChunk] | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is pending."""
        return self._result is not None

    def reset(self, seed: int) -> None:
        """Begin an episode after the running request, whose result is dropped."""
        self._result = None
        self._thread.submit(self.policy.reset, seed)

    def submit(self, observation: Observation, continuation: Continuation | None) -> None:
        """Start a request. Only valid when not busy."""
        assert not self.busy
        self._result = self._thread.submit(self._act, observation, continuation)

    def _act(self, observation: Observation, continuation: Continuation | None) -> ActionChunk:
        self.past = past_of(self.policy)  # here, as it may connect to a server
        return _act(self.policy, observation, continuation)

    def poll(self) -> ActionChunk | None:
        """Return the result once, or None until it has arrived. Raises the policy's error."""
        result = self._result
        if result is None or not result.done():
            return None
        self._result = None
        return result.result()

    def tick(self) -> None:
        """Do nothing: real time passes without it."""

    def close(self) -> None:
        """End the thread after the running request."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class DelayedInference:
    """Runs a policy in simulated time: a result arrives `delay` control steps after its request."""

    def __init__(self, policy: Policy, delay: int) -> None:
        if delay < 0:
            raise ValueError(f"delay: expected at least 0 control steps, got {delay}")
        self.policy, self.delay, self.past = policy, delay, ()
        self._result: ActionChunk | None = None
        self._left = 0

    @property
    def busy(self) -> bool:
        """Whether a request is pending."""
        return self._result is not None

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self._result = None
        self.policy.reset(seed)

    def submit(self, observation: Observation, continuation: Continuation | None) -> None:
        """Compute the result at once and keep it for `delay` control steps. Only valid when not busy."""
        assert not self.busy
        self.past = past_of(self.policy)
        self._result, self._left = _act(self.policy, observation, continuation), self.delay

    def poll(self) -> ActionChunk | None:
        """Return the result once, or None until it has arrived."""
        if self._left > 0:
            return None
        result, self._result = self._result, None
        return result

    def tick(self) -> None:
        """End a control step."""
        self._left -= 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Command:
    """Decision of a control step: `action` (D,), or None to hold."""

    action: np.ndarray | None
    age: int = 0  # control steps since the action's observation
    delay: int | None = None  # control steps from request to arrival, if a chunk arrived at this step
    timings: Mapping[str, float] | None = None  # of that chunk
    error: str | None = None  # of a failed request


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    actions: np.ndarray  # (K, D)
    requested: int  # control step of its observation
    arrived: int  # control step
    timings: Mapping[str, float]


class Executor:
    """Requests and receives chunks, and counts control steps. Subclasses decide when to request and what to execute."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self.inference.reset(seed)
        self._now, self._requested = 0, 0
        self._earlier: list[Observation] = []  # of this episode, as many as the policy reads
        self._chunks: list[_Chunk] = []

    def step(self, observation: Observation) -> Command:
        """Return the command of this control step. Raises ValueError if the policy refuses the observation.

        If the policy is unreachable (OSError, such as `ServerLost`), the request is repeated at the next step.
        Meanwhile the rest of the last chunk is executed.
        """
        arrived, error = None, None
        try:
            arrived = self._receive()
            if not self.inference.busy and self._request_due():
                self._requested = self._now
                seen = with_past(observation, self._earlier, self.inference.past)
                self.inference.submit(seen, self._continuation())
                arrived = self._receive() or arrived  # without latency the chunk arrives at once
        except OSError as lost:
            error = f"{lost}"
        action, age = self._current_action()
        command = Command(
            action=action,
            age=age,
            delay=None if arrived is None else arrived.arrived - arrived.requested,
            timings=None if arrived is None else arrived.timings,
            error=error,
        )
        self._now += 1
        depth = -min(self.inference.past, default=0)
        self._earlier = [*self._earlier, observation][-depth:] if depth else []
        self.inference.tick()
        return command

    def _receive(self) -> _Chunk | None:
        result = self.inference.poll()
        if result is None:
            return None
        chunk = _Chunk(actions=result.actions, requested=self._requested, arrived=self._now, timings=result.timings)
        self._chunks.append(chunk)
        return chunk

    def _request_due(self) -> bool:
        """Whether to request another chunk at this step."""
        raise NotImplementedError

    def _current_action(self) -> tuple[np.ndarray | None, int]:
        """Return the action of this control step, or None, and its age."""
        raise NotImplementedError

    def _continuation(self) -> Continuation | None:
        return None


class Synchronous(Executor):
    """Executes `execute_steps` actions of a chunk, then holds until the next chunk arrives (receding horizon).

    With `execute_steps` of at least the chunk's length, executes all of it.
    """

    def __init__(self, inference: Inference, *, execute_steps: int) -> None:
        self.execute_steps = _positive("execute_steps", execute_steps)
        super().__init__(inference)

    def _used_up(self) -> bool:
        if not self._chunks:
            return True
        chunk = self._chunks[-1]
        return self._now - chunk.arrived >= min(self.execute_steps, len(chunk.actions))

    def _request_due(self) -> bool:
        return self._used_up()

    def _current_action(self) -> tuple[np.ndarray | None, int]:
        if self._used_up():
            return None, 0
        chunk = self._chunks[-1]
        self._chunks = [chunk]
        return chunk.actions[self._now - chunk.arrived], self._now - chunk.requested


class Asynchronous(Executor):
    """Requests the next chunk after `execute_steps` steps, continues the present one and switches when the next
    arrives.

    Each action belongs to a control step, so the first d actions of a chunk that took d steps are skipped.
    """

    def __init__(self, inference: Inference, *, execute_steps: int) -> None:
        self.execute_steps = _positive("execute_steps", execute_steps)
        super().__init__(inference)

    def _request_due(self) -> bool:
        return not self._chunks or self._now - self._chunks[-1].requested >= self.execute_steps

    def _current_action(self) -> tuple[np.ndarray | None, int]:
        if not self._chunks:
            return None, 0
        chunk = self._chunks[-1]
        self._chunks = [chunk]
        index = self._now - chunk.requested
        return (chunk.actions[index], index) if index < len(chunk.actions) else (None, index)


class RealTimeChunking(Asynchronous):
    """Asynchronous execution in which a new chunk continues the present one (real-time chunking, arXiv 2506.07339).

    The delay in a request is the longest of the last `delay_window` ones, as in the paper's algorithm 1.
    """

    def __init__(self, inference: Inference, *, execute_steps: int, delay_window: int = 10) -> None:
        self._delays: deque[int] = deque([1], maxlen=_positive("delay_window", delay_window))
        self._last_counted = -1
        super().__init__(inference, execute_steps=execute_steps)

    def reset(self, seed: int) -> None:
        """Begin an episode. Measured delays are kept."""
        super().reset(seed)
        self._last_counted = -1

    def _continuation(self) -> Continuation | None:
        if not self._chunks:
            return None
        chunk = self._chunks[-1]
        if chunk.requested > self._last_counted:
            self._delays.append(chunk.arrived - chunk.requested)
            self._last_counted = chunk.requested
        remaining = chunk.actions[self._now - chunk.requested :]
        if not len(remaining):
            return None
        return Continuation(actions=remaining, delay=min(max(self._delays), len(remaining)))


class TemporalEnsemble(Executor):
    """Requests a chunk whenever inference is free, and executes the average of all chunks that cover this step.

    ACT's weights: exp(-decay * i), with i counted from the oldest chunk (arXiv 2304.13705, algorithm 2).
    """

    def __init__(self, inference: Inference, *, decay: float = 0.01) -> None:
        if not math.isfinite(decay):
            raise ValueError(f"decay: expected a number, got {decay}")
        self.decay = decay
        super().__init__(inference)

    def _request_due(self) -> bool:
        return True

    def _current_action(self) -> tuple[np.ndarray | None, int]:
        self._chunks = [chunk for chunk in self._chunks if self._now - chunk.requested < len(chunk.actions)]
        if not self._chunks:
            return None, 0
        actions = np.stack([chunk.actions[self._now - chunk.requested] for chunk in self._chunks])
        weights = np.exp(-self.decay * np.arange(len(actions)))
        average = (weights[:, None] * actions).sum(0) / weights.sum()
        return average.astype(np.float32), self._now - self._chunks[-1].requested


EXECUTORS = ("synchronous", "asynchronous", "ensemble", "rtc")


def make_executor(name: str, inference: Inference, *, execute_steps: int) -> Executor:
    """Create one of `EXECUTORS` by name. Raises ValueError for another name."""
    if name == "synchronous":
        return Synchronous(inference, execute_steps=execute_steps)
    if name == "asynchronous":
        return Asynchronous(inference, execute_steps=execute_steps)
    if name == "rtc":
        return RealTimeChunking(inference, execute_steps=execute_steps)
    if name == "ensemble":
        return TemporalEnsemble(inference)
    raise ValueError(f"executor: expected one of {', '.join(EXECUTORS)}, got {name!r}")


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value
