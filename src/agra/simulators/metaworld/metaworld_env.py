"""`Metaworld`: the 50 tasks as an `agra.types.Simulator`, with rows of one or several 80 Hz control steps."""

# MuJoCo's compiled module has no type stubs, and the suite has a Python environment of its own.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from agra.simulators.metaworld.metaworld_tasks import INSTRUCTIONS, trials
from agra.types import NO_FRAME, ActionChunk, Embodiment, Observation, SimulatorFailed, Step, Trial

EMBODIMENT = Embodiment(
    name="sawyer",
    state_names=("hand_x", "hand_y", "hand_z", "gripper_opening"),
    action_names=("hand_dx", "hand_dy", "hand_dz", "gripper_effort"),
)
CONTROL_RATE = 80
MAX_CONTROL_STEPS = 500
CONTROL_STRIDES = (1, 2, 4, 5, 10, 20)
"""Strides that divide both the control rate and the length of an episode."""
CAMERA = "corner2"
CAMERA_AT = (0.75, 0.075, 0.7)


class Metaworld:
    """A Sawyer arm at a table. The camera is corner2, moved to (.75, .075, .7) and turned upright.

    State: position of the hand in metres, opening of the gripper in [0, 1]. Action: displacement of the hand in
    centimetres and effort of the gripper, each clipped to [-1, 1]. The goal may be visible in the frame and is never in
    the state. Every trial has a new environment, independent of earlier trials.

    With a `control_stride` of N, a row is N control steps: `step` takes their N actions side by side, named by
    `stride_embodiment`, and returns the observation after the last. Success is checked after every control step. The
    first success ends the row: the remaining actions are not executed, and the observation is that of the success.
    `fps` and `max_steps` count rows. Trials, physics and limits are those of the suite, so `name` stays the same.

    `frame_size` is (height, width). `shadow_map` is the side of the shadow map in texels, None for the suite's 4096.
    Without `render`, frames are black, for policies that use no image.
    """

    name = "metaworld"
    regimes: tuple[str, ...] = ("in_distribution",)

    def __init__(
        self,
        *,
        control_stride: int = 1,
        frame_size: tuple[int, int] = (480, 480),
        shadow_map: int | None = None,
        render: bool = True,
    ) -> None:
        if control_stride not in CONTROL_STRIDES:
            raise ValueError(f"control_stride: expected one of {CONTROL_STRIDES}, got {control_stride}")
        if len(frame_size) != 2 or min(frame_size) < 16 or max(frame_size) > 480:
            raise ValueError(f"frame_size: expected (height, width) of 16 to 480 pixels each, got {frame_size}")
        if shadow_map is not None and shadow_map < 1:
            raise ValueError(f"shadow_map: expected a side of at least 1 texel, or None, got {shadow_map}")
        self.control_stride, self.fps = control_stride, CONTROL_RATE // control_stride
        self.max_steps = MAX_CONTROL_STEPS // control_stride
        self.embodiment = stride_embodiment(control_stride)
        self.frame_size, self.shadow_map, self.render = frame_size, shadow_map, render
        self.settings: Mapping[str, Any] = {
            "camera": f"{CAMERA} at {CAMERA_AT}, both axes flipped",
            "frame_size": list(frame_size),
            "render": render,
            "goal_in_state": False,
            # Absent for the suite's own values: results written before these options stay comparable.
            **({} if control_stride == 1 else {"control_stride": control_stride}),
            **({} if shadow_map is None else {"shadow_map": shadow_map}),
        }
        self._renderer: mujoco.Renderer | None = None
        self._env: Any = None

    def reset(self, trial: Trial) -> Observation:
        """Set up the trial's task with its seed. Raises ValueError for an unknown task."""
        if trial.task not in INSTRUCTIONS:
            raise ValueError(f"trial {trial.name!r}: unknown task {trial.task!r}; available: {', '.join(INSTRUCTIONS)}")
        self.close()
        self.trial = trial
        env = ALL_V3_ENVIRONMENTS[trial.task]()
        # The expert needs the goal in the suite's observation. Policies receive its first four numbers.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env._set_task_called = True
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.seed(trial.scene["seed"])
        env.model.camera(CAMERA).pos = CAMERA_AT
        self.full_observation, _ = env.reset()
        self._env = env
        self.grasped = False
        return self._observe()

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Execute the actions of a row (4 * control_stride,) in turn, each for 1/80 s."""
        action = np.asarray(action, dtype=np.float32)
        expected = (len(self.embodiment.action_names),)
        if action.shape != expected or not np.isfinite(action).all():
            raise ValueError(f"action: expected {expected} finite numbers, got shape {action.shape}: {action}")
        success = False
        for part in np.clip(action, -1, 1).reshape(self.control_stride, -1):
            self.full_observation, _, _, _, info = self.env.step(part)
            self.grasped = self.grasped or bool(info["grasp_success"])
            success = bool(info["success"])
            if success:
                break
        return Step(observation=self._observe(render), success=success, progress={"grasped": self.grasped})

    @contextmanager
    def rehearsal(self) -> Iterator[Any]:
        """Yield the running environment for trial steps. Its previous state is restored bit for bit afterwards."""
        env = self.env
        before = dict(vars(env))
        env.data = copy.copy(env.data)
        try:
            yield env
        finally:
            vars(env).clear()
            vars(env).update(before)

    def interaction_mask(self) -> np.ndarray:
        """(H, W) bool: the hand and all movable objects."""
        model = self.env.model
        robot, hand = model.body("base").id, model.body("hand").id
        selected = np.zeros(model.ngeom, bool)
        for geom in range(model.ngeom):
            body = model.geom_bodyid[geom]
            movable = model.body_weldid[body] != 0 and model.body_rootid[body] != robot
            selected[geom] = _below(model, body, hand) or (movable and model.body_mocapid[body] < 0)
        renderer = self._open_renderer()
        renderer.enable_segmentation_rendering()
        renderer.update_scene(self.env.data, CAMERA)
        ids, kinds = np.moveaxis(renderer.render(), -1, 0)
        renderer.disable_segmentation_rendering()
        mask = (kinds == int(mujoco.mjtObj.mjOBJ_GEOM)) & selected[np.maximum(ids, 0)]
        return np.ascontiguousarray(mask[::-1, ::-1])

    def trials(self, regime: str) -> tuple[Trial, ...]:
        """50 episodes of each of the 50 tasks."""
        if regime not in self.regimes:
            raise ValueError(f"unknown regime {regime!r}; available: {', '.join(self.regimes)}")
        return trials()

    def close(self) -> None:
        """Free the renderer and the environment."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env = None

    @property
    def env(self) -> Any:
        """The suite's environment: privileged, for experts and tests."""
        if self._env is None:
            raise ValueError("Metaworld: call reset(trial) first")
        return self._env

    def _observe(self, render: bool = True) -> Observation:
        return Observation(
            frame=self._frame() if render else NO_FRAME,
            state=self.full_observation[:4].astype(np.float32),
            instruction=self.trial.instruction,
            embodiment=self.embodiment.name,
        )

    def _frame(self) -> np.ndarray:
        if not self.render:
            return np.zeros((*self.frame_size, 3), np.uint8)
        renderer = self._open_renderer()
        renderer.update_scene(self.env.data, CAMERA)
        return np.ascontiguousarray(renderer.render()[::-1, ::-1])

    def _open_renderer(self) -> mujoco.Renderer:
        if self._renderer is None:
            if self.shadow_map is not None:
                self.env.model.vis.quality.shadowsize = self.shadow_map
            try:
                self._renderer = mujoco.Renderer(self.env.model, *self.frame_size)
            except mujoco.FatalError as error:
                raise SimulatorFailed(f"the frame cannot be rendered: {error}") from error
        return self._renderer


