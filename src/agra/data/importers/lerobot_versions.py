"""LeRobot datasets from one version to another: v2.0, v2.1 and v3.0, either way.

Rows keep their types and videos their packets. Statistics of rows are computed anew, exactly; those of pictures are taken
along, and computed where the source has none. Other files under meta, such as modality.json, come along.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from agra.data.lerobot import layout as places
from agra.data.lerobot.checksums import CHECKSUMS, Seal, dataset_files, seal
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.episode_files import JsonStatistics, RawEpisode, as_lists, is_number, numbers, read_episodes
from agra.data.lerobot.files_v3 import DATA_FILE_MIB, FILES_PER_CHUNK, VIDEO_FILE_MIB, FilesV3, info_v3
from agra.data.lerobot.json_parquet import read_json, read_table, write_json, write_json_lines
from agra.data.lerobot.layout import EPISODES, EPISODES_STATS, INFO, STATS, TASKS_V2, V2, V3, DatasetLayout
from agra.data.normalization.dataset_statistics import Statistics, describe_pictures, describe_stream, picture_histogram
from agra.hub import dataset_folder

VERSIONS = (*V2, V3)


def convert(source: str | Path, output: Path, version: str) -> Path:
    """Write the dataset `source` (a folder or a hub id) as `version` into `output`, which must not exist yet.

    Raises ValueError for an unknown version, an output that is there, or a damaged source, and FileNotFoundError.
    """
    if version not in VERSIONS:
        raise ValueError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}")
    if output.exists():
        raise ValueError(f"{output}: already exists; choose another output or remove it")
    path = dataset_folder(str(source))
    found, sealed = DatasetLayout.read(path), Seal(path)
    for name in dataset_files(path):
        sealed.verify(path / name)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (_to_v3 if version == V3 else _to_v2)(found, partial, version)
        _copy_the_rest(found, partial)
        seal(partial)
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _to_v3(found: DatasetLayout, root: Path, version: str) -> None:
    info, features = found.info, found.info["features"]
    files = FilesV3(
        root,
        fps=info["fps"],
        data_file_mib=info.get("data_files_size_in_mb", DATA_FILE_MIB),
        video_file_mib=info.get("video_files_size_in_mb", VIDEO_FILE_MIB),
        files_per_chunk=info.get("chunks_size", FILES_PER_CHUNK),
    )
    pictures = _Pictures(found)
    for index, episode in enumerate(read_episodes(found)):
        files.add(pictures.complete(index, episode), features)
    files.finish({text: index for index, text in found.tasks.items()})
    _write_stats(found, root, files.statistics(features), pictures)
    dropped = ("total_videos", "total_chunks")
    kept = {key: value for key, value in info.items() if key not in dropped}
    write_json(root / INFO, info_v3(kept, files=files, tasks=len(found.tasks), features=features, splits=_splits(info)))


def _to_v2(found: DatasetLayout, root: Path, version: str) -> None:
    info, features = found.info, found.info["features"]
    chunk_size, pictures = info.get("chunks_size", FILES_PER_CHUNK), _Pictures(found)
    statistics, rows = [], []
    for index, episode in enumerate(read_episodes(found)):
        episode = pictures.complete(index, episode)
        names = {"episode_index": index, "episode_chunk": index // chunk_size}
        _write_bytes_by(root / places.DATA_PATH_V2.format(**names), lambda p, e=episode: pq.write_table(e.table, p))
        for camera, video in episode.videos.items():
            path = root / places.VIDEO_PATH_V2.format(video_key=camera, **names)
            _write_bytes_by(path, lambda p, v=video: p.write_bytes(v))
        rows.append({"episode_index": index, "tasks": list(episode.tasks), "length": len(episode)})
        statistics.append({"episode_index": index, "stats": episode.statistics(features)})
    write_json_lines(root / EPISODES, rows)
    if version != V2[0]:
        write_json_lines(root / EPISODES_STATS, statistics)
    write_json_lines(root / TASKS_V2, ({"task_index": i, "task": text} for i, text in found.tasks.items()))
    _write_stats(found, root, _row_statistics(root, len(rows), chunk_size, features), pictures)
    write_json(root / INFO, _info_v2(info, version, len(rows), chunk_size, len(found.tasks)))


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
        "data_path": places.DATA_PATH_V2,
        "video_path": places.VIDEO_PATH_V2 if videos else None,
    }


def _splits(info: Mapping[str, Any]) -> Mapping[str, str]:
    return info.get("splits") or {"train": f"0:{info['total_episodes']}"}


class _Pictures:
    """Statistics of pictures, computed by decoding where the source has none."""

    def __init__(self, found: DatasetLayout) -> None:
        self.found = found
        self.cameras = found.names("video", "image")
        self.histograms: dict[str, np.ndarray] = {}
        self._datasets: dict[str, LeRobotDataset] = {}
        stats = found.root / STATS
        self.known = {c: s for c, s in read_json(stats).items() if c in self.cameras} if stats.is_file() else {}

    def complete(self, index: int, episode: RawEpisode) -> RawEpisode:
        """The episode with the statistics that it lacks; also collects what the whole dataset's need."""
        own = dict(episode.picture_statistics)
        for camera in self.cameras:
            if camera in own and camera in self.known:
                continue
            if camera not in self._datasets:
                self._datasets[camera] = LeRobotDataset(self.found.root, camera=camera)
            histogram = picture_histogram(self._datasets[camera].frames(index))
            self.histograms[camera] = self.histograms.get(camera, 0) + histogram
            own.setdefault(camera, as_lists(describe_pictures(histogram, count=len(episode))))
        return RawEpisode(table=episode.table, tasks=episode.tasks, videos=episode.videos, picture_statistics=own)

    def all(self) -> dict[str, Any]:
        """Statistics over the whole dataset, by camera."""
        frames = sum(entry.length for entry in self.found.entries)
        computed = {c: as_lists(describe_pictures(h, count=frames)) for c, h in self.histograms.items()}
        return computed | self.known


def _write_stats(found: DatasetLayout, root: Path, rows: JsonStatistics, pictures: _Pictures) -> None:
    statistics = pictures.all() | dict(rows)
    write_json(root / STATS, {name: statistics[name] for name in found.info["features"] if name in statistics})


def _row_statistics(root: Path, episodes: int, chunk_size: int, features: Mapping[str, Any]) -> JsonStatistics:
    def described(name: str) -> Statistics:
        paths = [
            root / places.DATA_PATH_V2.format(episode_index=i, episode_chunk=i // chunk_size) for i in range(episodes)
        ]
        return describe_stream(lambda: (numbers(read_table(p, [name]), {name: features[name]})[name] for p in paths))

    return {name: as_lists(described(name)) for name, feature in features.items() if is_number(feature)}


def _copy_the_rest(found: DatasetLayout, root: Path) -> None:
    """Files under meta that belong to no version, as they are."""
    known = {INFO, STATS, places.TASKS, TASKS_V2, EPISODES, EPISODES_STATS, CHECKSUMS}
    for name in dataset_files(found.root):
        if name.startswith("meta/") and name not in known and not name.startswith("meta/episodes/"):
            _write_bytes_by(root / name, lambda p, n=name: shutil.copyfile(found.root / n, p))


def _write_bytes_by(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
