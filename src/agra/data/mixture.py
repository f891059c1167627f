"""Episodes to batches: which windows a training step sees, and the tensors they become.                 C.2.1, C.3

A window starts at a control step, its observation: K actions from there on, and latents and teacher targets of the
frames at `frame_stride`, all cached beforehand. Past the episode's end the last row repeats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agra.batch import Batch
from agra.data.cache import CachedFeature
from agra.data.lerobot import EGO_VIEW, LeRobotDataset
from agra.data.normalize import METHODS, Method, NormStats


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, how it is sampled, and where its frozen features are cached.

    A window's frame size, number of frames and horizon are the model's own and stand in its config.
    """

    path: str = ""  # a LeRobot v3.0 dataset
    camera: str = EGO_VIEW
    cache: str = "cache"  # folder of frozen features, shared by all runs
    embodiments: tuple[str, ...] = ("tabletop",)  # an embodiment's place is its row in the action DiT's banks
    frame_stride: int = 1  # control steps between a window's frames: 1 in simulation, 3 on the robot
    normalization: Method = "min_max"
    validation_fraction: float = 0.05  # share of the episodes, the last ones, that training never sees
    early_window_fraction: float = 0.0  # not in the paper: share of the windows that start early in an episode,
    early_window_steps: int = 10  # within so many control steps
    target_steps: int | None = (
        None  # not in the paper: only windows from these first control steps have teacher targets
    )

    def __post_init__(self) -> None:
        for name in ("frame_stride", "early_window_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: expected at least 1, got {getattr(self, name)}")
        if self.target_steps is not None and self.target_steps < 1:
            raise ValueError(f"data.target_steps: expected at least 1 or None, got {self.target_steps}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction: expected a share in [0, 1), got {self.validation_fraction}")
        if not 0 <= self.early_window_fraction <= 1:
            raise ValueError(
                f"data.early_window_fraction: expected a share in [0, 1], got {self.early_window_fraction}"
            )
        if self.normalization not in METHODS:
            raise ValueError(f"data.normalization: expected one of {', '.join(METHODS)}, got {self.normalization!r}")
        if not self.embodiments or len(set(self.embodiments)) != len(self.embodiments):
            raise ValueError(f"data.embodiments: expected different names, got {self.embodiments}")


def held_out(num_episodes: int, config: DataConfig) -> range:
    """The episodes kept for validation: the last ones, at least one where the fraction is not 0."""
    if config.validation_fraction == 0:
        return range(0)
    count = max(1, round(num_episodes * config.validation_fraction))
    if count >= num_episodes:
        raise ValueError(
            f"data.validation_fraction {config.validation_fraction} leaves none of {num_episodes} episodes"
        )
    return range(num_episodes - count, num_episodes)


