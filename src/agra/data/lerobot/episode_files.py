"""Episodes as stored on disk: typed rows and encoded videos. Writers take them, and conversion moves them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agra.data.lerobot.json_parquet import REMEDY, matrix, read_json_lines, read_table
from agra.data.lerobot.layout import EPISODES_STATS, V3, DatasetLayout
from agra.data.lerobot.video import cut_video
from agra.data.normalization.dataset_statistics import describe

JsonStatistics = Mapping[str, Mapping[str, Any]]
"""Feature -> statistic -> nested lists, as in JSON and parquet files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RawEpisode:
    """The rows of one episode, and one mp4 for each of its cameras."""

    table: pa.Table
    tasks: Sequence[str]
    videos: Mapping[str, bytes] = field(default_factory=dict)
    picture_statistics: JsonStatistics = field(default_factory=dict)

    def __len__(self) -> int:
        return self.table.num_rows

    def statistics(self, features: Mapping[str, Mapping[str, Any]]) -> JsonStatistics:
        """Return exact statistics of the rows, and the available statistics of the images, in the order of
        `features`.
        """
        rows = {name: as_lists(describe(column)) for name, column in numbers(self.table, features).items()}
        statistics = {**rows, **self.picture_statistics}
        return {name: statistics[name] for name in features if name in statistics}


def numbers(table: pa.Table, features: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the columns of numbers, each as (N, D)."""
    names = [name for name in features if name in table.column_names and is_number(features[name])]
    return {name: _values(table, name) for name in names}


def is_number(feature: Mapping[str, Any]) -> bool:
    """Return whether a feature's values are numbers in the rows."""
    return feature["dtype"] not in ("video", "image", "string")


def as_lists(statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert arrays to nested lists."""
    return {name: np.asarray(value).tolist() for name, value in statistics.items()}


def read_episodes(layout: DatasetLayout) -> Iterator[RawEpisode]:
    """Yield every episode of a dataset of any version, in order. Videos are cut at packets, not encoded again."""
    picture_statistics = _picture_statistics(layout)
    shared: tuple[Path, pa.Table] | None = None
    for entry in layout.entries:
        if shared is None or shared[0] != entry.data:
            shared = entry.data, read_table(entry.data, max_rows=layout.rows)
        table = shared[1]
        if entry.first_row is not None:
            start = entry.first_row - table["index"][0].as_py()
            table = table.slice(start, entry.length) if start >= 0 else table.slice(0, 0)
        if table.num_rows != entry.length or set(table["episode_index"].to_pylist()) != {entry.index}:
            raise ValueError(
                f"{entry.data}: expected the {entry.length} rows of episode {entry.index} that {layout.root / 'meta'}"
                f" lists; {REMEDY}"
            )
        fps = layout.info["fps"]
        yield RawEpisode(
            table=table,
            tasks=entry.tasks,
            videos={c: cut_video(p, start=s, count=entry.length, fps=fps) for c, (p, s) in entry.videos.items()},
            picture_statistics=picture_statistics.get(entry.index, {}),
        )


def _picture_statistics(layout: DatasetLayout) -> Mapping[int, JsonStatistics]:
    """Read the statistics of the cameras from the dataset, by episode. Computing them would take decoding."""
    cameras = layout.names("video", "image")
    if layout.version == V3:
        return _picture_statistics_v3(layout, cameras)
    path = layout.root / EPISODES_STATS
    if not path.is_file():
        return {}
    rows = {row["episode_index"]: row["stats"] for row in read_json_lines(path)}
    return {i: {c: stats[c] for c in cameras if c in stats} for i, stats in rows.items()}


def _picture_statistics_v3(layout: DatasetLayout, cameras: Sequence[str]) -> Mapping[int, JsonStatistics]:
    statistics: dict[int, dict[str, dict[str, Any]]] = {}
    for path in sorted((layout.root / "meta/episodes").glob("chunk-*/file-*.parquet")):
        table = read_table(path)
        names = [n for n in table.column_names if any(n.startswith(f"stats/{c}/") for c in cameras)]
        for row in table.select(["episode_index", *names]).to_pylist():
            episode = statistics.setdefault(row["episode_index"], {})
            for name in names:
                _, rest = name.split("/", 1)
                camera, statistic = rest.rsplit("/", 1)
                episode.setdefault(camera, {})[statistic] = row[name]
    return statistics


def _values(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as (N, D) in its own type."""
    flat = table[name].combine_chunks()
    while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type) or pa.types.is_large_list(flat.type):
        flat = flat.flatten()
    if flat.null_count:
        return matrix(table, name, Path(name))
    return flat.to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