class MetaworldExpert:
    """The suite's scripted expert of the running task. It knows the goal and all objects.

    It acts at every control step. For a row of several steps it rehearses the row: each further action responds to the
    observation after the actions before it.
    """

    def __init__(self, simulator: Metaworld) -> None:
        self.simulator = simulator

    def reset(self, seed: int) -> None:
        """Select the expert of the running task."""
        self._expert = ENV_POLICY_MAP[self.simulator.trial.task]()

    def act(self, observation: Observation) -> ActionChunk:
        """One row of actions."""
        actions = [self._action(self.simulator.full_observation)]
        if self.simulator.control_stride > 1:
            with self.simulator.rehearsal() as env:
                while len(actions) < self.simulator.control_stride:
                    full_observation, *_ = env.step(actions[-1])
                    actions.append(self._action(full_observation))
        return ActionChunk(actions=np.concatenate(actions)[None])

    def _action(self, full_observation: np.ndarray) -> np.ndarray:
        return np.clip(self._expert.get_action(full_observation), -1, 1).astype(np.float32)


def stride_embodiment(control_stride: int) -> Embodiment:
    """The arm with `control_stride` actions per row, named hand_dx_step0, ..., gripper_effort_step0, hand_dx_step1
    ...
    """
    if control_stride == 1:
        return EMBODIMENT
    return Embodiment(
        name=f"{EMBODIMENT.name}_{CONTROL_RATE // control_stride}hz",
        state_names=EMBODIMENT.state_names,
        action_names=tuple(f"{name}_step{step}" for step in range(control_stride) for name in EMBODIMENT.action_names),
    )


def _below(model: Any, body: int, ancestor: int) -> bool:
    while body not in (0, ancestor):
        body = model.body_parentid[body]
    return body == ancestor
