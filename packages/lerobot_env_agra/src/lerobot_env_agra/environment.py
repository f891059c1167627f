"""The tabletop under LeRobot's names of observations. The import loads MuJoCo."""

from typing import Any

import numpy as np
from gymnasium import spaces

from agra.simulators.tabletop.gymnasium_env import TabletopEnv
from agra.types import Observation

_SEED_BASE = 2**24  # float32, to which LeRobot converts, is exact below


class LeRobotTabletop(TabletopEnv):
    """`agra.simulators.tabletop.gymnasium_env.TabletopEnv` as LeRobot reads it.

    Observation: `pixels` with the camera's picture (H, W, 3) uint8, `agent_pos` and the same as `observation.state`
    (S,) float32, under which name LeRobot records it, and `trial_seed` (2,), the quotient and remainder of the trial's
    seed by 2^24. With it the policy `agra` draws the same noise as in `agra evaluate`.
    """

    def __init__(self, *, camera: str, **options: Any) -> None:
        super().__init__(render_mode="rgb_array", **options)
        self.camera = camera
        space: Any = self.observation_space
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict({camera: space["frame"]}),
                "agent_pos": space["state"],
                "observation.state": space["state"],
                "trial_seed": spaces.Box(0, _SEED_BASE, (2,), np.float64),
            }
        )

    @property
    def _max_episode_steps(self) -> int:
        return self.max_steps

    @property
    def task(self) -> str:
        """The task of the running trial."""
        assert self._trial is not None
        return self._trial.task

    @property
    def task_description(self) -> str:
        """The instruction of the running trial."""
        assert self._trial is not None
        return self._trial.instruction

    def _observation(self, observation: Observation) -> dict[str, Any]:
        assert self._trial is not None
        return {
            "pixels": {self.camera: observation.frame},
            "agent_pos": observation.state,
            "observation.state": observation.state,
            "trial_seed": np.array(divmod(self._trial.seed, _SEED_BASE), np.float64),
        }
