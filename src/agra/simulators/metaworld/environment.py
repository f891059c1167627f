"""`Metaworld`: the 50 tasks as an `agra.types.Simulator`, 80 control steps a second or several of them in a row."""

# MuJoCo's compiled module comes without type stubs, and the suite lives in its own environment.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from agra.simulators.metaworld.tasks import INSTRUCTIONS, trials
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
    """A Sawyer arm at a table, seen by the camera corner2 moved to (.75, .075, .7) and turned upright.

    State: position of the hand in metres, opening of the gripper in [0, 1]. Action: the hand's displacement in units of a
    centimetre and the gripper's effort, each in [-1, 1] and clipped to it. The goal is visible in the world where the task
    shows one, and never in the state. Every trial gets a world of its own, so nothing of the one before can leak into it.

    With a `control_stride` of N a row is N control steps: `step` takes their N actions side by side (`stride_embodiment`
    names them) and shows the world after the last. Success is checked after every control step. The first success ends
    the row: its remaining actions are not executed, and the observation is that of the success. `fps` and `max_steps`
    count rows. Trials, physics and limits are those of the suite, so `name` stays the same.

    `frame_size` is (height, width), `shadow_map` the side of the shadow map in texels, None for the suite's own of 4096.
    Without `render` its frames are black, for policies that use no image.
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
            # Absent where they are the suite's own, so that results from before these options stay comparable.
            **({} if control_stride == 1 else {"control_stride": control_stride}),
            **({} if shadow_map is None else {"shadow_map": shadow_map}),
        }
        self._renderer: mujoco.Renderer | None = None
        self._world: Any = None

    def reset(self, trial: Trial) -> Observation:
        """Set up the trial's task under its seed. Raises ValueError for an unknown task."""
        if trial.task not in INSTRUCTIONS:
            raise ValueError(
                f"trial {trial.name!r}: unknown task {trial.task!r}; Meta-World has {', '.join(INSTRUCTIONS)}"
            )
        self.close()
        self.trial = trial
        world = ALL_V3_ENVIRONMENTS[trial.task]()
        # The expert needs the goal in the suite's own observation; of that the policy sees the first four numbers.
        world._partially_observable = False
        world.__dict__.pop("sawyer_observation_space", None)
        world._set_task_called = True
        world._freeze_rand_vec, world.seeded_rand_vec = False, True
        world.seed(trial.scene["seed"])
        world.model.camera(CAMERA).pos = CAMERA_AT
        self.full_observation, _ = world.reset()
        self._world = world
        self.grasped = False
        return self._observe()

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Move the hand by each of the row's actions in turn, (4 * control_stride,), for an eightieth of a second."""
        action = np.asarray(action, dtype=np.float32)
        expected = (len(self.embodiment.action_names),)
        if action.shape != expected or not np.isfinite(action).all():
            raise ValueError(f"action: expected {expected} finite numbers, got shape {action.shape}: {action}")
        success = False
        for part in np.clip(action, -1, 1).reshape(self.control_stride, -1):
            self.full_observation, _, _, _, info = self.world.step(part)
            self.grasped = self.grasped or bool(info["grasp_success"])
            success = bool(info["success"])
            if success:
                break
        return Step(observation=self._observe(render), success=success, progress={"grasped": self.grasped})

    @contextmanager
    def rehearsal(self) -> Iterator[Any]:
        """Yield the running world to be stepped at will. Afterwards it is, to the last bit, as it was before."""
        world = self.world
        before = dict(vars(world))
        world.data = copy.copy(world.data)
        try:
            yield world
        finally:
            vars(world).clear()
            vars(world).update(before)

    def interaction_mask(self) -> np.ndarray:
        """(H, W) bool: the hand, and whatever else can move."""
        model = self.world.model
        robot, hand = model.body("base").id, model.body("hand").id
        wanted = np.zeros(model.ngeom, bool)
        for geom in range(model.ngeom):
            body = model.geom_bodyid[geom]
            movable = model.body_weldid[body] != 0 and model.body_rootid[body] != robot
            wanted[geom] = _below(model, body, hand) or (movable and model.body_mocapid[body] < 0)
        renderer = self._drawing()
        renderer.enable_segmentation_rendering()
        renderer.update_scene(self.world.data, CAMERA)
        ids, kinds = np.moveaxis(renderer.render(), -1, 0)
        renderer.disable_segmentation_rendering()
        found = (kinds == int(mujoco.mjtObj.mjOBJ_GEOM)) & wanted[np.maximum(ids, 0)]
        return np.ascontiguousarray(found[::-1, ::-1])

    def trials(self, regime: str) -> tuple[Trial, ...]:
        """50 episodes of each of the 50 tasks."""
        if regime not in self.regimes:
            raise ValueError(f"unknown regime {regime!r}; there are {', '.join(self.regimes)}")
        return trials()

    def close(self) -> None:
        """Free the renderer and the world."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._world = None

    @property
    def world(self) -> Any:
        """The suite's own environment: privileged, for experts and tests."""
        if self._world is None:
            raise ValueError("Metaworld: reset(trial) comes before anything else")
        return self._world

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
        renderer = self._drawing()
        renderer.update_scene(self.world.data, CAMERA)
        return np.ascontiguousarray(renderer.render()[::-1, ::-1])

    def _drawing(self) -> mujoco.Renderer:
        if self._renderer is None:
            if self.shadow_map is not None:
                self.world.model.vis.quality.shadowsize = self.shadow_map
            try:
                self._renderer = mujoco.Renderer(self.world.model, *self.frame_size)
            except mujoco.FatalError as error:
                raise SimulatorFailed(f"no picture can be drawn: {error}") from error
        return self._renderer


class ScriptedExpert:
    """The suite's own expert of the running task; sees the goal and all objects.

    It acts at every control step. For a row of several it rehearses the row: each further action answers the observation
    that the actions before it lead to.
    """

    def __init__(self, simulator: Metaworld) -> None:
        self.simulator = simulator

    def reset(self, seed: int) -> None:
        """Take the expert of the task that was set up."""
        self._expert = ENV_POLICY_MAP[self.simulator.trial.task]()

    def act(self, observation: Observation) -> ActionChunk:
        """One row of actions."""
        actions = [self._action(self.simulator.full_observation)]
        if self.simulator.control_stride > 1:
            with self.simulator.rehearsal() as world:
                while len(actions) < self.simulator.control_stride:
                    full_observation, *_ = world.step(actions[-1])
                    actions.append(self._action(full_observation))
        return ActionChunk(actions=np.concatenate(actions)[None])

    def _action(self, full_observation: np.ndarray) -> np.ndarray:
        return np.clip(self._expert.get_action(full_observation), -1, 1).astype(np.float32)


def stride_embodiment(control_stride: int) -> Embodiment:
    """The arm with rows of `control_stride` actions side by side: hand_dx_step0, ..., gripper_effort_step0, hand_dx_step1 ..."""
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
