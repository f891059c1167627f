"""`Libero`: a suite of LIBERO as an `agra.types.Simulator`, 20 control steps a second.                        fact 10"""

# MuJoCo and the suite come without type stubs, the suite lives in its own environment.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.bddl_utils import get_problem_info
    from libero.libero.envs.env_wrapper import ControlEnv

from agra.simulators.libero.suites import ENVIRONMENT_SEED, EPISODES, MAX_STEPS, PERTURBATIONS, SETTLE_STEPS, regimes
from agra.simulators.robosuite import draw_on_demand
from agra.types import NO_FRAME, Embodiment, Observation, Step, Trial

EMBODIMENT = Embodiment(
    name="panda",
    state_names=("x", "y", "z", "axis_angle_1", "axis_angle_2", "axis_angle_3", "finger_1", "finger_2"),
    action_names=("dx", "dy", "dz", "d_axis_angle_1", "d_axis_angle_2", "d_axis_angle_3", "gripper"),
)
CAMERAS = {"frame": "agentview", "wrist": "robot0_eye_in_hand"}
REST = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The action of the settling steps: stay, gripper open."""


class Libero:
    """A Panda arm in one of LIBERO's suites, seen by the camera agentview and, in `views`, the one at its wrist.

    State: position (metres) and axis-angle of the end effector, both fingers (metres). Action: the end effector's
    displacement and rotation in [-1, 1] and the gripper, -1 open and 1 closed. An episode starts from one of the official
    initial states and settles for ten steps; pictures are turned by 180 degrees, as policies are trained.

    A regime other than in_distribution is a LIBERO-PRO suite, in which one axis of the standard one is perturbed.
    `frame_size` is (height, width). Without `render` its frames are black, for policies that use no image.
    Raises ValueError for an unknown suite.
    """

    fps = 20

    def __init__(self, suite: str, *, frame_size: tuple[int, int] = (256, 256), render: bool = True) -> None:
        if suite not in MAX_STEPS:
            raise ValueError(f"unknown suite {suite!r}; there are {', '.join(MAX_STEPS)}")
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
        self._world: Any = None
        self._looked_at = False
        self._task: tuple[str, int] | None = None

    def trials(self, regime: str) -> tuple[Trial, ...]:
        """50 episodes of each task, one for each official initial state."""
        if regime not in self.regimes:
            raise ValueError(f"unknown regime {regime!r}; there are {', '.join(self.regimes)}")
        name, tasks = self.name + PERTURBATIONS[regime], _tasks(self.name + PERTURBATIONS[regime])
        return tuple(
            Trial(
                name=f"{regime}/{task.name}/{episode:02d}",
                simulator=self.name,
                regime=regime,
                task=task.name,
                seed=episode,
                instruction=_instruction(regime, task),
                scene={"suite": name, "task_id": number, "initial_state": episode},
            )
            for number, task in enumerate(tasks)
            for episode in range(EPISODES)
        )

    def reset(self, trial: Trial) -> Observation:
        """Restore the trial's initial state, or draw one, and let it settle. Raises ValueError for another suite's trial."""
        name, number = trial.scene["suite"], trial.scene["task_id"]
        if trial.simulator != self.name:
            raise ValueError(f"trial {trial.name!r} is one of {trial.simulator}, this is {self.name}")
        suite = _suite(name)
        if (name, number) != self._task:
            self.close()
            self._world = ControlEnv(
                str(_bddl(suite.get_task(number))),
                use_camera_obs=self.render,
                has_offscreen_renderer=self.render,
                camera_heights=self.frame_size[0],
                camera_widths=self.frame_size[1],
            )
            self._task = name, number
        self.trial = trial
        # What an official initial state leaves open, such as where fixtures stand, is drawn by the reset.
        official = "initial_state" in trial.scene
        self.world.seed(ENVIRONMENT_SEED if official else trial.seed)
        self._looked_at = False
        self._seen = self.world.reset()
        if self.render:
            draw_on_demand(self.world.sim, lambda: self._looked_at)
        if official:
            self._seen = self.world.set_init_state(suite.get_task_init_states(number)[trial.scene["initial_state"]])
        for left in reversed(range(SETTLE_STEPS)):
            self._looked_at = left == 0
            self._seen, *_ = self.world.step(np.array(REST))
        return self._observe()

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Apply `action` (7,) for a twentieth of a second."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected (7,) finite numbers, got shape {action.shape}: {action}")
        self._looked_at = render
        self._seen, _, done, _ = self.world.step(action)
        return Step(observation=self._observe(render), success=bool(done), progress={})

    def interaction_mask(self) -> np.ndarray:
        """(H, W) bool: the gripper, and what the task names as objects of interest."""
        model = self.world.sim.model
        wanted = tuple(name for name in self.world.obj_of_interest if name in self.world.env.objects_dict)
        names = [model.body_id2name(model.geom_bodyid[geom]) or "" for geom in range(model.ngeom)]
        inside = np.array([name.startswith(("gripper0", *wanted)) for name in names])
        height, width = self.frame_size
        ids = self.world.sim.render(camera_name=CAMERAS["frame"], height=height, width=width, segmentation=True)[..., 1]
        return np.ascontiguousarray(((ids >= 0) & inside[np.maximum(ids, 0)])[::-1, ::-1])

    def close(self) -> None:
        """Free the world and its renderer."""
        if self._world is not None:
            self._world.close()
        self._world = self._task = None

    @property
    def world(self) -> Any:
        """The suite's own environment: privileged, for experts and tests."""
        if self._world is None:
            raise ValueError("Libero: reset(trial) comes before anything else")
        return self._world

    def _observe(self, render: bool = True) -> Observation:
        seen = self._seen
        state = [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        frames = {name: self._picture(camera) if render else NO_FRAME for name, camera in CAMERAS.items()}
        return Observation(
            frame=frames.pop("frame"),
            state=np.concatenate(state).astype(np.float32),
            instruction=self.trial.instruction,
            embodiment=EMBODIMENT.name,
            views=frames,
        )

    def _picture(self, camera: str) -> np.ndarray:
        if not self.render:
            return np.zeros((*self.frame_size, 3), np.uint8)
        return np.ascontiguousarray(self._seen[f"{camera}_image"][::-1, ::-1])


def training_trials(suite: str, count: int, seed: int) -> Sequence[Trial]:
    """Scenes for demonstrations, all tasks in turn, drawn from the tasks' own regions: none is an official initial state."""
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
    """(x, y, z, w) -> (3,), angle in [0, 2 pi]: not the shorter way round, as policies for LIBERO are trained."""
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
    """The standard instruction, or the perturbed one: the package's `task.language` is the standard one in every suite."""
    if regime not in ("language", "task"):
        return task.language
    return get_problem_info(str(_bddl(task)))["language_instruction"]
