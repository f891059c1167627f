"""Robots for the control loop: the protocol, a simulator as a robot, and arms behind drivers of LeRobot's interface."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from agra.types import Embodiment, Observation, Simulator, Trial

log = logging.getLogger("agra.serving")


class Robot(Protocol):
    """A robot that takes one action per control step."""

    embodiment: Embodiment

    def connect(self) -> None:
        """Get ready to move."""
        ...

    def observe(self) -> Observation:
        """Read cameras and state."""
        ...

    def pose(self, observation: Observation) -> np.ndarray | None:
        """Return the action (D,) that keeps the robot in place, or None for a robot without one."""
        ...

    def command(self, action: np.ndarray) -> None:
        """Start to execute an action (D,)."""
        ...

    def hold(self) -> None:
        """Send no new command for a control step: the last one stays in effect."""
        ...

    def stop(self) -> None:
        """Come to rest safely. No command follows."""
        ...

    def disconnect(self) -> None:
        """Release the hardware, after `stop`."""
        ...


@runtime_checkable
class NamesCamera(Protocol):
    """A robot that names the camera of `Observation.frame`. Optional."""

    camera: str


class SimulatedRobot:
    """A simulator as a robot that does not wait for the policy: `command` and `hold` each advance it by a control step.

    State and action of the simulator must have the same meaning, as in the tabletop: positions, and targets for them.
    """

    def __init__(self, simulator: Simulator, trial: Trial) -> None:
        if simulator.embodiment.state_names != simulator.embodiment.action_names:
            raise ValueError(
                f"{simulator.embodiment.name}: expected the same names for state and action, without which it cannot "
                "hold"
            )
        self.simulator, self.trial = simulator, trial
        self.embodiment = simulator.embodiment
        self.succeeded = False
        self.states: list[np.ndarray] = []
        self._observation: Observation | None = None
        self._target = np.zeros(0, np.float32)

    def connect(self) -> None:
        """Set up the trial's scene."""
        self._observation = self.simulator.reset(self.trial)
        self._target = self._observation.state
        self.succeeded, self.states = False, [self._observation.state]

    def observe(self) -> Observation:
        """Return the present observation."""
        if self._observation is None:
            raise ValueError("robot: not connected; call connect() first")
        return self._observation

    def pose(self, observation: Observation) -> np.ndarray:
        """Return the state, which is also a target."""
        return observation.state

    def command(self, action: np.ndarray) -> None:
        """Advance a control step towards an action."""
        self._target = np.array(action, np.float32)
        self.hold()

    def hold(self) -> None:
        """Advance a control step towards the last target."""
        step = self.simulator.step(self._target)
        self._observation = step.observation
        self.succeeded |= step.success
        self.states.append(step.observation.state)

    def stop(self) -> None:
        """Do nothing: a simulator only moves when it is stepped."""

    def disconnect(self) -> None:
        """Forget the observation. The simulator stays open."""
        self._observation = None


class LeRobotArm:
    """An arm behind a driver of LeRobot's `Robot` interface: SO-100 and SO-101, Koch, ViperX and others.

    The driver has `connect`, `disconnect`, `get_observation` (a map with a number for each "<motor>.pos" and an image
    (H, W, 3) uint8 RGB for each camera), `send_action` (a map "<motor>.pos" to number) and `action_features`. State and
    action are the positions of `joints` in that order and in the driver's units. `camera` is that of the frame, and
    `extra_cameras` are the views. All must be those of the policy's training data.
    """

    def __init__(
        self,
        driver: Any,
        *,
        camera: str,
        instruction: str,
        embodiment: str,
        extra_cameras: Sequence[str] = (),
        joints: Sequence[str] | None = None,
    ) -> None:
        self.driver, self.camera, self.instruction = driver, camera, instruction
        self.extra_cameras = tuple(extra_cameras)
        if len({camera, *self.extra_cameras}) != 1 + len(self.extra_cameras):
            raise ValueError(f"extra_cameras: expected other cameras than {camera!r}, each once, got {extra_cameras}")
        available = list(driver.action_features)
        names = tuple(available if joints is None else joints)
        if missing := [name for name in names if name not in available]:
            raise ValueError(f"joints: the driver has no {missing[0]!r}; expected some of {', '.join(available)}")
        self.embodiment = Embodiment(name=embodiment, state_names=names, action_names=names)
        self._state: np.ndarray | None = None  # seen last
        self._moving = False  # from a command to `stop`

    def connect(self) -> None:
        """Connect the driver, which may ask for a calibration."""
        self.driver.connect()

    def observe(self) -> Observation:
        """Read the cameras' images and the joints. Raises ValueError for a driver without one of them."""
        values: Mapping[str, Any] = self.driver.get_observation()
        required = (self.camera, *self.extra_cameras, *self.embodiment.state_names)
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"driver: its observation has no {missing[0]!r}, only {', '.join(map(str, values))}")
        state = np.array([float(values[name]) for name in self.embodiment.state_names], np.float32)
        self._state = state
        return Observation(
            frame=np.asarray(values[self.camera]),
            views={name: np.asarray(values[name]) for name in self.extra_cameras},
            state=state,
            instruction=self.instruction,
            embodiment=self.embodiment.name,
        )

    def pose(self, observation: Observation) -> np.ndarray:
        """Return the present joint positions."""
        return observation.state

    def command(self, action: np.ndarray) -> None:
        """Send target positions. The driver's own `max_relative_target` still applies."""
        self._moving = True
        self.driver.send_action(dict(zip(self.embodiment.action_names, map(float, action), strict=True)))

    def hold(self) -> None:
        """Do nothing: servos keep their last target."""

    def stop(self) -> None:
        """Make the present position the target, so that the arm stops.

        Where the driver fails, for example because of a camera, the last position that it reported becomes the target.
        """
        if not self._moving:
            return
        try:
            target = self.observe().state
        except Exception:  # any error of the driver: the arm must stop
            if self._state is None:
                raise
            log.exception("the driver gave no position to stop at; the arm stops at the last one that it gave")
            target = self._state
        self.command(target)
        self._moving, self._state = False, None

    def disconnect(self) -> None:
        """Disconnect the driver."""
        self.driver.disconnect()
