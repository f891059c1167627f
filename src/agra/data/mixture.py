"""Episodes to batches: which windows a training step sees, and the tensors they become.                 C.2.1, C.3

The windows of a step follow from (seed, step) alone, for one dataset or a mixture: a resumed run, and any number of
ranks, see what an uninterrupted single process would have.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from agra.batch import Batch
from agra.data.augment import AugmentConfig, augment
from agra.data.cache import CachedFeature
from agra.data.instructions import InstructionTokens
from agra.data.normalize import NormStats
from agra.data.source import SourceConfig
from agra.data.sources import Source, open_sources
from agra.data.windows import Numbers, Windows

Features = Mapping[str, CachedFeature]
Encode = Callable[[Sequence[np.ndarray]], Tensor]
"""Clips (T, H, W, 3) uint8 of B windows to their latents (B, C, T, h, w), or reference frames to targets (B, T, H, W, P)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Which data, how it is sampled, and where its frozen features are cached.

    Its own fields describe the one dataset at `path`; with a `mixture` those of its sources count instead, and `path`
    is the folder that their paths are relative to. A window's frame size, number of frames and horizon are the model's
    own and stand in its config.
    """

    mixture: tuple[SourceConfig, ...] = ()
    cache: str = "cache"  # folder of frozen features, shared by all runs
    cached: tuple[Literal["latents", "targets"], ...] = ("latents", "targets")  # the others are computed while training
    embodiments: tuple[str, ...] = ("tabletop",)  # an embodiment's place is its row in the action DiT's banks
    validation_fraction: float = 0.05  # share of each dataset's episodes, the last ones, that training never sees
    early_window_fraction: float = 0.0  # not in the paper: share of the windows that start early in an episode,
    early_window_steps: int = 10  # within so many control steps
    # not in the paper: only windows from these first control steps have teacher targets
    target_steps: int | None = None
    augment: AugmentConfig | None = None  # of clips that are decoded while training

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_window_steps < 1:
            raise ValueError(f"data.early_window_steps: expected at least 1, got {self.early_window_steps}")
        if self.target_steps is not None and self.target_steps < 1:
            raise ValueError(f"data.target_steps: expected at least 1 or None, got {self.target_steps}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction: expected a share in [0, 1), got {self.validation_fraction}")
        if not 0 <= self.early_window_fraction <= 1:
            raise ValueError(
                f"data.early_window_fraction: expected a share in [0, 1], got {self.early_window_fraction}"
            )
        if not self.embodiments or len(set(self.embodiments)) != len(self.embodiments):
            raise ValueError(f"data.embodiments: expected different names, got {self.embodiments}")
        if self.augment is not None and self.cached:
            raise ValueError(f"data.augment: what is cached is not augmented; got data.cached {self.cached}")
        unnamed = [source.path for source in self.mixture if not source.embodiment]
        if unnamed:
            raise ValueError(f"data.mixture: name the embodiment of every source, {unnamed[0]!r} has none")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The datasets that are sampled."""
        return self.mixture or (self,)

    def source(self, embodiment: str) -> SourceConfig:
        """How an embodiment's observations are seen: as the first source of it is."""
        return next((source for source in self.mixture if source.embodiment == embodiment), self)

    def open(self) -> tuple[Source, ...]:
        """The datasets, opened. Raises FileNotFoundError and ValueError as `LeRobotDataset` and `open_sources` do."""
        return open_sources(
            self.sources,
            root=self.path if self.mixture else "",
            embodiments=self.embodiments,
            validation_fraction=self.validation_fraction,
        )


