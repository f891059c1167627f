"""File layouts of LeRobot datasets: the metadata of versions 2.0, 2.1 and 3.0, read into one list of episodes.

v2: one parquet file and one mp4 for each episode, metadata in JSON lines. v3.0: episodes share files, and
`meta/episodes` holds the start of each episode. Source: huggingface/lerobot, `datasets/utils.py` and
`scripts/convert_dataset_v21_to_v30.py`.
"""

import math
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from agra.data.lerobot.json_parquet import REMEDY, read_json, read_json_lines, read_table

V2, V3 = ("v2.0", "v2.1"), "v3.0"
INFO, STATS = "meta/info.json", "meta/stats.json"
TASKS, EPISODES, EPISODES_STATS = "meta/tasks.parquet", "meta/episodes.jsonl", "meta/episodes_stats.jsonl"
TASKS_V2 = "meta/tasks.jsonl"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_PATH_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"

_SPAN = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
_LONGEST = 1e7  # seconds of video in one file
_FASTEST = 10_000  # rows/s
_LARGEST = 2**53  # any number in the metadata


@dataclass(frozen=True, kw_only=True)
class EpisodeEntry:
    """Location of an episode's rows and frames. In v2 the rows of its file are all its own, and `first_row` is None."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    first_row: int | None  # number of its first row within the dataset
    videos: Mapping[str, tuple[Path, float]]  # camera -> file, start of the episode in it (s)


@dataclass(frozen=True, kw_only=True)
class DatasetLayout:
    """Metadata of a dataset of any version."""

    root: Path
    version: str
    info: Mapping[str, Any]
    entries: tuple[EpisodeEntry, ...]
    tasks: Mapping[int, str]

    @classmethod
    def read(cls, root: Path) -> "DatasetLayout":
        """Read the metadata of the dataset in `root`.

        Raises FileNotFoundError for a missing dataset or file and ValueError for a damaged or unsupported one. The
        error names the file.
        """
        if not (root / INFO).is_file():
            raise FileNotFoundError(f"{root}: not a LeRobot dataset ({INFO} is missing); make one with: agra collect")
        info = read_json(root / INFO)
        _check_info(root / INFO, info)
        read = _entries_v3 if info["codebase_version"] == V3 else _entries_v2
        entries = read(root, info)
        tasks = _tasks_v3(root / TASKS) if info["codebase_version"] == V3 else _tasks_v2(root / TASKS_V2)
        expected = len(entries) == info["total_episodes"]
        if not expected or any(entry.index != place for place, entry in enumerate(entries)):
            where = root / ("meta/episodes" if info["codebase_version"] == V3 else EPISODES)
            raise ValueError(
                f"{where}: expected the episodes 0 to {info['total_episodes'] - 1} of {INFO}, got {len(entries)} rows;"
                f" {REMEDY}"
            )
        frames = sum(entry.length for entry in entries)
        if frames != info.get("total_frames", frames):
            raise ValueError(
                f"{root / INFO}: total_frames is {info['total_frames']}, but the episodes have {frames} frames; "
                f"{REMEDY}"
            )
        return cls(root=root, version=info["codebase_version"], info=info, entries=entries, tasks=tasks)

    @cached_property
    def rows(self) -> int:
        """Number of rows of all episodes. No data file holds more."""
        return sum(entry.length for entry in self.entries)

    def names(self, *kinds: str) -> list[str]:
        """Return the names of the features of some dtypes, such as "video" and "image"."""
        return [name for name, feature in self.info["features"].items() if feature["dtype"] in kinds]


def _entries_v2(root: Path, info: Mapping[str, Any]) -> tuple[EpisodeEntry, ...]:
    path = root / EPISODES
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    entries = []
    for row in read_json_lines(path):
        index, length = _whole(row, "episode_index", path), _whole(row, "length", path, least=1)
        names = {"episode_index": index, "episode_chunk": index // info.get("chunks_size", 1000)}
        videos = {c: (_inside(root, info["video_path"], video_key=c, **names), 0.0) for c in cameras}
        entries.append(
            EpisodeEntry(
                index=index,
                length=length,
                tasks=_texts(row.get("tasks", ()), path),
                data=_inside(root, info["data_path"], **names),
                first_row=None,
                videos=videos,
            )
        )
    return tuple(sorted(entries, key=lambda entry: entry.index))


def _entries_v3(root: Path, info: Mapping[str, Any]) -> tuple[EpisodeEntry, ...]:
    files = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root / 'meta/episodes'}: the episode list is missing; {REMEDY}")
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    keys = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    keys += ["dataset_from_index", "dataset_to_index"]
    keys += [f"videos/{c}/{name}" for c in cameras for name in _SPAN]
    entries = []
    for path in files:
        for row in read_table(path, keys).to_pylist():
            length, first = _whole(row, "length", path, least=1), _whole(row, "dataset_from_index", path)
            if _whole(row, "dataset_to_index", path) != first + length:
                raise ValueError(
                    f"{path}: episode {row['episode_index']} has length {length}, but its rows are {first} to"
                    f" {row['dataset_to_index']}; {REMEDY}"
                )
            place = {n: _whole(row, f"data/{n}", path) for n in ("chunk_index", "file_index")}
            entries.append(
                EpisodeEntry(
                    index=_whole(row, "episode_index", path),
                    length=length,
                    tasks=_texts(row["tasks"], path),
                    data=_inside(root, info["data_path"], **place),
                    first_row=first,
                    videos={camera: _span(root, info, camera, row, path) for camera in cameras},
                )
            )
    _check_overlap(entries, info)
    return tuple(sorted(entries, key=lambda entry: entry.index))


def _check_overlap(entries: Iterable[EpisodeEntry], info: Mapping[str, Any]) -> None:
    """Raise ValueError where two episodes share frames of a file."""
    spans = [(p, s, e) for e in entries for p, s in e.videos.values()]
    spans.sort(key=lambda span: span[:2])
    for (path, start, entry), (after, begins, other) in pairwise(spans):
        if path == after and begins < start + (entry.length - 0.5) / info["fps"]:
            raise ValueError(f"{path}: episodes {entry.index} and {other.index} overlap from {begins:g} s on; {REMEDY}")


def _span(root: Path, info: Mapping[str, Any], camera: str, row: Mapping[str, Any], path: Path) -> tuple[Path, float]:
    place = {n: _whole(row, f"videos/{camera}/{n}", path) for n in ("chunk_index", "file_index")}
    start = row[f"videos/{camera}/from_timestamp"]
    if not isinstance(start, float | int) or not 0 <= start < _LONGEST:
        raise ValueError(f"{path}: from_timestamp of {camera!r}: expected a time in seconds, got {start!r}; {REMEDY}")
    end, length = row[f"videos/{camera}/to_timestamp"], row["length"] / info["fps"]
    if not isinstance(end, float | int) or not abs(end - start - length) < 0.5 / info["fps"]:
        raise ValueError(
            f"{path}: episode {row['episode_index']} lasts {length:g} s, but its frames of {camera!r} are from "
            f"{start:g} to {end} s; {REMEDY}"
        )
    return _inside(root, info["video_path"], video_key=camera, **place), float(start)


def _inside(root: Path, template: str, **names: object) -> Path:
    """Return a file of the dataset. Raises ValueError where the metadata names a file outside the dataset's folder.

    Symbolic links are followed, since the hub's cache consists of them.
    """
    name = template.format(**names)
    if not is_inside(name):
        raise ValueError(f"{root / INFO}: the file {name!r} is outside the dataset; {REMEDY}")
    return root / name


def is_inside(name: str) -> bool:
    """Return whether a relative name stays inside its folder."""
    place = PurePosixPath(name)
    return not place.is_absolute() and ".." not in place.parts and "\0" not in name


def _tasks_v2(path: Path) -> dict[int, str]:
    rows = read_json_lines(path)
    return {_whole(row, "task_index", path): text for row in rows for text in _texts([row.get("task")], path)}


def _tasks_v3(path: Path) -> dict[int, str]:
    """Read the tasks. Their texts are a pandas index, which is called `__index_level_0__` where it has no name."""
    table = read_table(path)
    text = "task" if "task" in table.column_names else "__index_level_0__"
    for name in ("task_index", text):
        if name not in table.column_names:
            raise ValueError(f"{path}: column {name!r} is missing; available: {', '.join(table.column_names)}")
    rows = table.to_pylist()
    return {_whole(row, "task_index", path): task for row in rows for task in _texts([row[text]], path)}


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    version = info.get("codebase_version")
    if version not in (*V2, V3):
        raise ValueError(f"{path}: codebase_version is {version!r}, expected one of {', '.join((*V2, V3))}")
    kinds: dict[str, type | tuple[type, ...]] = {"fps": (int, float), "features": dict, "total_episodes": int}
    kinds |= {"data_path": str}
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind) or isinstance(info.get(key), bool):
            raise ValueError(f"{path}: {key!r} is missing or has a wrong type: {info.get(key)!r}; {REMEDY}")
    if not 0 < info["fps"] <= _FASTEST:
        raise ValueError(
            f"{path}: fps: expected a number above 0, at most {_FASTEST}, got {_short(info['fps'])}; {REMEDY}"
        )
    for name, feature in info["features"].items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        whole = isinstance(shape, list) and all(isinstance(size, int) and 0 < size < _LARGEST for size in shape)
        if not isinstance(shape, list) or not whole or math.prod(shape) >= _LARGEST:
            raise ValueError(
                f"{path}: feature {name!r}: expected a shape of whole numbers, got {_short(shape)}; {REMEDY}"
            )
        if not isinstance(feature.get("dtype"), str):
            raise ValueError(f"{path}: feature {name!r} has no dtype; {REMEDY}")
    for key in ("chunks_size", "total_frames"):
        if not isinstance(info.get(key, 1), int) or not 1 <= info.get(key, 1) < _LARGEST:
            raise ValueError(f"{path}: {key}: expected a positive whole number, got {_short(info[key])}; {REMEDY}")
    files = ("file_index", "chunk_index") if version == V3 else ("episode_index", "episode_chunk")
    _check_template(path, info, "data_path", files[:1], files[1:])
    if any(feature["dtype"] == "video" for feature in info["features"].values()):
        _check_template(path, info, "video_path", (*files[:1], "video_key"), files[1:])


def _check_template(
    path: Path, info: Mapping[str, Any], key: str, needed: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    """Raise ValueError unless the template names every `needed` field, and no field beyond the `optional` ones."""
    allowed = {*needed, *optional}
    template = info.get(key)
    try:
        parsed = [part for part in string.Formatter().parse(template or "") if part[1] is not None]
        fields = [str(name) for _, name, _, _ in parsed]
        if not template or not set(needed) <= set(fields) <= allowed:
            raise ValueError(f"its fields are {', '.join(fields) or 'none'}, expected {', '.join(sorted(allowed))}")
        for _, name, form, conversion in parsed:
            if conversion or not re.fullmatch("" if name == "video_key" else r"(0?\d)?d?", form or ""):
                raise ValueError(f"{name} is formatted as {form!r}, expected numbers such as 03d")
        template.format(**{name: "x" if name == "video_key" else 0 for name in allowed})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: {key} {template!r} is not a path template of this version ({error}); {REMEDY}"
        ) from None


def _whole(row: Mapping[str, Any], key: str, path: Path, *, least: int = 0) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _LARGEST:
        raise ValueError(f"{path}: {key!r}: expected a whole number of at least {least}, got {_short(value)}; {REMEDY}")
    return value


def _short(value: Any) -> str:
    """Return a value as messages print it. JSON numbers can have thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.80}"


def _texts(values: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{path}: expected a task's text, got {values!r}; {REMEDY}")
    return tuple(values)
