"""`RobocasaGR1`: the GR1 tabletop tasks as an `agra.types.Simulator`, 20 control steps a second."""

# The suite has a Python environment of its own.
# pyright: reportMissingImports=false

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import robocasa_gr1.utils.gym_utils  # noqa: F401  registers the environments

from agra.simulators.robocasa.robocasa_tasks import TASKS, trials
from agra.simulators.robosuite import render_on_demand
from agra.types import NO_FRAME, Embodiment, Observation, Step, Trial

PARTS = {"left_arm": 7, "right_arm": 7, "left_hand": 6, "right_hand": 6, "waist": 3}
"""The 29 joints of the benchmark, in the order of GR00T's configuration."""
VIEW = "video.ego_view_bg_crop_pad_res256_freq20"
"""The cropped and padded frame, ego_view in the datasets. The package's other frame is padded only."""
INSTRUCTION = "annotation.human.coarse_action"
PREFIX = "unlocked_waist: "
NAMES = tuple(f"{part}_{joint}" for part, size in PARTS.items() for joint in range(size))
EMBODIMENT = Embodiment(name="gr1", state_names=NAMES, action_names=NAMES)


class RobocasaGR1:
    """A GR1 humanoid's arms, hands and waist at a table. The camera is in its head.

    State and action: 29 joint angles in radians. Actions are absolute targets. The instruction is the environment's,
    without its prefix about the waist. Every trial has a new environment, made with the trial's seed: the package's
    reset takes a seed too, but samples its scenes from the generator of the constructor. Success is reported at every
    step. The protocol's `termination` decides whether a success within a chunk counts.

    Raises ValueError unless Python was started with PYTHONHASHSEED=0: otherwise a seed gives another scene in every
    process.
    """

    name = "robocasa_gr1"
    fps = 20
    max_steps = 720
    regimes: tuple[str, ...] = tuple(TASKS)

    def __init__(self) -> None:
        if sys.flags.hash_randomization:
            raise ValueError(
                "robocasa_gr1: start Python with PYTHONHASHSEED=0, as agra evaluate --simulator-python does: the "
                "package chooses distractors by the hash of a task's name, which otherwise differs between processes"
            )
        self.embodiment = EMBODIMENT
        self.settings: Mapping[str, Any] = {
            "camera": VIEW,
            "frame_size": [256, 256],
            "instruction_prefix": "removed",
            "python_hash_seed": 0,
        }
        self._env: Any = None

    def trials(self, regime: str) -> tuple[Trial, ...]:
        """50 episodes of each task of the regime."""
        return trials(regime)

    def reset(self, trial: Trial) -> Observation:
        """Make the trial's environment with its seed."""
        self.close()
        seed = trial.scene["seed"]
        self._env = gymnasium.make(trial.scene["environment"], seed=seed, disable_env_checker=True)
        raw, _ = self._env.reset(seed=seed)
        render_on_demand(self.env.unwrapped.env.sim, lambda: self._rendering)
        return observation(raw)

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Send joint targets (29,) for 1/20 s."""
        self._rendering = render
        raw, _, _, _, info = self.env.step(split(action))
        result = observation(raw)
        if not render:
            result = replace(result, frame=NO_FRAME)
        return Step(observation=result, success=bool(info["success"]), progress={})

    def interaction_mask(self) -> np.ndarray:
        """Raises NotImplementedError: the package's segmentation is untested, because its objects were not
        available.
        """
        raise NotImplementedError(
            "robocasa_gr1: no interaction mask; the package's segmentation is untested without its objects"
        )

    def close(self) -> None:
        """Free the environment and its renderer."""
        if self._env is not None:
            self._env.close()
            self._env = None

    @property
    def env(self) -> Any:
        """The package's environment: privileged, for tests."""
        if self._env is None:
            raise ValueError("RobocasaGR1: call reset(trial) first")
        return self._env


def observation(raw: Mapping[str, Any]) -> Observation:
    """The policy's observation from the package's. Raises ValueError for a part of another size."""
    parts = []
    for part, size in PARTS.items():
        value = np.asarray(raw[f"state.{part}"], dtype=np.float32)
        if value.shape != (size,):
            raise ValueError(f"state.{part}: expected ({size},) joint angles, got shape {value.shape}")
        parts.append(value)
    return Observation(
        frame=np.ascontiguousarray(raw[VIEW]),
        state=np.concatenate(parts),
        instruction=str(raw[INSTRUCTION]).removeprefix(PREFIX),
        embodiment=EMBODIMENT.name,
    )


def split(action: np.ndarray) -> dict[str, np.ndarray]:
    """(29,) -> the package's action by part. Raises ValueError unless these are 29 finite numbers."""
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (len(NAMES),) or not np.isfinite(action).all():
        raise ValueError(f"action: expected ({len(NAMES)},) finite numbers, got shape {action.shape}: {action}")
    ends = np.cumsum(list(PARTS.values()))[:-1]
    return {f"action.{part}": value for part, value in zip(PARTS, np.split(action, ends), strict=True)}
