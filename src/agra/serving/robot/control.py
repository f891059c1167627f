"""The control loop: observe, decide, limit, command and record at every control step.

The robot always comes to rest.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from agra.serving.robot.executors import Command, Executor
from agra.serving.robot.robots import Robot
from agra.types import Observation

OVERRUN = 0.5
"""Fraction of a period by which a control step may be late before it counts as an overrun. Also the shortest time
between two commands."""
ROUNDING = 1e-6  # seconds


@dataclass(frozen=True, kw_only=True)
class ActionLimits:
    """Limits on the commands of a robot, each a number per dimension or one for all. None applies no limit."""

    low: Sequence[float] | float | None = None
    high: Sequence[float] | float | None = None
    max_step: Sequence[float] | float | None = None  # largest change from one control step to the next

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and np.any(np.asarray(self.low) > np.asarray(self.high)):
            raise ValueError(f"limits: low {self.low} is above high {self.high}")
        if self.max_step is not None and np.any(np.asarray(self.max_step) <= 0):
            raise ValueError(f"limits: max_step must be positive, got {self.max_step}")

    def apply(self, action: np.ndarray, last: np.ndarray | None) -> np.ndarray:
        """Return the nearest action (D,) within the limits after the action `last`."""
        limited = np.array(action, np.float32)
        if self.max_step is not None and last is not None:
            limited = np.clip(limited, last - np.asarray(self.max_step), last + np.asarray(self.max_step))
        if self.low is not None or self.high is not None:
            limited = np.clip(limited, self.low, self.high)
        return limited.astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlStep:
    """Record of a control step."""

    observation: Observation
    command: Command
    action: np.ndarray  # (D,) the command, or the last one while holding; (0,) before the first
    held: bool
    sent: bool  # false while holding and in a dry run
    clipped: bool
    late: float  # seconds by which the step began late; 0 in simulated time


class Recorder(Protocol):
    """Keeps control steps."""

    def begin_episode(self) -> None:
        """Begin an episode, with which a run of the loop starts."""
        ...

    def add(self, step: ControlStep) -> None:
        """Add a step."""
        ...


@dataclass(kw_only=True)
class ControlReport:
    """Summary of a run of the loop. `delays` are control steps from the request for a chunk to its arrival."""

    steps: int = 0
    held: int = 0
    clipped: int = 0
    errors: int = 0
    overruns: int = 0  # control steps that began more than half a period late
    stopped: str | None = None  # why the loop ended early
    delays: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """When the robot holds instead of executing the policy's actions. Seconds."""

    max_age: float = 3.0
    """Largest age of an action's observation, by the clock. The robot holds instead of executing an older action."""
    stop_after: float | None = None
    """Duration of holding that ends the run. None: hold until the policy is back."""

    def __post_init__(self) -> None:
        for name in ("max_age", "stop_after"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected seconds above 0, got {value}")


def control(
    robot: Robot,
    executor: Executor,
    *,
    fps: float,
    steps: int,
    seed: int = 0,
    limits: ActionLimits | None = None,
    watchdog: Watchdog | None = None,
    dry_run: bool = False,
    real_time: bool = True,
    recorder: Recorder | None = None,
    until: Callable[[], bool] | None = None,
) -> ControlReport:
    """Run a connected robot for `steps` control steps at `fps` per second. It is at rest when this returns or raises.

    With `dry_run` everything happens except the commands. Without `real_time` the steps follow each other at once, for
    simulated time. Each run is an episode of the `recorder`. `until` ends the run early. Raises ValueError when the
    policy refuses an observation.
    """
    if not fps > 0 or steps < 1:
        raise ValueError(f"control: expected a positive rate and at least 1 step, got {fps} and {steps}")
    if recorder is not None:
        recorder.begin_episode()
    limits, watchdog, report = limits or ActionLimits(), watchdog or Watchdog(), ControlReport()
    clock = _RealTime(fps) if real_time else _SimulatedTime(fps)
    try:
        executor.reset(seed)
        last: np.ndarray | None = None
        held_since: float | None = None
        observed_at: list[float] = []  # time of each step's observation
        for _ in range(steps):
            late = clock.next_step()
            observation = robot.observe()
            observed_at.append(clock.now())
            last = robot.pose(observation) if last is None else last
            command = executor.step(observation)
            age = clock.now() - observed_at[-1 - command.age]
            action, held, clipped = _decide(command, age, limits, watchdog, last)
            sent = not held and not dry_run
            if sent:
                robot.command(action)
                last = action
            else:
                robot.hold()
            clock.commanded()
            if recorder is not None:
                step = ControlStep(
                    observation=observation,
                    command=command,
                    action=action,
                    held=held,
                    sent=sent,
                    clipped=clipped,
                    late=late,
                )
                recorder.add(step)
            _count(report, command, held=held, clipped=clipped, overrun=late > OVERRUN / fps)
            if not held:
                held_since = None
            elif held_since is None:
                held_since = observed_at[-1]
            if until is not None and until():
                break
            held_for = 0.0 if held_since is None else clock.now() + 1 / fps - held_since
            if watchdog.stop_after is not None and held_for > watchdog.stop_after - ROUNDING:
                report.stopped = f"held for {watchdog.stop_after:g} s: {command.error or 'no answer from the policy'}"
                break
    finally:
        robot.stop()
    return report


class _RealTime:
    """Control steps by the clock. After a stall the schedule moves: lost steps are not made up for in a burst."""

    def __init__(self, fps: float) -> None:
        self._period = 1 / fps
        self._due = time.perf_counter()
        self._earliest = self._due

    def now(self) -> float:
        return time.perf_counter()

    def next_step(self) -> float:
        """Sleep until the next step. Returns by how many seconds it is late."""
        time.sleep(max(0.0, max(self._due, self._earliest) - self.now()))
        now = self.now()
        late = max(0.0, now - self._due)
        self._due = (now if late > OVERRUN * self._period else self._due) + self._period
        return late

    def commanded(self) -> None:
        """Keep a distance from this command to the next. Without it, limits on the change per step would not hold."""
        self._earliest = self.now() + OVERRUN * self._period


class _SimulatedTime:
    """Control steps that follow each other at once."""

    def __init__(self, fps: float) -> None:
        self._fps, self._step = fps, -1

    def now(self) -> float:
        return self._step / self._fps

    def next_step(self) -> float:
        self._step += 1
        return 0.0

    def commanded(self) -> None:
        pass


def _decide(
    command: Command, age: float, limits: ActionLimits, watchdog: Watchdog, last: np.ndarray | None
) -> tuple[np.ndarray, bool, bool]:
    """Return the action, whether to hold instead of executing it, and whether the limits changed it."""
    if command.action is None or not np.isfinite(command.action).all() or age > watchdog.max_age + ROUNDING:
        return np.zeros(0, np.float32) if last is None else last, True, False
    action = limits.apply(command.action, last)
    return action, False, not np.array_equal(action, np.asarray(command.action, np.float32))


def _count(report: ControlReport, command: Command, *, held: bool, clipped: bool, overrun: bool) -> None:
    report.steps += 1
    report.held += held
    report.clipped += clipped
    report.errors += command.error is not None
    report.overruns += overrun
    if command.delay is not None:
        report.delays.append(command.delay)