class WindowSampler:
    """Batches of windows; those of a step follow from (seed, step) alone, so a resumed run sees what it would have."""

    def __init__(
        self,
        config: DataConfig,
        dataset: LeRobotDataset,
        features: Mapping[str, CachedFeature],
        stats: Mapping[str, NormStats],
        *,
        horizon: int,
        references: Sequence[int],
        batch_size: int,
        seed: int,
        max_state_dim: int,
        max_action_dim: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size` counts all ranks. Of `features`, "targets" is optional; `references` are its control steps.

        `references` are relative to the observation, one for each latent frame (stride included). Raises ValueError
        where the data does not fit the model or the config.
        """
        if dataset.embodiment not in config.embodiments:
            raise ValueError(
                f"{dataset.path}: embodiment {dataset.embodiment!r} is not in data.embodiments {config.embodiments}"
            )
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of world_size {world_size}, rank {rank} in it"
            )
        self.config, self.features, self.horizon = config, features, horizon
        self.references, self.batch_size, self.seed = np.asarray(references), batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.lengths = dataset.lengths
        self.embodiment = config.embodiments.index(dataset.embodiment)
        own = stats[dataset.embodiment]
        self.action_dim = own.action_dim
        episodes = range(dataset.num_episodes)
        states = [own.normalize("state", dataset.states(i)) for i in episodes]
        actions = [own.normalize("action", dataset.actions(i)) for i in episodes]
        self._states = [_pad(rows, max_state_dim, f"{dataset.path}: state") for rows in states]
        self._actions = [_pad(rows, max_action_dim, f"{dataset.path}: action") for rows in actions]
        self.validation = held_out(dataset.num_episodes, config)
        self.training = range(dataset.num_episodes - len(self.validation))
        self._training_ends = np.cumsum(self.lengths[: len(self.training)])

    def windows(self, step: int) -> np.ndarray:
        """(batch_size, 2) int64: episode and first control step of all ranks' windows of training step `step`.

        Uniform over all control steps of the training episodes; the early share is uniform over the episodes and then
        over their first steps.
        """
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(self._training_ends[-1], size=self.batch_size)
        early = rng.random(self.batch_size) < self.config.early_window_fraction
        early_episodes = rng.integers(len(self.training), size=self.batch_size)
        early_places = rng.random(self.batch_size)
        uniform = self._at(rows, self._training_ends)
        first_steps = np.minimum(self.lengths[early_episodes], self.config.early_window_steps)
        starts = np.stack([early_episodes, (early_places * first_steps).astype(np.int64)], axis=1)
        return np.where(early[:, None], starts, uniform)

    def batch(self, step: int) -> Batch:
        """This rank's share of a training step's windows."""
        return self._assemble(self.windows(step)[self.rank :: self.world_size])

    def validation_batch(self) -> Batch:
        """Up to `batch_size` windows spread evenly over the held-out episodes, always the same, on every rank.

        Raises ValueError where nothing is held out.
        """
        if not self.validation:
            raise ValueError("validation needs held-out episodes: set data.validation_fraction above 0")
        ends = np.cumsum(self.lengths[self.validation.start :])
        rows = np.linspace(0, ends[-1] - 1, min(self.batch_size, int(ends[-1]))).round().astype(np.int64)
        windows = self._at(rows, ends)
        windows[:, 0] += self.validation.start
        return self._assemble(windows)

    def first_batch(self) -> Batch:
        """The first window of every held-out episode, in order."""
        return self._assemble(np.array([(episode, 0) for episode in self.validation], dtype=np.int64).reshape(-1, 2))

    @staticmethod
    def _at(rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Rows counted over episodes that end at `ends` to (episode, step)."""
        episodes = np.searchsorted(ends, rows, side="right")
        return np.stack([episodes, rows - np.concatenate([[0], ends])[episodes]], axis=1)

    def _assemble(self, windows: np.ndarray) -> Batch:
        pairs = [(int(episode), int(start)) for episode, start in windows]
        actions = np.stack([self._actions[e][self._rows(e, s, np.arange(self.horizon))] for e, s in pairs])
        mask = np.zeros(actions.shape, dtype=bool)
        mask[..., : self.action_dim] = True
        targets, has_targets = self._targets(pairs)
        latents = [self.features["latents"].read(e, rows=[s])[0] for e, s in pairs]
        return Batch(
            latents=torch.from_numpy(np.stack(latents)).float(),
            instruction=torch.from_numpy(np.stack([self.features["instruction"].read(e) for e, _ in pairs])).float(),
            state=torch.from_numpy(np.stack([self._states[e][s] for e, s in pairs])),
            actions=torch.from_numpy(actions),
            action_mask=torch.from_numpy(mask),
            embodiment=torch.full((len(pairs),), self.embodiment),
            targets=targets,
            has_targets=has_targets,
        )

    def _targets(self, pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The teacher's grids of the windows' reference frames; zeros for a window past `target_steps`."""
        if "targets" not in self.features:
            return None, None
        feature, limit = self.features["targets"], self.config.target_steps
        has = [limit is None or start < limit for _, start in pairs]
        grids = np.zeros((len(pairs), len(self.references), *feature.shape), np.float32)
        for index in np.flatnonzero(has):
            episode, start = pairs[index]
            grids[index] = feature.read(episode, rows=self._rows(episode, start, self.references))
        return torch.from_numpy(grids), None if limit is None else torch.tensor(has)

    def _rows(self, episode: int, start: int, offsets: np.ndarray) -> np.ndarray:
        return np.minimum(start + offsets, self.lengths[episode] - 1)


def _pad(rows: np.ndarray, width: int, what: str) -> np.ndarray:
    """(N, D) to (N, width) with zeros."""
    if rows.shape[1] > width:
        raise ValueError(f"{what} has {rows.shape[1]} dimensions, the model takes {width}")
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))