class WindowSampler:
    """Batches of windows; those of a step follow from (seed, step) alone, so a resumed run sees what it would have."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[Source],
        features: Sequence[Features],
        stats: Mapping[str, NormStats],
        *,
        horizon: int,
        num_frames: int,
        references: Sequence[int],
        batch_size: int,
        seed: int,
        max_state_dim: int,
        max_action_dim: int,
        instructions: InstructionTokens,
        encode_latents: Encode | None = None,
        encode_targets: Encode | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size` counts all ranks. `features` are each source's cached ones; "targets" is optional.

        `references` are the frames of a window that stand for its latent frames. Features that are not cached are encoded
        from decoded frames. Raises ValueError where the data does not fit the model or the config.
        """
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of world_size {world_size}, rank {rank} in it"
            )
        self.config, self.sources, self.instructions = config, tuple(sources), instructions
        self.encode_latents, self.encode_targets = encode_latents, encode_targets
        self.references, self.batch_size, self.seed = np.asarray(references), batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.parts = [
            Windows(
                source,
                own,
                stats[source.dataset.embodiment],
                horizon=horizon,
                num_frames=num_frames,
                max_state_dim=max_state_dim,
                max_action_dim=max_action_dim,
            )
            for source, own in zip(sources, features, strict=True)
        ]
        self.rows = [config.embodiments.index(source.dataset.embodiment) for source in sources]
        weights = np.array([source.config.weight for source in sources])
        self._shares = weights / weights.sum()
        self.validation = [(k, e) for k, source in enumerate(sources) for e in source.validation]

    def windows(self, step: int) -> np.ndarray:
        """(batch_size, 3) int64: source, episode and first control step of all ranks' windows of training step `step`.

        Sources by their weight; then uniform over all control steps of the training episodes, or, for the early share,
        over the episodes and then over their first steps.
        """
        count = self.batch_size
        # Sources have a stream of their own, so that one dataset is sampled alike alone and as a mixture of one.
        chosen = np.random.default_rng([self.seed, step, 1]).choice(len(self.parts), size=count, p=self._shares)
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(np.array([part.training_ends[-1] for part in self.parts])[chosen])
        early = rng.random(count) < self.config.early_window_fraction
        early_episodes = rng.integers(np.array([len(part.source.training) for part in self.parts])[chosen])
        early_places = rng.random(count)
        windows = np.zeros((count, 3), np.int64)
        for index, part in enumerate(self.parts):
            own = chosen == index
            uniform = _at(rows[own], part.training_ends)
            first_steps = np.minimum(part.starts[early_episodes[own]], self.config.early_window_steps)
            first = np.stack([early_episodes[own], (early_places[own] * first_steps).astype(np.int64)], axis=1)
            windows[own, 0] = index
            windows[own, 1:] = np.where(early[own, None] & (first_steps > 0)[:, None], first, uniform)
        return windows

    def batch(self, step: int) -> Batch:
        """This rank's share of a training step's windows."""
        mine = slice(self.rank, None, self.world_size)
        draws = np.random.SeedSequence([self.seed, step, 2]).spawn(self.batch_size)[mine]
        return self._assemble(self.windows(step)[mine], draws)

    def validation_batch(self) -> Batch:
        """This rank's share of `batch_size` windows spread evenly over the held-out episodes, always the same ones.

        Where there are fewer, some come more than once, so that they divide over ranks and micro-batches as a step's do.
        Raises ValueError where nothing is held out.
        """
        if not self.validation:
            raise ValueError("validation needs held-out episodes: set data.validation_fraction above 0")
        ends = np.cumsum([self.parts[k].lengths[e] for k, e in self.validation])
        rows = np.linspace(0, ends[-1] - 1, self.batch_size).round().astype(np.int64)
        places = _at(rows, ends)[self.rank :: self.world_size]
        return self._assemble(np.array([(*self.validation[index], start) for index, start in places]))

    def first_batch(self, source: int = 0) -> Batch:
        """The first window of every held-out episode of a source, in order."""
        windows = [(k, episode, 0) for k, episode in self.validation if k == source]
        return self._assemble(np.array(windows, dtype=np.int64).reshape(-1, 3))

    def _assemble(self, windows: np.ndarray, draws: Sequence[np.random.SeedSequence] | None = None) -> Batch:
        numbers = [self._numbers(windows, index) for index in range(len(self.parts))]
        order = np.argsort(np.concatenate([np.flatnonzero(windows[:, 0] == k) for k in range(len(self.parts))]))
        state, actions, mask = (np.concatenate(column)[order] for column in zip(*filter(None, numbers), strict=True))
        triples = [(int(k), int(e), int(s)) for k, e, s in windows]
        latents, targets, has_targets = self._seen(triples, draws)
        instructions = [self.instructions.read(self.sources[k].dataset.instruction(e)) for k, e, _ in triples]
        return Batch(
            latents=latents,
            instruction=torch.from_numpy(np.stack(instructions)).float(),
            state=torch.from_numpy(state),
            actions=torch.from_numpy(actions),
            action_mask=torch.from_numpy(mask),
            embodiment=torch.tensor([self.rows[k] for k, _, _ in triples]),
            targets=targets,
            has_targets=has_targets,
        )

    def _numbers(self, windows: np.ndarray, index: int) -> Numbers | None:
        own = [(int(e), int(s)) for k, e, s in windows if k == index]
        return self.parts[index].numbers(own) if own else None

    def _seen(
        self, triples: Sequence[tuple[int, int, int]], draws: Sequence[np.random.SeedSequence] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Latents, targets and which samples have targets: from the cache, or encoded from decoded frames."""
        limit = self.config.target_steps
        has = [limit is None or start < limit for _, _, start in triples]
        clips = self._clips(triples, draws) if self.encode_latents is not None else None
        if clips is not None:
            assert self.encode_latents is not None
            latents = self.encode_latents(clips)
        else:
            features = [part.features for part in self.parts]
            latents = torch.from_numpy(np.stack([features[k]["latents"].read(e, rows=[s])[0] for k, e, s in triples]))
        if self.encode_targets is not None:
            targets = self._encoded_targets(triples, has, clips, self.encode_targets)
        elif "targets" in self.parts[0].features:
            targets = self._read_targets(triples, has)
        else:
            return latents.float(), None, None
        return latents.float(), targets.float(), None if limit is None else torch.tensor(has)

    def _clips(
        self, triples: Sequence[tuple[int, int, int]], draws: Sequence[np.random.SeedSequence] | None
    ) -> list[np.ndarray]:
        """The windows' decoded frames, augmented where `draws` are given and the config wants it."""
        clips = [self.parts[k].clip(e, s) for k, e, s in triples]
        if self.config.augment is None or draws is None:
            return clips
        pairs = zip(clips, draws, strict=True)
        return [augment(clip, self.config.augment, np.random.default_rng(draw)) for clip, draw in pairs]

    def _encoded_targets(
        self,
        triples: Sequence[tuple[int, int, int]],
        has: Sequence[bool],
        clips: Sequence[np.ndarray] | None,
        encode: Encode,
    ) -> Tensor:
        """The teacher's grids of the reference frames of the windows that have targets; zeros for the others."""
        rows = np.flatnonzero(has).tolist() or [0]  # one at least, for the shape
        if clips is None:
            frames = [
                self.sources[k].dataset.clip(e, self._reference_steps(k, e, s), threads=1)
                for k, e, s in (triples[row] for row in rows)
            ]
        else:
            frames = [clips[row][self.references] for row in rows]
        encoded = encode(frames)
        targets = encoded.new_zeros(len(triples), *encoded.shape[1:])
        targets[rows] = encoded
        return targets * torch.tensor(has).view(-1, *[1] * (targets.ndim - 1))

    def _read_targets(self, triples: Sequence[tuple[int, int, int]], has: Sequence[bool]) -> Tensor:
        """The teacher's grids of the windows' reference frames; zeros where there are none."""
        shape = self.parts[0].features["targets"].shape
        grids = np.zeros((len(triples), len(self.references), *shape), np.float32)
        for index in np.flatnonzero(has).tolist():
            source, episode, start = triples[index]
            rows = self._reference_steps(source, episode, start)
            grids[index] = self.parts[source].features["targets"].read(episode, rows=rows)
        return torch.from_numpy(grids)

    def _reference_steps(self, source: int, episode: int, start: int) -> np.ndarray:
        part = self.parts[source]
        return part.rows(episode, start, self.references * part.source.config.frame_stride)


def _at(rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Rows counted over episodes that end at `ends` to (episode, step)."""
    episodes = np.searchsorted(ends, rows, side="right")
    return np.stack([episodes, rows - np.concatenate([[0], ends])[episodes]], axis=1)
