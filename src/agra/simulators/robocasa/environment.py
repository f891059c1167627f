"""`RobocasaGR1`: the GR1 tabletop tasks as an `agra.types.Simulator`, 20 control steps a second.          facts 5.2, 6"""

# The suite lives in its own environment.
# pyright: reportMissingImports=false

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import robocasa_gr1.utils.gym_utils  # noqa: F401  registers the environments

from agra.simulators.robocasa.tasks import TASKS, trials
from agra.simulators.robosuite import draw_on_demand
from agra.types import NO_FRAME, Embodiment, Observation, Step, Trial

PARTS = {"left_arm": 7, "right_arm": 7, "left_hand": 6, "right_hand": 6, "waist": 3}
"""The 29 joints of the benchmark, in the order of GR00T's configuration."""
VIEW = "video.ego_view_bg_crop_pad_res256_freq20"
"""The cropped and padded picture that the data set calls ego_view; the package's other one is padded only."""
INSTRUCTION = "annotation.human.coarse_action"
PREFIX = "unlocked_waist: "
NAMES = tuple(f"{part}_{joint}" for part, size in PARTS.items() for joint in range(size))
EMBODIMENT = Embodiment(name="gr1", state_names=NAMES, action_names=NAMES)


class RobocasaGR1:
    """A GR1 humanoid's arms, hands and waist at a table, seen from its head.

    State and action: 29 joint angles in radians, the action absolute targets. The instruction is the world's, without the
    prefix that tells that the waist may move. Every trial gets a world of its own, made with the trial's seed: the
    package's reset takes a seed too but draws its scenes from the generator that the world was made with. Success is
    reported at every step; whether a success within a chunk counts is the protocol's `termination`.

    Raises ValueError where Python was not started with PYTHONHASHSEED=0: a seed would give another scene in every process.
    """

    name = "robocasa_gr1"
    fps = 20
    max_steps = 720
    regimes: tuple[str, ...] = tuple(TASKS)

    def __init__(self) -> None:
        if sys.flags.hash_randomization:
            raise ValueError(
                "robocasa_gr1: start Python with PYTHONHASHSEED=0, as agra evaluate --python does: the package draws"
                " distractors by the hash of a task's name, which otherwise differs from process to process"
            )
        self.embodiment = EMBODIMENT
        self.settings: Mapping[str, Any] = {
            "camera": VIEW,
            "frame_size": [256, 256],
            "instruction_prefix": "removed",
            "python_hash_seed": 0,
        }
        self._world: Any = None

    def trials(self, regime: str) -> tuple[Trial, ...]:
        """50 episodes of each task of the regime."""
        return trials(regime)

    def reset(self, trial: Trial) -> Observation:
        """Make the trial's world under its seed."""
        self.close()
        seed = trial.scene["seed"]
        self._world = gymnasium.make(trial.scene["environment"], seed=seed, disable_env_checker=True)
        seen, _ = self._world.reset(seed=seed)
        draw_on_demand(self.world.unwrapped.env.sim, lambda: self._looked_at)
        return observation(seen)

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        """Send joint targets (29,) for a twentieth of a second."""
        self._looked_at = render
        seen, _, _, _, info = self.world.step(split(action))
        shown = observation(seen)
        if not render:
            shown = replace(shown, frame=NO_FRAME)
        return Step(observation=shown, success=bool(info["success"]), progress={})

    def interaction_mask(self) -> np.ndarray:
        """Raises NotImplementedError: the package's segmentation has never been seen here, its objects being absent."""
        raise NotImplementedError(
            "robocasa_gr1: no interaction mask; its segmentation could not be tried without its objects"
        )

    def close(self) -> None:
        """Free the world and its renderer."""
        if self._world is not None:
            self._world.close()
            self._world = None

    @property
    def world(self) -> Any:
        """The package's own environment: privileged, for tests."""
        if self._world is None:
            raise ValueError("RobocasaGR1: reset(trial) comes before anything else")
        return self._world


def observation(seen: Mapping[str, Any]) -> Observation:
    """What the package shows, as the policy sees it. Raises ValueError for a part of another size."""
    parts = []
    for part, size in PARTS.items():
        value = np.asarray(seen[f"state.{part}"], dtype=np.float32)
        if value.shape != (size,):
            raise ValueError(f"state.{part}: expected ({size},) joint angles, got shape {value.shape}")
        parts.append(value)
    return Observation(
        frame=np.ascontiguousarray(seen[VIEW]),
        state=np.concatenate(parts),
        instruction=str(seen[INSTRUCTION]).removeprefix(PREFIX),
        embodiment=EMBODIMENT.name,
    )


def split(action: np.ndarray) -> dict[str, np.ndarray]:
    """(29,) -> the package's action, a part each. Raises ValueError for anything but 29 finite numbers."""
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (len(NAMES),) or not np.isfinite(action).all():
        raise ValueError(f"action: expected ({len(NAMES)},) finite numbers, got shape {action.shape}: {action}")
    ends = np.cumsum(list(PARTS.values()))[:-1]
    return {f"action.{part}": value for part, value in zip(PARTS, np.split(action, ends), strict=True)}
