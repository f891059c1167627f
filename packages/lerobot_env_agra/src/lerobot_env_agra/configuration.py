"""Settings of the environment `agra_tabletop`, and its vectorised environments."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

CAMERA = "ego_view"
"""Name of the camera, as `agra collect` writes it."""


@EnvConfig.register_subclass("agra_tabletop")
@dataclass
class AgraTabletopConfig(EnvConfig):
    """The tabletop of agra, whose fixed trials are chosen by the seed.

    `task` lists regimes, separated by commas: in_distribution (50 trials), semantic (40), instance (50), attribute
    (40). Each is a group of lerobot-eval's table. Seed s plays trial s modulo 1000 of the regime, so LeRobot's default
    seed 1000 begins with the first one, and further episodes than trials repeat them. An episode has at most
    `episode_length` control steps. None takes the 100 of `agra evaluate`. Pictures have `observation_height` times
    `observation_width` pixels.
    """

    task: str | None = "in_distribution"
    fps: int = 10
    hands: str = "tabletop"
    episode_length: int | None = None
    observation_height: int = 128
    observation_width: int = 224

    def __post_init__(self) -> None:
        from agra.simulators.tabletop.hands import HAND_MODELS
        from agra.types import REGIMES

        if self.hands not in HAND_MODELS:
            raise ValueError(f"hands: expected one of {', '.join(HAND_MODELS)}, got {self.hands!r}")
        if not self.regimes or not set(self.regimes) <= set(REGIMES):
            raise ValueError(f"task: expected some of {', '.join(REGIMES)}, separated by commas, got {self.task!r}")
        if self.max_parallel_tasks != 1:
            raise ValueError("max_parallel_tasks: expected 1, because parallel tasks share one policy and its episodes")
        embodiment = HAND_MODELS[self.hands].embodiment
        picture = (self.observation_height, self.observation_width, 3)
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(len(embodiment.action_names),)),
            OBS_STATE: PolicyFeature(type=FeatureType.STATE, shape=(len(embodiment.state_names),)),
            f"{OBS_IMAGES}.{CAMERA}": PolicyFeature(type=FeatureType.VISUAL, shape=picture),
        }
        self.features_map = {name: name for name in self.features}

    @property
    def regimes(self) -> list[str]:
        """The regimes of `task`."""
        return [name.strip() for name in (self.task or "").split(",") if name.strip()]

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of the simulator."""
        size = self.observation_height, self.observation_width
        return {"frame_size": size, "hands": self.hands, "max_steps": self.episode_length}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """One vectorised environment for each regime. Asynchronous ones start when they are first used."""
        vectorised: dict[str, dict[int, Any]] = {}
        for regime in self.regimes:
            make = partial(_make, camera=CAMERA, regime=regime, **self.gym_kwargs)
            if use_async_envs and n_envs > 1:
                vectorised[regime] = {0: _LazyAsyncVectorEnv([make] * n_envs)}
            else:
                frozen = freeze_after_episode_end(make)  # a finished episode is not simulated further
                vectorised[regime] = {0: gymnasium.vector.SyncVectorEnv([frozen] * n_envs)}
        return vectorised


def _make(**options: Any) -> gymnasium.Env:
    from lerobot_env_agra.environment import LeRobotTabletop

    return LeRobotTabletop(**options)
