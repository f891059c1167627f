"""Sampling of batches from episodes: the windows of a training step, and their tensors (C.2.1, C.3).

The windows of a step depend on (seed, step) alone, for one dataset or a mixture. A resumed run and any number of ranks
train on the windows of an uninterrupted single process.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agra.batch import Batch
from agra.data.config import DataConfig
from agra.data.features.cache import CachedFeature
from agra.data.features.instruction_tokens import InstructionTokens
from agra.data.features.jobs import resize
from agra.data.features.online import OnlineEncoder
from agra.data.normalization.normalize import NormStats
from agra.data.sampling.augment import augment, shift
from agra.data.sampling.windows import Numbers, Windows
from agra.data.source import Source
from agra.methods.method import MethodConfig

Window = tuple[int, int, int]
"""Source, episode, first control step."""


class WindowSampler:
    """Batches of windows with the content and shapes that a method needs."""

    def __init__(
        self,
        config: DataConfig,
        method: MethodConfig,
        sources: Sequence[Source],
        features: Sequence[Mapping[str, CachedFeature]],
        stats: Mapping[str, NormStats],
        *,
        batch_size: int,
        seed: int,
        instructions: InstructionTokens | None,
        online: OnlineEncoder | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size` counts the windows of all ranks. `features` are the cached features of each source, by name.
        `online` encodes the others.

        Raises ValueError where the data does not fit the method or the config.
        """
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size} must be a multiple of world_size {world_size}, with rank {rank} below it"
            )
        self.config, self.method, self.needs = config, method, method.needs()
        self.sources, self.instructions, self.online = tuple(sources), instructions, online
        # With a shift, cached frames are the pixels of which everything is made.
        self.read_from_cache = () if config.shift else config.cached
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.windows_of = [
            Windows(source, cached, stats[source.dataset.embodiment], method)
            for source, cached in zip(sources, features, strict=True)
        ]
        self.bank_rows = [config.embodiments.index(source.dataset.embodiment) for source in sources]
        weights = np.array([source.config.weight for source in sources])
        self._probabilities = weights / weights.sum()
        self.validation = [(k, e) for k, source in enumerate(sources) for e in source.validation]

    def windows(self, step: int) -> np.ndarray:
        """Return (batch_size, 3) int64: source, episode and first control step of each window of a training step, of
        all ranks.

        Sources are drawn by weight. Windows are uniform over the control steps of the training episodes. The early
        fraction is uniform over the episodes, and then over their first steps.
        """
        count = self.batch_size
        # A separate stream for sources, so that one dataset and a mixture of one give the same windows.
        sources = np.random.default_rng([self.seed, step, 1]).choice(
            len(self.windows_of), size=count, p=self._probabilities
        )
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(np.array([windows.training_ends[-1] for windows in self.windows_of])[sources])
        early = rng.random(count) < self.config.early_window_fraction
        early_episodes = rng.integers(np.array([len(w.source.training) for w in self.windows_of])[sources])
        early_places = rng.random(count)
        result = np.zeros((count, 3), np.int64)
        for index, windows in enumerate(self.windows_of):
            here = sources == index
            uniform = _at(rows[here], windows.training_ends)
            first_steps = np.minimum(windows.starts[early_episodes[here]], self.config.early_window_steps)
            first = np.stack([early_episodes[here], (early_places[here] * first_steps).astype(np.int64)], axis=1)
            result[here, 0] = index
            result[here, 1:] = np.where(early[here, None] & (first_steps > 0)[:, None], first, uniform)
        return result

    def batch(self, step: int) -> Batch:
        """Return this rank's part of the batch of a training step."""
        rows = slice(self.rank, None, self.world_size)
        seeds = np.random.SeedSequence([self.seed, step, 2]).spawn(self.batch_size)[rows]
        return self._assemble(self.windows(step)[rows], seeds)

    def validation_batch(self) -> Batch:
        """Return this rank's part of `batch_size` windows at even distances over the held-out episodes, always the
        same.

        Where there are fewer windows, some repeat, so that the batch divides over ranks and micro-batches as in
        training. Raises ValueError without held-out episodes, or where no window of `past_end=inside` fits into them.
        """
        if not self.validation:
            raise ValueError("validation needs held-out episodes: set data.validation_fraction above 0")
        ends = np.cumsum([self.windows_of[k].starts[e] for k, e in self.validation])
        if ends[-1] == 0:
            raise ValueError(
                "validation: no window fits into a held-out episode with data.past_end inside; choose repeat or mask, or "
                "a larger data.validation_fraction"
            )
        rows = np.linspace(0, ends[-1] - 1, self.batch_size).round().astype(np.int64)
        # A method that divides its batch takes windows from everywhere into each part.
        rows = rows[np.argsort(np.arange(self.batch_size) % self.method.batch_multiple, kind="stable")]
        places = _at(rows, ends)[self.rank :: self.world_size]
        return self._assemble(np.array([(*self.validation[index], start) for index, start in places]))

    def first_batch(self, source: int = 0, count: int | None = None) -> Batch:
        """Return the first window of each held-out episode of a source, in order, or of the first `count` of them."""
        windows = [(source, episode, 0) for episode in self.sources[source].validation[:count]]
        return self._assemble(np.array(windows, dtype=np.int64).reshape(-1, 3))

    def _assemble(self, windows: np.ndarray, seeds: Sequence[np.random.SeedSequence] | None = None) -> Batch:
        numbers = [self._numbers(windows, index) for index in range(len(self.windows_of))]
        order = np.argsort(np.concatenate([np.flatnonzero(windows[:, 0] == k) for k in range(len(self.windows_of))]))
        state, states, actions, mask = (
            np.concatenate(column)[order] for column in zip(*filter(None, numbers), strict=True)
        )
        triples = [(int(k), int(e), int(s)) for k, e, s in windows]
        fields: dict[str, Tensor] = self._features(triples, seeds)
        if self.instructions is not None:
            tokens = [self.instructions.read(self.sources[k].dataset.instruction(e, s)) for k, e, s in triples]
            fields["instruction"] = torch.from_numpy(np.stack(tokens)).float()
        if self.needs.states:
            fields["states"] = torch.from_numpy(states)
        return Batch(
            state=torch.from_numpy(state),
            actions=torch.from_numpy(actions),
            action_mask=torch.from_numpy(mask),
            embodiment=torch.tensor([self.bank_rows[k] for k, _, _ in triples]),
            **fields,
        )

    def _numbers(self, windows: np.ndarray, index: int) -> Numbers | None:
        pairs = [(int(e), int(s)) for k, e, s in windows if k == index]
        return self.windows_of[index].numbers(pairs) if pairs else None

    # --- frames and frozen features -----------------------------------------------------------------------------------

    def _features(self, triples: Sequence[Window], seeds: Sequence[np.random.SeedSequence] | None) -> dict[str, Tensor]:
        """Return the fields of `Batch` that come from frames, read from the cache or encoded from decoded frames."""
        needs, some = self.needs, self.config.target_steps is not None or self.needs.targets_inside
        targeted = [row for row, window in enumerate(triples) if self._has_targets(*window)]
        decoded = self._decode(triples, seeds, targeted)
        fields: dict[str, Tensor] = {}
        if needs.clip:
            fields["latents"] = self._latents(triples, decoded).float()
        if needs.frame_latents:
            fields["frame_latents"] = self._per_frame("frame_latents", triples, needs.frame_latents, decoded).float()
        if needs.frames:
            fields["frames"] = self._per_frame("frames", triples, needs.frames, decoded)
        if needs.features:
            fields["features"] = self._per_frame("targets", triples, needs.features, decoded).float()
        if masked := needs.frame_latents or needs.features:
            recorded = [self.windows_of[k].recorded(e, s, masked) for k, e, s in triples]
            fields["frame_mask"] = torch.from_numpy(np.stack(recorded))
        if needs.targets:
            fields["targets"] = self._targets(triples, targeted, decoded).float()
            if some:
                fields["target_rows"] = torch.tensor(targeted, dtype=torch.long)
        return fields

    def _has_targets(self, source: int, episode: int, start: int) -> bool:
        """True where a window starts within `target_steps` and, for `targets_inside`, its target frames in the episode."""
        windows, limit = self.windows_of[source], self.config.target_steps
        last = start + max(self.needs.targets, default=0) * windows.stride
        inside = not self.needs.targets_inside or last < windows.lengths[episode]
        return inside and (limit is None or start < limit)

    def _decode(
        self, triples: Sequence[Window], seeds: Sequence[np.random.SeedSequence] | None, targeted: Sequence[int]
    ) -> "dict[int, _Decoded]":
        """Decode the frames of uncached features, by row. `seeds` augment and shift them where the config does.

        Where only targets are uncached, only the rows in `targeted` are decoded.
        """
        needs, cached = self.needs, self.read_from_cache
        all_rows = {
            *(range(needs.clip) if "latents" not in cached else ()),
            *(needs.frame_latents if "frame_latents" not in cached else ()),
            *(needs.frames if "frames" not in cached else ()),
            *(needs.features if "targets" not in cached else ()),
        }
        target_frames = set(needs.targets) if "targets" not in cached else set()
        frames = sorted(all_rows | target_frames)
        if not frames:
            return {}
        rows = range(len(triples)) if all_rows else (targeted or [0])  # at least one, for the shape
        decoded = {}
        for row in rows:
            clip = self._pixels(*triples[row], frames)
            if seeds is not None:
                rng = np.random.default_rng(seeds[row])
                if self.config.augment is not None:
                    clip = augment(clip, self.config.augment, rng)
                if self.config.shift:
                    clip = shift(clip, self.config.shift, self.method.shapes.frame_size, rng)
            decoded[row] = _Decoded(frames, clip)
        return decoded

    def _pixels(self, source: int, episode: int, start: int, frames: Sequence[int]) -> np.ndarray:
        """Return a window's `frames` (F, H, W, 3) uint8: resized ones of the cache where it serves shifts, else decoded."""
        windows = self.windows_of[source]
        if self.config.shift and "frames" in self.config.cached:
            return windows.features["frames"].read(episode, rows=windows.frame_steps(episode, start, frames))
        return windows.clip(episode, start, frames)

    def _latents(self, triples: Sequence[Window], decoded: "Mapping[int, _Decoded]") -> Tensor:
        if "latents" in self.read_from_cache:
            read = [self._cached(k, "latents").read(e, rows=[s])[0] for k, e, s in triples]
            return torch.from_numpy(np.stack(read))
        assert self.online is not None
        return self.online.latents([decoded[row].select(range(self.needs.clip)) for row in range(len(triples))])

    def _per_frame(
        self, name: str, triples: Sequence[Window], frames: Sequence[int], decoded: "Mapping[int, _Decoded]"
    ) -> Tensor:
        """Return a feature (B, F, ...) of `frames` of every window."""
        if name in self.read_from_cache:
            read = [
                self._cached(k, name).read(e, rows=self.windows_of[k].frame_steps(e, s, frames)) for k, e, s in triples
            ]
            return torch.from_numpy(np.stack(read))
        selected = [decoded[row].select(frames) for row in range(len(triples))]
        if name == "frames":
            return torch.stack([resize(clip, self.method.shapes.frame_size) for clip in selected])
        assert self.online is not None
        return self.online.frame_latents(selected) if name == "frame_latents" else self.online.teacher_grids(selected)

    def _targets(self, triples: Sequence[Window], targeted: Sequence[int], decoded: "Mapping[int, _Decoded]") -> Tensor:
        """Return the teacher's grids of the windows in `targeted`, and zeros for the others."""
        frames = self.needs.targets
        if "targets" in self.read_from_cache:
            grids = np.zeros((len(triples), len(frames), *self._cached(0, "targets").shape), np.float32)
            for row in targeted:
                source, episode, start = triples[row]
                steps = self.windows_of[source].frame_steps(episode, start, frames)
                grids[row] = self._cached(source, "targets").read(episode, rows=steps)
            return torch.from_numpy(grids)
        assert self.online is not None
        encoded = self.online.teacher_grids([decoded[row].select(frames) for row in targeted or [0]])
        targets = encoded.new_zeros(len(triples), *encoded.shape[1:])
        if targeted:
            targets[torch.tensor(targeted)] = encoded
        return targets

    def _cached(self, source: int, name: str) -> CachedFeature:
        return self.windows_of[source].features[name]


class _Decoded:
    """Decoded frames of a window, by frame number."""

    def __init__(self, numbers: Sequence[int], frames: np.ndarray) -> None:
        self._place, self._frames = {number: place for place, number in enumerate(numbers)}, frames

    def select(self, numbers: Sequence[int]) -> np.ndarray:
        """Return frames (len(numbers), H, W, 3) uint8."""
        return self._frames[[self._place[number] for number in numbers]]


def _at(rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Convert rows, counted over all episodes, to (episode, step). Episode i ends before row `ends[i]`."""
    episodes = np.searchsorted(ends, rows, side="right")
    return np.stack([episodes, rows - np.concatenate([[0], ends])[episodes]], axis=1)
