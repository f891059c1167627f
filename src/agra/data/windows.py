"""The windows of one source: where they may start, and the numbers that belong to them.                           C.2.1

A window starts at a control step, its observation: K actions from there on, and frames at the source's stride.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from agra.data.cache import CachedFeature
from agra.data.normalize import NormStats
from agra.data.sources import Source


class Numbers(NamedTuple):
    """What the rows give for B windows, padded to the widest embodiment."""

    state: np.ndarray  # (B, S) float32, normalised, zero where the embodiment lacks a dimension
    actions: np.ndarray  # (B, K, D) float32, normalised
    action_mask: np.ndarray  # (B, K, D) bool


class Windows:
    """A source's windows, by episode and first control step."""

    def __init__(
        self,
        source: Source,
        features: Mapping[str, CachedFeature],
        stats: NormStats,
        *,
        horizon: int,
        num_frames: int,
        max_state_dim: int,
        max_action_dim: int,
    ) -> None:
        """Raises ValueError where the data does not fit the model, or no window fits into an episode."""
        self.source, self.features, self.stats = source, features, stats
        self.horizon, self.num_frames = horizon, num_frames
        self.widths = {"state": max_state_dim, "action": max_action_dim}
        for quantity, width in self.widths.items():
            if stats.width(quantity) > width:  # type: ignore[arg-type]
                raise ValueError(
                    f"{source.dataset.path}: {quantity} has {stats.width(quantity)} dimensions,"  # type: ignore[arg-type]
                    f" the model takes {width}"
                )
        self.learned = min(source.config.horizon or horizon, horizon)
        span = max(self.learned, (num_frames - 1) * source.config.frame_stride + 1)
        lengths = source.dataset.lengths
        self.lengths = lengths
        self.starts = np.maximum(lengths - span + 1, 0) if source.config.past_end == "inside" else lengths
        self.training_ends = np.cumsum(self.starts[: len(source.training)])
        if not len(self.training_ends) or self.training_ends[-1] == 0:
            raise ValueError(f"{source.dataset.path}: no window of {span} control steps fits into a training episode")
        self._state_mask = stats.mask("state", source.lacks)
        self._action_mask = stats.mask("action", source.lacks)

    def rows(self, episode: int, start: int, offsets: np.ndarray) -> np.ndarray:
        """The control steps `start + offsets`; past the episode's end, its last one."""
        return np.minimum(start + offsets, self.lengths[episode] - 1)

    def numbers(self, pairs: Sequence[tuple[int, int]]) -> Numbers:
        """States and actions of windows, given as (episode, start)."""
        dataset, steps = self.source.dataset, np.arange(self.horizon)
        states = np.stack([dataset.states(e)[s] for e, s in pairs])
        actions = np.stack([dataset.actions(e)[self.rows(e, s, steps)] for e, s in pairs])
        past = np.array([s + steps >= self.lengths[e] for e, s in pairs])  # (B, K)
        actions = np.where(past[..., None] & dataset.relative, 0, actions)
        learned = np.broadcast_to(steps < self.learned, past.shape)
        if self.source.config.past_end == "mask":
            learned = learned & ~past
        mask = learned[..., None] & self._action_mask
        return Numbers(
            state=_pad(self.stats.normalize("state", states) * self._state_mask, self.widths["state"]),
            actions=_pad(self.stats.normalize("action", actions) * self._action_mask, self.widths["action"]),
            action_mask=_pad(mask, self.widths["action"]),
        )

    def frame_steps(self, episode: int, start: int) -> np.ndarray:
        """(num_frames,) control steps of a window's frames."""
        return self.rows(episode, start, np.arange(self.num_frames) * self.source.config.frame_stride)

    def clip(self, episode: int, start: int) -> np.ndarray:
        """(num_frames, H, W, 3) uint8: a window's frames, decoded."""
        return self.source.dataset.clip(episode, self.frame_steps(episode, start), threads=1)


def _pad(rows: np.ndarray, width: int) -> np.ndarray:
    """(..., D) to (..., width) with zeros."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])])
