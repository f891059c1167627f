"""How chunks become a robot's actions while inference takes time: one decision a control step.

An executor is asked at every control step with the newest observation and says what the robot is told, or None where it
has nothing that belongs to this step: the robot then holds. Inference runs beside it (`ThreadedInference`), or in
simulated time with a latency of so many control steps (`DelayedInference`), which no busy machine disturbs.
"""

import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from agra.types import ActionChunk, Continuation, Observation, Policy


class Inference(Protocol):
    """One request to a policy at a time, answered later."""

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        ...

    def reset(self, seed: int) -> None:
        """Begin an episode; an answer that is on its way is forgotten."""
        ...

    def ask(self, observation: Observation, continuation: Continuation | None) -> None:
        """Begin. Only when not busy."""
        ...

    def take(self) -> ActionChunk | None:
        """The answer, once; None until it is there. Raises what the policy raised."""
        ...

    def tick(self) -> None:
        """A control step is over."""
        ...


def _call(policy: Policy, observation: Observation, continuation: Continuation | None) -> ActionChunk:
    # Only executors that need it ask to continue, and any policy serves the others.
    if continuation is None:
        return policy.act(observation)
    return policy.act(observation, continuation=continuation)  # type: ignore[call-arg]


class ThreadedInference:
    """A policy in a thread of its own, in real time."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self._answer: Future[ActionChunk] | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self._answer is not None

    def reset(self, seed: int) -> None:
        """Begin an episode, after what is still running."""
        self._answer = None
        self._thread.submit(self.policy.reset, seed)

    def ask(self, observation: Observation, continuation: Continuation | None) -> None:
        """Begin. Only when not busy."""
        assert not self.busy
        self._answer = self._thread.submit(_call, self.policy, observation, continuation)

    def take(self) -> ActionChunk | None:
        """The answer, once; None until it is there. Raises what the policy raised."""
        answer = self._answer
        if answer is None or not answer.done():
            return None
        self._answer = None
        return answer.result()

    def tick(self) -> None:
        """Time passes by itself."""

    def close(self) -> None:
        """Let the thread end after what it is doing."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class DelayedInference:
    """A policy whose answers arrive `delay` control steps after the question, in simulated time."""

    def __init__(self, policy: Policy, delay: int) -> None:
        if delay < 0:
            raise ValueError(f"delay: expected control steps from 0, got {delay}")
        self.policy, self.delay = policy, delay
        self._answer: ActionChunk | None = None
        self._left = 0

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self._answer is not None

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self._answer = None
        self.policy.reset(seed)

    def ask(self, observation: Observation, continuation: Continuation | None) -> None:
        """Compute at once, answer later."""
        assert not self.busy
        self._answer, self._left = _call(self.policy, observation, continuation), self.delay

    def take(self) -> ActionChunk | None:
        """The answer, once; None until it is there."""
        if self._left > 0:
            return None
        answer, self._answer = self._answer, None
        return answer

    def tick(self) -> None:
        """A control step is over."""
        self._left -= 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Command:
    """What the robot is told at a control step: `action` (D,), or None to hold."""

    action: np.ndarray | None
    age: int = 0  # control steps since the observation that the action comes from
    delay: int | None = None  # where a chunk arrived at this step: control steps since it was asked for
    timings: Mapping[str, float] | None = None  # and its timings
    error: str | None = None  # where inference failed


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    actions: np.ndarray  # (K, D)
    asked: int  # control step of its observation
    arrived: int


