"""The tabletop as a Gymnasium environment: `gymnasium.make("agra/Tabletop-v0")`.

The import of this module registers it: `import agra.simulators.tabletop.gymnasium_env`.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from agra.simulators.tabletop.tabletop_env import Tabletop
from agra.simulators.tabletop.tabletop_tasks import training_trials
from agra.types import REGIMES, Observation, Trial

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
_TRIALS = 1_000_000


class TabletopEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Observation: `frame` (H, W, 3) uint8, `state` (D,) float32 and `instruction`. Action: targets (D,) float32.

    Metres and radians, as in `Tabletop.embodiment`. The reward is 1 at the successful step, which ends the episode,
    else 0. An episode without success is truncated after `max_steps` control steps, by default the 100 of `agra evaluate`.
    `info` holds `success` (and the same as `is_success`), the partial scores of `progress`, and the trial's name.

    `reset(seed=...)` samples a training scene. With a `regime`, it plays one of the regime's fixed trials instead:
    number seed modulo 1000, modulo their count. `reset(options={"trial": trial})` plays a given trial, a
    `agra.types.Trial` or the name of one. Other options are ignored. The `render_mode` "rgb_array" renders the same
    frame.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": Tabletop.fps}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(
        self,
        *,
        frame_size: tuple[int, int] = (128, 224),
        hands: str = "tabletop",
        steamer_fraction: float = 0.25,
        regime: str | None = None,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode: expected None or "rgb_array", got {render_mode!r}')
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1 or None, got {max_steps}")
        self.simulator = Tabletop(frame_size=frame_size, hands=hands)
        self.max_steps = max_steps or self.simulator.max_steps
        self._trials = () if regime is None else self.simulator.trials(regime)
        self.render_mode = render_mode
        self.steamer_fraction = steamer_fraction
        low, high = self.simulator.hands.limits
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        self.observation_space = spaces.Dict(
            {
                "frame": spaces.Box(0, 255, (*frame_size, 3), np.uint8),
                # Unbounded, as in Gymnasium's MuJoCo environments: a collision can push a hand past the limits of
                # targets.
                "state": spaces.Box(-np.inf, np.inf, low.shape, np.float32),
                "instruction": spaces.Text(min_length=1, max_length=128, charset=_CHARACTERS),
            }
        )
        self._trial: Trial | None = None
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode of the trial in `options`, or of one chosen by `seed`. Raises ValueError for an unknown name."""
        super().reset(seed=seed)
        trial: Trial | str | None = (options or {}).get("trial")
        if isinstance(trial, str):
            trial = self._named(trial)
        elif trial is None:
            trial = self._sample_trial() if not self._trials else self._numbered(seed)
        self._trial, self._steps = trial, 0
        self._last = self.simulator.reset(trial)
        return self._observation(self._last), self._info(False, self.simulator.goal.progress)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step of 0.1 s."""
        if self._trial is None:
            raise ValueError("TabletopEnv: call reset before step")
        step = self.simulator.step(action)
        self._steps += 1
        self._last = step.observation
        truncated = not step.success and self._steps >= self.max_steps
        info = self._info(step.success, step.progress)
        return self._observation(step.observation), float(step.success), step.success, truncated, info

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The last frame if `render_mode` is "rgb_array", else None."""
        return self._last.frame if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Free the renderer."""
        self.simulator.close()

    def _sample_trial(self) -> Trial:
        seed = int(self.np_random.integers(_TRIALS))
        name = self.simulator.embodiment.name
        return training_trials(1, seed, steamer_fraction=self.steamer_fraction, simulator=name)[0]

    def _numbered(self, seed: int | None) -> Trial:
        number = int(self.np_random.integers(len(self._trials))) if seed is None else seed % 1000
        return self._trials[number % len(self._trials)]

    def _named(self, name: str) -> Trial:
        for trial in self.simulator.trials(name.partition("/")[0]):
            if trial.name == name:
                return trial
        raise ValueError(
            f"trial {name!r}: no trial of that name; for example {self.simulator.trials(REGIMES[0])[0].name!r}"
        )

    def _observation(self, observation: Observation) -> dict[str, Any]:
        return {"frame": observation.frame, "state": observation.state, "instruction": observation.instruction}

    def _info(self, success: bool, progress: Any) -> dict[str, Any]:
        assert self._trial is not None
        return {"success": success, "is_success": success, "progress": dict(progress), "trial": self._trial.name}


_ENTRY_POINT = f"{__name__}:{TabletopEnv.__name__}"
gymnasium.register("agra/Tabletop-v0", entry_point=_ENTRY_POINT)
gymnasium.register("agra/TabletopHuman-v0", entry_point=_ENTRY_POINT, kwargs={"hands": "tabletop_human"})
