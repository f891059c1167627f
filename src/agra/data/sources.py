"""The datasets of a mixture, opened: which episodes train, what their embodiments are, and their statistics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from agra.data.lerobot import LeRobotDataset
from agra.data.normalize import NormStats
from agra.data.source import SourceConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One dataset of a mixture. The last episodes are held out; training sees the first ones that are left."""

    config: SourceConfig
    dataset: LeRobotDataset
    training: range
    validation: range

    @classmethod
    def open(cls, config: SourceConfig, root: str, validation_fraction: float) -> "Source":
        """Raises ValueError where nothing is left to train on, and as `LeRobotDataset` does."""
        dataset = LeRobotDataset.of(config, root)
        validation = held_out(dataset.num_episodes, validation_fraction)
        training = range(min(dataset.num_episodes - len(validation), config.training_episodes or dataset.num_episodes))
        return cls(config=config, dataset=dataset, training=training, validation=validation)

    @property
    def lacks(self) -> tuple[str, ...]:
        """Keys that the embodiment has and this dataset has not."""
        return self.config.lacks

    @property
    def episodes(self) -> Iterable[int]:
        """The episodes that statistics are taken of: all, or the training ones where the source limits them."""
        return range(self.dataset.num_episodes) if self.config.training_episodes is None else self.training

    @property
    def used(self) -> tuple[int, ...]:
        """The episodes that training or validation reads."""
        return (*self.training, *self.validation)

    def states(self, episode: int) -> np.ndarray:
        """(N, S) float32."""
        return self.dataset.states(episode)

    def actions(self, episode: int) -> np.ndarray:
        """(N, D) float32."""
        return self.dataset.actions(episode)


def held_out(num_episodes: int, fraction: float) -> range:
    """The episodes kept for validation: the last ones, at least one where the fraction is not 0."""
    if fraction == 0:
        return range(0)
    count = max(1, round(num_episodes * fraction))
    if count >= num_episodes:
        raise ValueError(f"data.validation_fraction {fraction} leaves none of {num_episodes} episodes")
    return range(num_episodes - count, num_episodes)


def open_sources(
    configs: Sequence[SourceConfig], *, root: str, embodiments: Sequence[str], validation_fraction: float
) -> tuple[Source, ...]:
    """Open every dataset of a mixture.

    Raises ValueError for an embodiment that is none of `embodiments`, or where datasets of one disagree about it.
    """
    sources = tuple(Source.open(config, root, validation_fraction) for config in configs)
    for source in sources:
        own = source.dataset
        if own.embodiment not in embodiments:
            raise ValueError(
                f"{own.path}: embodiment {own.embodiment!r} is not in data.embodiments {tuple(embodiments)}"
            )
        own.fill([s.dataset for s in sources if s is not source and s.dataset.embodiment == own.embodiment])
    return sources


def embodiment_stats(sources: Sequence[Source]) -> dict[str, NormStats]:
    """Exact statistics of every embodiment, over all of its datasets together."""
    found = {}
    for embodiment in dict.fromkeys(source.dataset.embodiment for source in sources):
        own = [source for source in sources if source.dataset.embodiment == embodiment]
        first = own[0]
        for source in own[1:]:
            if _methods(source) != _methods(first):
                raise ValueError(
                    f"{first.dataset.path} and {source.dataset.path}: both are of embodiment {embodiment!r} and differ in"
                    " their normalisation"
                )
        found[embodiment] = NormStats.of(
            own,
            first.config.normalization,
            state_parts=first.dataset.parts("state"),
            action_parts=first.dataset.parts("action"),
        )
    return found


def _methods(source: Source) -> tuple:
    config = source.config
    return config.normalization, source.dataset.parts("state"), source.dataset.parts("action")
