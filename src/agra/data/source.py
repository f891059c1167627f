"""Opened datasets of a run: their training and validation episodes, embodiments and statistics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from agra.data.config import DataConfig, SourceConfig
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.normalization.normalize import QUANTITIES, NormStats


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One dataset of a run. The last episodes are held out for validation, the first ones of the rest train."""

    config: SourceConfig
    dataset: LeRobotDataset
    training: range
    validation: range

    @classmethod
    def open(cls, config: SourceConfig, root: str, validation_fraction: float) -> "Source":
        """Open the dataset. Raises ValueError where no training episode is left, and the errors of `LeRobotDataset`."""
        dataset = LeRobotDataset.of(config, root)
        validation = held_out(dataset.num_episodes, validation_fraction)
        training = range(min(dataset.num_episodes - len(validation), config.training_episodes or dataset.num_episodes))
        return cls(config=config, dataset=dataset, training=training, validation=validation)

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Keys of the embodiment that are absent from this dataset."""
        return self.config.missing_keys

    @property
    def episodes(self) -> Iterable[int]:
        """Episodes of the statistics: all, or the training episodes where `training_episodes` limits them."""
        return range(self.dataset.num_episodes) if self.config.training_episodes is None else self.training

    @property
    def used(self) -> tuple[int, ...]:
        """Episodes of training and validation."""
        return (*self.training, *self.validation)

    def states(self, episode: int) -> np.ndarray:
        """Return the states (N, S) float32 of an episode."""
        return self.dataset.states(episode)

    def actions(self, episode: int) -> np.ndarray:
        """Return the actions (N, D) float32 of an episode."""
        return self.dataset.actions(episode)


def held_out(num_episodes: int, fraction: float) -> range:
    """Return the validation episodes: the last ones, at least one where the fraction is not 0."""
    if fraction == 0:
        return range(0)
    count = max(1, round(num_episodes * fraction))
    if count >= num_episodes:
        raise ValueError(
            f"data.validation_fraction: {fraction} of {num_episodes} episodes leaves none to train on; "
            + ("set it to 0, without validation" if num_episodes == 1 else "choose a smaller fraction")
        )
    return range(num_episodes - count, num_episodes)


def open_sources(config: DataConfig) -> tuple[Source, ...]:
    """Open the datasets of a run.

    Raises the errors of `LeRobotDataset`, and ValueError for an embodiment outside `config.embodiments` or for datasets
    of one embodiment with different keys.
    """
    sources = tuple(Source.open(source, config.root, config.validation_fraction) for source in config.sources)
    for source in sources:
        dataset = source.dataset
        if dataset.embodiment not in config.embodiments:
            raise ValueError(
                f"{dataset.path}: embodiment {dataset.embodiment!r} is not in data.embodiments {config.embodiments}; "
                "add it there, or rename it with data.embodiment"
            )
        dataset.resolve_missing_keys(
            [s.dataset for s in sources if s is not source and s.dataset.embodiment == dataset.embodiment]
        )
    return sources


def embodiment_stats(sources: Sequence[Source]) -> dict[str, NormStats]:
    """Compute the exact statistics of every embodiment over all of its datasets together.

    Raises ValueError where datasets of one embodiment differ in their normalisation, or where `q01_q99` would lose a
    dimension.
    """
    stats = {}
    for embodiment in dict.fromkeys(source.dataset.embodiment for source in sources):
        group = [source for source in sources if source.dataset.embodiment == embodiment]
        first = group[0]
        for source in group[1:]:
            if _methods(source) != _methods(first):
                raise ValueError(
                    f"{first.dataset.path} and {source.dataset.path}: datasets of embodiment {embodiment!r} differ in"
                    " their normalisation; give them the same methods"
                )
        stats[embodiment] = NormStats.of(
            group,
            first.config.normalization,
            state_parts=first.dataset.parts("state"),
            action_parts=first.dataset.parts("action"),
        )
        _check_quantiles(first.dataset, stats[embodiment])
    return stats


def _check_quantiles(dataset: LeRobotDataset, stats: NormStats) -> None:
    """Raise ValueError where `q01_q99` would make a constant of a dimension that changes in few rows."""
    for quantity in QUANTITIES:
        values = stats.state if quantity == "state" else stats.action
        names = dataset.state_names if quantity == "state" else dataset.action_names
        for part in stats.parts(quantity):
            if part.method != "q01_q99":
                continue
            for dimension in range(part.start, part.end):
                low, high, usual = (float(values[name][dimension]) for name in ("min", "max", "q01"))
                if low < high and usual == values["q99"][dimension]:
                    raise ValueError(
                        f"{dataset.path}: {quantity} dimension {dimension} ({names[dimension]}) is {usual:g} in 98 % of"
                        f" the rows and {low:g} to {high:g} in all; q01_q99 would make it constant. Give its key another"
                        f" method (data.{quantity} KEY:min_max), or set data.normalization to min_max"
                    )


def recorded_sizes(sources: Sequence[Source]) -> dict[str, dict[str, tuple[int, int]]]:
    """Read the height and width of each camera's recorded frames, for the embodiments whose first source crops them."""
    first = {source.dataset.embodiment: source for source in reversed(sources)}
    cropped = {name: source.dataset for name, source in first.items() if source.config.crops}
    return {name: dataset.cameras.sizes(dataset.layout.entries[0]) for name, dataset in cropped.items()}


def _methods(source: Source) -> tuple:
    config = source.config
    return config.normalization, source.dataset.parts("state"), source.dataset.parts("action")
