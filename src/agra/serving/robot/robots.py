"""What a robot is to the control loop, a simulator as one, and a real arm through LeRobot's driver conventions."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from agra.types import Embodiment, Observation, Simulator, Trial


class Robot(Protocol):
    """A robot that takes one action a control step."""

    embodiment: Embodiment

    def connect(self) -> None:
        """Make ready to move."""
        ...

    def observe(self) -> Observation:
        """What it sees and feels now."""
        ...

    def pose(self, observation: Observation) -> np.ndarray | None:
        """The action (D,) that would keep it where it is; None where that cannot be said."""
        ...

    def command(self, action: np.ndarray) -> None:
        """Begin to execute an action (D,)."""
        ...

    def hold(self) -> None:
        """Stay: what it was last told still stands."""
        ...

    def stop(self) -> None:
        """Come to rest safely; nothing is commanded afterwards."""
        ...

    def disconnect(self) -> None:
        """Let go of it. After `stop`."""
        ...


class SimulatedRobot:
    """A simulator's world that does not wait: every control step passes in it, whether or not an action came.

    State and action of the simulator have to mean the same, as the tabletop's do: positions, and targets for them.
    """

    def __init__(self, simulator: Simulator, trial: Trial) -> None:
        if simulator.embodiment.state_names != simulator.embodiment.action_names:
            raise ValueError(f"{simulator.embodiment.name}: its state is no action, so it cannot be told to hold")
        self.simulator, self.trial = simulator, trial
        self.embodiment = simulator.embodiment
        self.succeeded = False
        self.states: list[np.ndarray] = []
        self._seen: Observation | None = None
        self._target = np.zeros(0, np.float32)

    def connect(self) -> None:
        """Set the trial's scene up."""
        self._seen = self.simulator.reset(self.trial)
        self._target = self._seen.state
        self.succeeded, self.states = False, [self._seen.state]

    def observe(self) -> Observation:
        """The world as it is."""
        if self._seen is None:
            raise ValueError("robot: connect() comes before anything else")
        return self._seen

    def pose(self, observation: Observation) -> np.ndarray:
        """The state is a target."""
        return observation.state

    def command(self, action: np.ndarray) -> None:
        """One control step towards an action."""
        self._target = np.array(action, np.float32)
        self.hold()

    def hold(self) -> None:
        """One control step towards the last target."""
        step = self.simulator.step(self._target)
        self._seen = step.observation
        self.succeeded |= step.success
        self.states.append(step.observation.state)

    def stop(self) -> None:
        """Nothing moves without steps."""

    def disconnect(self) -> None:
        """The simulator stays its owner's."""
        self._seen = None


class LeRobotArm:
    """An arm behind a driver that follows LeRobot's `Robot`: SO-100 and SO-101, Koch, ViperX and others.

    LeRobot's driver has `connect`, `disconnect`, `get_observation` (a map with a number for each "<motor>.pos" and a
    picture (H, W, 3) uint8 RGB for each camera), `send_action` (a map "<motor>.pos" to number) and `action_features`.
    State and action are the positions of `joints`, in that order, in the driver's units: the order and units of the
    dataset that the policy learned from.
    """

    def __init__(
        self, driver: Any, *, camera: str, instruction: str, embodiment: str, joints: Sequence[str] | None = None
    ) -> None:
        self.driver, self.camera, self.instruction = driver, camera, instruction
        known = list(driver.action_features)
        names = tuple(known if joints is None else joints)
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"joints: the driver has no {missing[0]!r}; it has {', '.join(known)}")
        self.embodiment = Embodiment(name=embodiment, state_names=names, action_names=names)
        self._last: np.ndarray | None = None

    def connect(self) -> None:
        """Connect the driver, which may ask for a calibration."""
        self.driver.connect()

    def observe(self) -> Observation:
        """The camera's picture and the joints. Raises ValueError where the driver gives others than it said."""
        found: Mapping[str, Any] = self.driver.get_observation()
        lacking = [name for name in (self.camera, *self.embodiment.state_names) if name not in found]
        if lacking:
            raise ValueError(f"driver: its observation lacks {lacking[0]!r}; it has {', '.join(map(str, found))}")
        state = np.array([float(found[name]) for name in self.embodiment.state_names], np.float32)
        return Observation(
            frame=np.asarray(found[self.camera]),
            state=state,
            instruction=self.instruction,
            embodiment=self.embodiment.name,
        )

    def pose(self, observation: Observation) -> np.ndarray:
        """Joints where they are."""
        return observation.state

    def command(self, action: np.ndarray) -> None:
        """Send target positions. The driver's own `max_relative_target` still applies."""
        self._last = np.array(action, np.float32)
        self.driver.send_action(dict(zip(self.embodiment.action_names, map(float, action), strict=True)))

    def hold(self) -> None:
        """Servos keep their last target by themselves."""

    def stop(self) -> None:
        """Make the present position the target, so that nothing goes on moving."""
        if self._last is not None:
            self.command(self.observe().state)

    def disconnect(self) -> None:
        """Disconnect the driver."""
        self.driver.disconnect()
