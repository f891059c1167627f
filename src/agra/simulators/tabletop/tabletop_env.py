"""`Tabletop`: the bundled simulator as an `agra.types.Simulator`, 10 control steps a second."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from agra.simulators.tabletop.goals import GOALS, PickAndPlace
from agra.simulators.tabletop.hands import HAND_MODELS
from agra.simulators.tabletop.rendering import Renderer
from agra.simulators.tabletop.scene import Scene
from agra.simulators.tabletop.tabletop_tasks import trials as regime_trials
from agra.types import NO_FRAME, REGIMES, Observation, Step, Trial


class Tabletop:
    """Two hands at a table with one camera. `embodiment` names the dimensions of state and action.

    State: position (metres), yaw (radians) and finger openings (metres) of the left and the right hand. Action: targets
    of the same quantities, clipped to the workspace. The same trial gives the same states and pixels after any other
    trials.

    `frame_size` is (height, width) of the frames. `hands` names the embodiment (`hands.HAND_MODELS`). Raises
    ImportError if OpenGL does not work.
    """

    fps = 10
    max_steps = 100  # of every task, at least twice the expert's
    regimes: tuple[str, ...] = REGIMES

    def __init__(self, *, frame_size: tuple[int, int] = (128, 224), hands: str = "tabletop") -> None:
        if len(frame_size) != 2 or min(frame_size) < 16:
            raise ValueError(f"frame_size: expected (height, width) of at least 16 pixels each, got {frame_size}")
        if hands not in HAND_MODELS:
            raise ValueError(f"unknown hands {hands!r}; available: {', '.join(HAND_MODELS)}")
        self.name = hands
        self.hands = HAND_MODELS[hands]
        self.embodiment = self.hands.embodiment
        self.frame_size = frame_size
        self.settings: Mapping[str, Any] = {"frame_size": list(frame_size)}
        self._renderer: Renderer | None = None
        self._scene: Scene | None = None

    def reset(self, trial: Trial) -> Observation:
        """Set up the trial's scene. Raises ValueError for an unknown task or object."""
        if trial.task not in GOALS:
            raise ValueError(f"trial {trial.name!r}: unknown task {trial.task!r}; available: {', '.join(GOALS)}")
        self.trial = trial
        self._scene = Scene(trial.scene, self.hands, self.frame_size)
        self.goal: PickAndPlace = GOALS[trial.task](self._scene, trial.scene)
        if self._renderer is None:
            self._renderer = Renderer(self._scene, self.frame_size)
        return self.observe()

    def instruct(self, trial: Trial) -> None:
        """Go on with the instruction and the goal of `trial`, on the scene as it is.

        The progress starts again. The trial's objects must be those of the running trial.
        """
        self.goal = GOALS[trial.task](self.scene, trial.scene)
        self.trial = trial

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Move towards the targets `action` (D,) for 0.1 s."""
        action = np.asarray(action, dtype=np.float64)
        expected = (len(self.embodiment.action_names),)
        if action.shape != expected or not np.isfinite(action).all():
            raise ValueError(f"action: expected {expected} finite numbers, got shape {action.shape}: {action}")
        self.scene.step(action)
        success = self.goal.update()
        return Step(observation=self.observe(render), success=success, progress=dict(self.goal.progress))

    def interaction_mask(self) -> np.ndarray:
        """(H, W) bool: the acting hand and its object. In the steamer task, first the left hand and the lid."""
        return self._mask(f"{self.goal.acting_hand}_hand", self.goal.acting_target)

    def target_mask(self) -> np.ndarray:
        """(H, W) bool: the object of the acting hand."""
        return self._mask(self.goal.acting_target)

    def object_at(self, column: int, row: int) -> str | None:
        """Name of the item or container at a pixel of the current frame."""
        things = (*self.scene.items, *self.scene.containers)
        return next((name for name in things if self._mask(name)[row, column]), None)

    def _mask(self, *bodies: str) -> np.ndarray:
        assert self._renderer is not None
        return self._renderer.mask(self.scene, self.scene.geoms_of(*bodies))

    def trials(self, regime: str) -> tuple[Trial, ...]:
        """The fixed trials of a regime (C.2.2)."""
        return regime_trials(regime, simulator=self.embodiment.name)

    def close(self) -> None:
        """Free the renderer. The next reset makes a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    @property
    def scene(self) -> Scene:
        """The physics of the running trial: privileged, for experts and tests."""
        if self._scene is None:
            raise ValueError("Tabletop: call reset(trial) first")
        return self._scene

    def observe(self, render: bool = True) -> Observation:
        """The observation of the scene as it is. Without `render` the frame is empty."""
        assert self._renderer is not None
        frame = self._renderer.frame(self.scene) if render else NO_FRAME
        return Observation(
            frame=frame, state=self.scene.state(), instruction=self.trial.instruction, embodiment=self.embodiment.name
        )
