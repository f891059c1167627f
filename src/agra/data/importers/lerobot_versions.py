"""Conversion of LeRobot datasets between v2.0, v2.1 and v3.0.

Rows keep their types and videos their packets. Statistics of rows are computed again, exactly. Statistics of images are
copied, and computed where the source has none. Other files under meta, such as modality.json, are copied.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from agra import files
from agra.data.lerobot import layout as names_v2
from agra.data.lerobot.checksums import CHECKSUMS, Seal, dataset_files, seal
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.episode_files import JsonStatistics, RawEpisode, as_lists, is_number, numbers, read_episodes
from agra.data.lerobot.files_v3 import DATA_FILE_MIB, FILES_PER_CHUNK, VIDEO_FILE_MIB, FilesV3, info_v3
from agra.data.lerobot.json_parquet import read_json, read_table, write_json, write_json_lines
from agra.data.lerobot.layout import EPISODES, EPISODES_STATS, INFO, STATS, TASKS_V2, V2, V3, DatasetLayout
from agra.data.normalization.dataset_statistics import Statistics, describe_pictures, describe_stream, picture_histogram
from agra.hub import dataset_folder

VERSIONS = (*V2, V3)


def convert(
    source: str | Path, output: Path, version: str, *, finish: Callable[[Path], None] = lambda root: None
) -> Path:
    """Write the dataset `source` (a folder or a hub id) as `version` into the new folder `output`.

    `finish` may change the written folder before its checksums are made and it gets its name. Raises ValueError for an
    unknown version, an output that exists or that another process writes, or a damaged source, FileNotFoundError for a
    missing source, and OSError where the disk is full. Nothing is left on disk then.
    """
    if version not in VERSIONS:
        raise ValueError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}")
    files.refuse_existing(output)
    path = dataset_folder(str(source))
    layout, checksums = DatasetLayout.read(path), Seal(path)
    for name in checksums.names:
        checksums.verify(path / name)
    with files.naming(output), files.building(output) as partial:
        if version == V3:
            _to_v3(layout, partial)
        else:
            _to_v2(layout, partial, version)
        _copy_other_metadata(layout, partial)
        finish(partial)
        seal(partial)
    return output


def _to_v3(layout: DatasetLayout, root: Path) -> None:
    info, features = layout.info, layout.info["features"]
    writer = FilesV3(
        root,
        fps=info["fps"],
        data_file_mib=info.get("data_files_size_in_mb", DATA_FILE_MIB),
        video_file_mib=info.get("video_files_size_in_mb", VIDEO_FILE_MIB),
        files_per_chunk=info.get("chunks_size", FILES_PER_CHUNK),
    )
    images = _ImageStatistics(layout)
    try:
        for index, episode in enumerate(read_episodes(layout)):
            writer.add(images.complete(index, episode), features)
        writer.finish({text: index for index, text in layout.tasks.items()})
    finally:
        writer.discard()
    _write_stats(layout, root, writer.statistics(features), images)
    shared = {key: value for key, value in info.items() if key not in ("total_videos", "total_chunks")}
    tasks = len(layout.tasks)
    write_json(root / INFO, info_v3(shared, files=writer, tasks=tasks, features=features, splits=_splits(info)))


def _to_v2(layout: DatasetLayout, root: Path, version: str) -> None:
    info, features = layout.info, layout.info["features"]
    chunk_size, images = info.get("chunks_size", FILES_PER_CHUNK), _ImageStatistics(layout)
    statistics, rows = [], []
    for index, episode in enumerate(read_episodes(layout)):
        episode = images.complete(index, episode)
        names = {"episode_index": index, "episode_chunk": index // chunk_size}
        pq.write_table(episode.table, _new_file(root / names_v2.DATA_PATH_V2.format(**names)))
        for camera, video in episode.videos.items():
            _new_file(root / names_v2.VIDEO_PATH_V2.format(video_key=camera, **names)).write_bytes(video)
        rows.append({"episode_index": index, "tasks": list(episode.tasks), "length": len(episode)})
        statistics.append({"episode_index": index, "stats": episode.statistics(features)})
    write_json_lines(root / EPISODES, rows)
    if version != V2[0]:
        write_json_lines(root / EPISODES_STATS, statistics)
    write_json_lines(root / TASKS_V2, ({"task_index": i, "task": text} for i, text in layout.tasks.items()))
    _write_stats(layout, root, _row_statistics(root, len(rows), chunk_size, features), images)
    write_json(root / INFO, _info_v2(info, version, len(rows), chunk_size, len(layout.tasks)))


def _info_v2(info: Mapping[str, Any], version: str, episodes: int, chunk_size: int, tasks: int) -> dict[str, Any]:
    videos = sum(feature["dtype"] == "video" for feature in info["features"].values())
    return dict(info) | {
        "codebase_version": version,
        "total_episodes": episodes,
        "total_tasks": tasks,
        "total_videos": videos * episodes,
        "total_chunks": -(-episodes // chunk_size),
        "chunks_size": chunk_size,
        "splits": _splits(info),
        "data_path": names_v2.DATA_PATH_V2,
        "video_path": names_v2.VIDEO_PATH_V2 if videos else None,
    }


def _splits(info: Mapping[str, Any]) -> Mapping[str, str]:
    return info.get("splits") or {"train": f"0:{info['total_episodes']}"}


class _ImageStatistics:
    """Statistics of a dataset's images: those of its metadata, and decoded ones where it has none."""

    def __init__(self, layout: DatasetLayout) -> None:
        self.layout = layout
        self.cameras = layout.names("video", "image")
        self.histograms: dict[str, np.ndarray] = {}
        self._datasets: dict[str, LeRobotDataset] = {}
        stats = layout.root / STATS
        self.stored = {c: s for c, s in read_json(stats).items() if c in self.cameras} if stats.is_file() else {}

    def complete(self, index: int, episode: RawEpisode) -> RawEpisode:
        """Return the episode with the statistics of all cameras. Adds its images to `histograms` where needed."""
        statistics = dict(episode.picture_statistics)
        for camera in self.cameras:
            if camera in statistics and camera in self.stored:
                continue
            if camera not in self._datasets:
                self._datasets[camera] = LeRobotDataset(self.layout.root, camera=camera)
            histogram = picture_histogram(self._datasets[camera].frames(index))
            self.histograms[camera] = self.histograms.get(camera, 0) + histogram
            statistics.setdefault(camera, as_lists(describe_pictures(histogram, count=len(episode))))
        return replace(episode, picture_statistics=statistics)

    def all(self) -> dict[str, Any]:
        """Return the statistics over the whole dataset, by camera."""
        frames = sum(entry.length for entry in self.layout.entries)
        computed = {c: as_lists(describe_pictures(h, count=frames)) for c, h in self.histograms.items()}
        return computed | self.stored


