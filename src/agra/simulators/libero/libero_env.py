"""`Libero`: a suite of LIBERO as an `agra.types.Simulator`, 20 control steps a second."""

# MuJoCo and the suite have no type stubs, and the suite has a Python environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

with contextlib.redirect_stdout(io.StringIO()):  # the package prints at import
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.bddl_utils import get_problem_info
    from libero.libero.envs.env_wrapper import ControlEnv

from agra.simulators.libero.suites import ENVIRONMENT_SEED, EPISODES, MAX_STEPS, PERTURBATIONS, SETTLE_STEPS, regimes
from agra.simulators.robosuite import render_on_demand
from agra.types import NO_FRAME, Embodiment, Observation, Step, Trial

EMBODIMENT = Embodiment(
    name="panda",
    state_names=("x", "y", "z", "axis_angle_1", "axis_angle_2", "axis_angle_3", "finger_1", "finger_2"),
    action_names=("dx", "dy", "dz", "d_axis_angle_1", "d_axis_angle_2", "d_axis_angle_3", "gripper"),
)
CAMERAS = {"frame": "agentview", "wrist": "robot0_eye_in_hand"}
REST = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The action of the settling steps: no motion, gripper open."""


class Libero:
    """A Panda arm in a suite of LIBERO. The frame is of the camera agentview, `views` has the wrist camera.

    State: position (metres) and axis-angle of the end effector, both fingers (metres). Action: displacement and
    rotation of the end effector in [-1, 1], and the gripper, -1 open and 1 closed. An episode starts from an official
    initial state and settles for ten steps. Frames are turned by 180 degrees, as in the training of policies.

    A regime other than in_distribution is a LIBERO-PRO suite, which perturbs one aspect of the standard suite.
    `frame_size` is (height, width). Without `render`, frames are black, for policies that use no image. Raises
    ValueError for an unknown suite.
    """

    fps = 20

    def __init__(self, suite: str, *, frame_size: tuple[int, int] = (256, 256), render: bool = True) -> None:
        if suite not in MAX_STEPS:
            raise ValueError(f"unknown suite {suite!r}; available: {', '.join(MAX_STEPS)}")
        if len(frame_size) != 2 or min(frame_size) < 16:
            raise ValueError(f"frame_size: expected (height, width) of at least 16 pixels each, got {frame_size}")
        self.name, self.embodiment = suite, EMBODIMENT
        self.max_steps = MAX_STEPS[suite]
        self.regimes = regimes(suite)
        self.frame_size, self.render = frame_size, render
        self.settings: Mapping[str, Any] = {
            "cameras": ", ".join(CAMERAS.values()) + ", turned by 180 degrees",
            "frame_size": list(frame_size),
            "render": render,
            "settle_steps": SETTLE_STEPS,
            "environment_seed": ENVIRONMENT_SEED,
            "initial_states": "official, one an episode",
        }
        self._env: Any = None
        self._rendering = False
        self._task: tuple[str, int] | None = None

    def trials(self, regime: str) -> tuple[Trial, ...]:
        """50 episodes of each task, one per official initial state. The seed of the policy's noise comes from the trial's
        name.
        """
        if regime not in self.regimes:
            raise ValueError(f"unknown regime {regime!r}; available: {', '.join(self.regimes)}")
        suite = self.name + PERTURBATIONS[regime]
        return tuple(
            Trial(
                name=(name := f"{regime}/{task.name}/{episode:02d}"),
                simulator=self.name,
                regime=regime,
                task=task.name,
                seed=zlib.crc32(name.encode()),
                instruction=_instruction(regime, task),
                scene={"suite": suite, "task_id": number, "initial_state": episode},
            )
            for number, task in enumerate(_tasks(suite))
            for episode in range(EPISODES)
        )

    def reset(self, trial: Trial) -> Observation:
        """Restore or sample the trial's initial state and let it settle.

        Raises ValueError for a trial of another suite.
        """
        name, number = trial.scene["suite"], trial.scene["task_id"]
        if trial.simulator != self.name:
            raise ValueError(f"trial {trial.name!r} belongs to {trial.simulator}, not to {self.name}")
        suite = _suite(name)
        if (name, number) != self._task:
            self.close()
            self._env = ControlEnv(
                str(_bddl(suite.get_task(number))),
                use_camera_obs=self.render,
                has_offscreen_renderer=self.render,
                camera_heights=self.frame_size[0],
                camera_widths=self.frame_size[1],
            )
            self._task = name, number
        self.trial = trial
        # The reset samples the rest of an official initial state, such as the places of fixtures.
        official = "initial_state" in trial.scene
        self.env.seed(ENVIRONMENT_SEED if official else trial.seed)
        self._rendering = False
        self._raw_observation = self.env.reset()
        if self.render:
            render_on_demand(self.env.sim, lambda: self._rendering)
        if official:
            self._raw_observation = self.env.set_init_state(
                suite.get_task_init_states(number)[trial.scene["initial_state"]]
            )
        for left in reversed(range(SETTLE_STEPS)):
            self._rendering = left == 0
            self._raw_observation, *_ = self.env.step(np.array(REST))
        return self._observe()

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Apply `action` (7,) for 1/20 s."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected (7,) finite numbers, got shape {action.shape}: {action}")
        self._rendering = render
        self._raw_observation, _, done, _ = self.env.step(action)
        return Step(observation=self._observe(render), success=bool(done), progress={})

    def interaction_mask(self) -> np.ndarray:
        """(H, W) bool: the gripper and the task's objects of interest."""
        model = self.env.sim.model
        objects = tuple(name for name in self.env.obj_of_interest if name in self.env.env.objects_dict)
        names = [model.body_id2name(model.geom_bodyid[geom]) or "" for geom in range(model.ngeom)]
        selected = np.array([name.startswith(("gripper0", *objects)) for name in names])
        height, width = self.frame_size
        ids = self.env.sim.render(camera_name=CAMERAS["frame"], height=height, width=width, segmentation=True)[..., 1]
        return np.ascontiguousarray(((ids >= 0) & selected[np.maximum(ids, 0)])[::-1, ::-1])

    def close(self) -> None:
        """Free the environment and its renderer."""
        if self._env is not None:
            self._env.close()
        self._env = self._task = None

    @property
    def env(self) -> Any:
        """The suite's environment: privileged, for experts and tests."""
        if self._env is None:
            raise ValueError("Libero: call reset(trial) first")
        return self._env

    def _observe(self, render: bool = True) -> Observation:
        raw = self._raw_observation
        state = [raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"]]
        frames = {name: self._frame(camera) if render else NO_FRAME for name, camera in CAMERAS.items()}
        return Observation(
            frame=frames.pop("frame"),
            state=np.concatenate(state).astype(np.float32),
            instruction=self.trial.instruction,
            embodiment=EMBODIMENT.name,
            views=frames,
        )

    def _frame(self, camera: str) -> np.ndarray:
        if not self.render:
            return np.zeros((*self.frame_size, 3), np.uint8)
        return np.ascontiguousarray(self._raw_observation[f"{camera}_image"][::-1, ::-1])


def training_trials(suite: str, count: int, seed: int) -> Sequence[Trial]:
    """Scenes for demonstrations, all tasks in turn, sampled from the tasks' regions.

    None is an official initial state.
    """
    tasks = _tasks(suite)
    first = 1_000_000 * (seed + 1)
    return [
        Trial(
            name=f"train/{tasks[i % len(tasks)].name}/{first + i // len(tasks)}",
            simulator=suite,
            regime="in_distribution",
            task=tasks[i % len(tasks)].name,
            seed=first + i // len(tasks),
            instruction=tasks[i % len(tasks)].language,
            scene={"suite": suite, "task_id": i % len(tasks)},
        )
        for i in range(count)
    ]


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(x, y, z, w) -> (3,), angle in [0, 2 pi]: the longer rotation too, as in the training of policies for LIBERO."""
    w = float(np.clip(quaternion[3], -1, 1))
    sine = math.sqrt(1 - w * w)
    return np.zeros(3) if sine < 1e-8 else np.asarray(quaternion[:3]) * (2 * math.acos(w) / sine)


def _suite(name: str) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return benchmark.get_benchmark(name)(task_order_index=0)


def _tasks(name: str) -> Sequence[Any]:
    suite = _suite(name)
    return [suite.get_task(number) for number in range(suite.n_tasks)]


def _bddl(task: Any) -> Path:
    return Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file


def _instruction(regime: str, task: Any) -> str:
    """The standard or perturbed instruction. The package's `task.language` is the standard one in every suite."""
    if regime not in ("language", "task"):
        return task.language
    return get_problem_info(str(_bddl(task)))["language_instruction"]