class Executor:
    """The common part: asks, receives, counts control steps. Subclasses say when to ask and what to execute."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self.inference.reset(seed)
        self._now, self._asked = 0, 0
        self._chunks: list[_Chunk] = []

    def step(self, observation: Observation) -> Command:
        """What the robot is told now. Raises ValueError where the policy refuses the observation.

        A policy that cannot be reached (OSError, such as `ServerLost`) is asked again at the next step; meanwhile what
        is left of its last chunk is executed.
        """
        arrived, error = None, None
        try:
            arrived = self._receive()
            if not self.inference.busy and self._wants():
                self._asked = self._now
                self.inference.ask(observation, self._continuation())
                arrived = self._receive() or arrived  # without latency it is there at once
        except OSError as lost:
            error = f"{lost}"
        action, age = self._choose()
        command = Command(
            action=action,
            age=age,
            delay=None if arrived is None else self._now - self._chunks[-1].asked,
            timings=None if arrived is None else arrived.timings,
            error=error,
        )
        self._now += 1
        self.inference.tick()
        return command

    def _receive(self) -> ActionChunk | None:
        chunk = self.inference.take()
        if chunk is not None:
            self._chunks.append(_Chunk(actions=chunk.actions, asked=self._asked, arrived=self._now))
        return chunk

    def _wants(self) -> bool:
        """Whether it is time to ask for another chunk."""
        raise NotImplementedError

    def _choose(self) -> tuple[np.ndarray | None, int]:
        """The action of this control step, or None, and its age."""
        raise NotImplementedError

    def _continuation(self) -> Continuation | None:
        return None


class Synchronous(Executor):
    """Execute `execute_steps` actions of a chunk, stand still until the next one is there, go on: receding horizon.

    With `execute_steps` as large as the chunk, the whole of it.
    """

    def __init__(self, inference: Inference, *, execute_steps: int) -> None:
        self.execute_steps = _positive("execute_steps", execute_steps)
        super().__init__(inference)

    def _used_up(self) -> bool:
        if not self._chunks:
            return True
        chunk = self._chunks[-1]
        return self._now - chunk.arrived >= min(self.execute_steps, len(chunk.actions))

    def _wants(self) -> bool:
        return self._used_up()

    def _choose(self) -> tuple[np.ndarray | None, int]:
        if self._used_up():
            return None, 0
        chunk = self._chunks[-1]
        self._chunks = [chunk]
        return chunk.actions[self._now - chunk.arrived], self._now - chunk.asked


class Asynchronous(Executor):
    """Ask for the next chunk when `execute_steps` of one have passed, execute on meanwhile, switch when it arrives.

    An action belongs to a control step: of a chunk that took d steps the first d are never executed.
    """

    def __init__(self, inference: Inference, *, execute_steps: int) -> None:
        self.execute_steps = _positive("execute_steps", execute_steps)
        super().__init__(inference)

    def _wants(self) -> bool:
        return not self._chunks or self._now - self._chunks[-1].asked >= self.execute_steps

    def _choose(self) -> tuple[np.ndarray | None, int]:
        if not self._chunks:
            return None, 0
        chunk = self._chunks[-1]
        self._chunks = [chunk]
        index = self._now - chunk.asked
        return (chunk.actions[index], index) if index < len(chunk.actions) else (None, index)


class RealTimeChunking(Asynchronous):
    """Asynchronous, and the new chunk is made to continue the one that is being executed.             2506.07339

    The delay that the policy is told is the longest of the last `remembered` ones, as in the paper's algorithm 1.
    """

    def __init__(self, inference: Inference, *, execute_steps: int, first_delay: int = 1, remembered: int = 10) -> None:
        self._delays: deque[int] = deque([first_delay], maxlen=_positive("remembered", remembered))
        self._counted = -1
        super().__init__(inference, execute_steps=execute_steps)

    def reset(self, seed: int) -> None:
        """Begin an episode; what is known of the delay stays."""
        super().reset(seed)
        self._counted = -1

    def _continuation(self) -> Continuation | None:
        if not self._chunks:
            return None
        chunk = self._chunks[-1]
        if chunk.asked > self._counted:
            self._delays.append(chunk.arrived - chunk.asked)
            self._counted = chunk.asked
        rest = chunk.actions[self._now - chunk.asked :]
        return Continuation(actions=rest, delay=min(max(self._delays), len(rest))) if len(rest) else None


class TemporalEnsemble(Executor):
    """Ask at every control step that inference allows; execute the average of all chunks that speak of this step.

    ACT's weights: exp(-decay * i), i counting from the oldest chunk (arXiv 2304.13705, algorithm 2).
    """

    def __init__(self, inference: Inference, *, decay: float = 0.01) -> None:
        if not math.isfinite(decay):
            raise ValueError(f"decay: expected a number, got {decay}")
        self.decay = decay
        super().__init__(inference)

    def _wants(self) -> bool:
        return True

    def _choose(self) -> tuple[np.ndarray | None, int]:
        self._chunks = [chunk for chunk in self._chunks if self._now - chunk.asked < len(chunk.actions)]
        if not self._chunks:
            return None, 0
        actions = np.stack([chunk.actions[self._now - chunk.asked] for chunk in self._chunks])
        weights = np.exp(-self.decay * np.arange(len(actions)))
        average = (weights[:, None] * actions).sum(0) / weights.sum()
        return average.astype(np.float32), self._now - self._chunks[-1].asked


EXECUTORS = ("synchronous", "asynchronous", "ensemble", "rtc")


def make_executor(name: str, inference: Inference, *, execute_steps: int) -> Executor:
    """An executor by name, see `EXECUTORS`. Raises ValueError for another name."""
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