def _write_stats(layout: DatasetLayout, root: Path, rows: JsonStatistics, images: _ImageStatistics) -> None:
    statistics = images.all() | dict(rows)
    write_json(root / STATS, {name: statistics[name] for name in layout.info["features"] if name in statistics})


def _row_statistics(root: Path, episodes: int, chunk_size: int, features: Mapping[str, Any]) -> JsonStatistics:
    paths = [
        root / names_v2.DATA_PATH_V2.format(episode_index=i, episode_chunk=i // chunk_size) for i in range(episodes)
    ]

    def column_statistics(name: str) -> Statistics:
        return describe_stream(lambda: (numbers(read_table(p, [name]), {name: features[name]})[name] for p in paths))

    return {name: as_lists(column_statistics(name)) for name, feature in features.items() if is_number(feature)}


def _copy_other_metadata(layout: DatasetLayout, root: Path) -> None:
    """Copy the files under meta that belong to no version."""
    converted = {INFO, STATS, names_v2.TASKS, TASKS_V2, EPISODES, EPISODES_STATS, CHECKSUMS}
    for name in dataset_files(layout.root):
        if name.startswith("meta/") and name not in converted and not name.startswith("meta/episodes/"):
            shutil.copyfile(layout.root / name, _new_file(root / name))


def _new_file(path: Path) -> Path:
    """Return `path` after its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
