"""Windows of one source: their starts, and their states, actions and frames (C.2.1).

A window starts at a control step, which is its observation. It has K actions from that step on, and frames at the
source's frame stride.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from agra.data.features.cache import CachedFeature
from agra.data.normalization.normalize import QUANTITIES, NormStats
from agra.data.source import Source
from agra.methods.method import MethodConfig


class Numbers(NamedTuple):
    """States and actions of B windows, padded to the widest embodiment."""

    state: np.ndarray  # (B, S) float32, normalised, zero in dimensions beyond the embodiment's
    states: np.ndarray  # (B, F, S) float32, likewise, of the frames in `Needs.states`
    actions: np.ndarray  # (B, K, D) float32, normalised
    action_mask: np.ndarray  # (B, K, D) bool


class Windows:
    """The windows of a source, by episode and first control step."""

    def __init__(
        self, source: Source, features: Mapping[str, CachedFeature], stats: NormStats, method: MethodConfig
    ) -> None:
        """Raises ValueError where the data does not fit the method, or no window fits into a training episode."""
        self.source, self.features, self.stats = source, features, stats
        shapes = method.shapes
        self.horizon, self.stride = shapes.horizon, source.config.frame_stride
        self.widths = {"state": shapes.state_dim, "action": shapes.action_dim}
        for quantity in QUANTITIES:
            if stats.width(quantity) > self.widths[quantity]:
                raise ValueError(
                    f"{source.dataset.path}: {quantity} has {stats.width(quantity)} dimensions, the method takes at "
                    f"most {self.widths[quantity]}; choose keys with data.{quantity}"
                )
        self.state_frames = method.needs().states
        self.learned = min(source.config.horizon or self.horizon, self.horizon)
        span = max(self.learned, method.needs().last_frame * self.stride + 1)
        self.lengths = source.dataset.lengths
        inside = source.config.past_end == "inside"
        self.starts = np.maximum(self.lengths - span + 1, 0) if inside else self.lengths
        self.training_ends = np.cumsum(self.starts[: len(source.training)])
        if not len(self.training_ends) or self.training_ends[-1] == 0:
            raise ValueError(f"{source.dataset.path}: no window of {span} control steps fits into a training episode")
        self._state_mask = stats.mask("state", source.missing_keys)
        self._action_mask = stats.mask("action", source.missing_keys)

    def rows(self, episode: int, start: int, offsets: np.ndarray) -> np.ndarray:
        """Return the control steps `start + offsets`, clipped to the episode."""
        return np.clip(start + offsets, 0, self.lengths[episode] - 1)

    def numbers(self, pairs: Sequence[tuple[int, int]]) -> Numbers:
        """Return the states and actions of windows (episode, start)."""
        dataset, steps = self.source.dataset, np.arange(self.horizon)
        state = np.stack([dataset.states(e)[s] for e, s in pairs])
        states = np.stack([dataset.states(e)[self.frame_steps(e, s, self.state_frames)] for e, s in pairs])
        actions = np.stack([dataset.actions(e)[self.rows(e, s, steps)] for e, s in pairs])
        past = np.array([s + steps >= self.lengths[e] for e, s in pairs])  # (B, K)
        actions = np.where(past[..., None] & dataset.relative, dataset.no_movement, actions)
        learned = np.broadcast_to(steps < self.learned, past.shape)
        if self.source.config.past_end == "mask":
            learned = learned & ~past
        mask = learned[..., None] & self._action_mask
        return Numbers(
            state=self._state(state),
            states=self._state(states),
            actions=_pad(self.stats.normalize("action", actions) * self._action_mask, self.widths["action"]),
            action_mask=_pad(mask, self.widths["action"]),
        )

    def _state(self, values: np.ndarray) -> np.ndarray:
        """Return states (..., S) in the robot's units as the method sees them."""
        return _pad(self.stats.normalize("state", values) * self._state_mask, self.widths["state"])

    def frame_steps(self, episode: int, start: int, frames: Sequence[int]) -> np.ndarray:
        """Return the control steps of a window's `frames`, which count at the source's stride from the observation."""
        return self.rows(episode, start, np.asarray(frames, dtype=np.int64) * self.stride)

    def recorded(self, episode: int, start: int, frames: Sequence[int]) -> np.ndarray:
        """Return whether each of a window's `frames` lies within the episode, which `frame_steps` clips to."""
        steps = start + np.asarray(frames, dtype=np.int64) * self.stride
        return (steps >= 0) & (steps < self.lengths[episode])

    def clip(self, episode: int, start: int, frames: Sequence[int]) -> np.ndarray:
        """Decode a window's ascending `frames` to (len(frames), H, W, 3) uint8."""
        return self.source.dataset.clip(episode, self.frame_steps(episode, start, frames), threads=1)


def _pad(rows: np.ndarray, width: int) -> np.ndarray:
    """Pad (..., D) to (..., width) with zeros."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])])
