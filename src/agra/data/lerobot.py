"""Reading LeRobot v3.0 datasets.

Layout (huggingface/lerobot, `src/lerobot/datasets`): rows of many episodes share a parquet file, frames of many episodes
share an mp4, and `meta/episodes` says where each episode starts in both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agra.data.video import decode_frames
from agra.types import Episode

VERSION = "v3.0"
STATE, ACTION, EGO_VIEW = "observation.state", "action", "observation.images.ego_view"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

_REMEDY = "copy or collect the dataset again"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The columns of one data file that are read; row n is the dataset's frame `first + n`."""

    path: Path
    first: int
    episode_index: np.ndarray  # (N,)
    task_index: np.ndarray  # (N,)
    states: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, D) float32
    success: np.ndarray  # (N,) bool, all False where the dataset has no `next.success`


class LeRobotDataset:
    """A LeRobot v3.0 dataset on disk, seen through one camera. Rows stay in memory, frames are decoded on demand."""

    def __init__(self, path: str | Path, *, camera: str | None = None) -> None:
        """Open the dataset at `path`; `camera` names a video feature and may be left out where there is only one.

        Raises FileNotFoundError for a missing dataset or file and ValueError for a damaged or foreign one, each with
        the file's name and what to do.
        """
        self.path = Path(path)
        if not (self.path / INFO).is_file():
            raise FileNotFoundError(
                f"{self.path}: no LeRobot dataset here ({INFO} is missing); make one with: agra collect"
            )
        self.info = _read_json(self.path / INFO)
        _check_info(self.path / INFO, self.info)
        self.fps: int = self.info["fps"]
        self.features: Mapping[str, Mapping[str, Any]] = self.info["features"]
        self.camera = _choose_camera(self.path, self.features, camera)
        self._episodes = self._read_episodes()
        self._tasks = _read_tasks(self.path / TASKS)
        self._rows: dict[Path, _Rows] = {}

    @property
    def num_episodes(self) -> int:
        """How many episodes there are."""
        return len(self._episodes)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Control steps of every episode, (num_episodes,) int64."""
        return np.array([row["length"] for row in self._episodes], dtype=np.int64)

    @property
    def embodiment(self) -> str:
        """The robot's name: LeRobot's `robot_type`, "unknown" where that is null."""
        return self.info.get("robot_type") or "unknown"

    @property
    def state_names(self) -> tuple[str, ...]:
        """What each state dimension is called, its number where the dataset does not say."""
        return _dimension_names(self.features[STATE])

    @property
    def action_names(self) -> tuple[str, ...]:
        """What each action dimension is called, its number where the dataset does not say."""
        return _dimension_names(self.features[ACTION])

    @cached_property
    def stats(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """`meta/stats.json`: feature -> statistic -> array."""
        raw = _read_json(self.path / STATS)
        return {key: {name: np.asarray(value) for name, value in entry.items()} for key, entry in raw.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names and contents of all files under meta, data and videos."""
        digest = hashlib.sha256()
        found = [f for folder in ("meta", "data", "videos") for f in (self.path / folder).rglob("*") if f.is_file()]
        for file in sorted(found):
            with file.open("rb") as handle:
                content = hashlib.file_digest(handle, "sha256").hexdigest()
            digest.update(f"{file.relative_to(self.path).as_posix()} {content}\n".encode())
        return digest.hexdigest()

    def states(self, episode: int) -> np.ndarray:
        """(N, S) float32 states of an episode."""
        rows, where = self._locate(episode)
        return rows.states[where]

    def actions(self, episode: int) -> np.ndarray:
        """(N, D) float32 actions of an episode."""
        rows, where = self._locate(episode)
        return rows.actions[where]

    def instruction(self, episode: int) -> str:
        """The task text of an episode's first row."""
        rows, where = self._locate(episode)
        index = int(rows.task_index[where.start])
        if index not in self._tasks:
            raise ValueError(f"{rows.path}: task_index {index} is not in {self.path / TASKS}; {_REMEDY}")
        return self._tasks[index]

    def frames(self, episode: int) -> np.ndarray:
        """(N, H, W, 3) uint8 RGB frames of an episode, decoded."""
        entry = self._entry(episode)
        path = self.path / self.info["video_path"].format(
            video_key=self.camera,
            chunk_index=entry[f"videos/{self.camera}/chunk_index"],
            file_index=entry[f"videos/{self.camera}/file_index"],
        )
        start = entry[f"videos/{self.camera}/from_timestamp"]
        return decode_frames(path, start=start, count=entry["length"], fps=self.fps)

    def episode(self, episode: int) -> Episode:
        """The whole episode, frames decoded."""
        rows, where = self._locate(episode)
        return Episode(
            frames=self.frames(episode),
            states=rows.states[where],
            actions=rows.actions[where],
            instruction=self.instruction(episode),
            embodiment=self.embodiment,
            fps=self.fps,
            success=bool(rows.success[where].any()),
        )

    def _entry(self, episode: int) -> Mapping[str, Any]:
        if not 0 <= episode < self.num_episodes:
            raise ValueError(f"{self.path}: episode {episode} does not exist, there are {self.num_episodes}")
        return self._episodes[episode]

    def _locate(self, episode: int) -> tuple[_Rows, slice]:
        """The file's rows and the episode's place among them, checked against the file's own episode numbers."""
        entry = self._entry(episode)
        path = self.path / self.info["data_path"].format(
            chunk_index=entry["data/chunk_index"], file_index=entry["data/file_index"]
        )
        if path not in self._rows:
            self._rows[path] = self._read_rows(path)
        rows = self._rows[path]
        start, stop = entry["dataset_from_index"] - rows.first, entry["dataset_to_index"] - rows.first
        found = rows.episode_index[max(start, 0) : max(stop, 0)]
        if stop - start != entry["length"] or len(found) != entry["length"] or (found != episode).any():
            raise ValueError(
                f"{path}: rows {start} to {stop} should be the {entry['length']} rows of episode {episode}; {_REMEDY}"
            )
        return rows, slice(start, stop)

    def _read_rows(self, path: Path) -> _Rows:
        success = ["next.success"] if "next.success" in self.features else []
        table = _read_table(path, [STATE, ACTION, "index", "episode_index", "task_index", *success])
        if table.num_rows == 0:
            raise ValueError(f"{path}: holds no rows; {_REMEDY}")
        return _Rows(
            path=path,
            first=table["index"][0].as_py(),
            episode_index=table["episode_index"].to_numpy(),
            task_index=table["task_index"].to_numpy(),
            states=_matrix(table[STATE], path, STATE),
            actions=_matrix(table[ACTION], path, ACTION),
            success=table["next.success"].to_numpy() if success else np.zeros(table.num_rows, bool),
        )

    def _read_episodes(self) -> list[dict[str, Any]]:
        files = sorted((self.path / "meta/episodes").glob("chunk-*/file-*.parquet"))
        if not files:
            raise FileNotFoundError(f"{self.path / 'meta/episodes'}: no episode list here; {_REMEDY}")
        keys = ["episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
        keys += ["dataset_to_index", f"videos/{self.camera}/chunk_index", f"videos/{self.camera}/file_index"]
        keys += [f"videos/{self.camera}/from_timestamp"]
        entries = [row for file in files for row in _read_table(file, keys).to_pylist()]
        entries.sort(key=lambda row: row["episode_index"])
        if [row["episode_index"] for row in entries] != list(range(self.info["total_episodes"])):
            raise ValueError(
                f"{self.path / 'meta/episodes'}: expected the episodes 0 to {self.info['total_episodes'] - 1}"
                f" that {INFO} announces, found {len(entries)} rows; {_REMEDY}"
            )
        return entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: file is missing; {_REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {_REMEDY}") from error


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """`columns` of a parquet file (all of them by default)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file is missing; {_REMEDY}")
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns or [] if name not in names]
            if missing:
                raise ValueError(f"{path}: column {missing[0]!r} is missing, there are {', '.join(names)}")
            return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged parquet file ({reason}); {_REMEDY}") from error


def _matrix(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    """A column of equally long lists as (N, D) float32, of numbers as (N, 1)."""
    flat = column.combine_chunks()
    if pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type) or pa.types.is_large_list(flat.type):
        flat = flat.flatten()
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    if flat.null_count or len(values) % len(column):
        raise ValueError(f"{path}: column {name!r} has gaps or rows of different length; {_REMEDY}")
    return values.reshape(len(column), -1)


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    version = info.get("codebase_version")
    if version != VERSION:
        raise ValueError(
            f"{path}: codebase_version is {version!r}, expected {VERSION!r};"
            " convert with: python -m lerobot.scripts.convert_dataset_v21_to_v30"
        )
    needed = ("fps", "features", "total_episodes", "data_path", "video_path")
    missing = [key for key in needed if info.get(key) is None]
    missing += [f"features/{key}" for key in (STATE, ACTION) if key not in (info.get("features") or {})]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing; {_REMEDY}")


def _choose_camera(path: Path, features: Mapping[str, Mapping[str, Any]], camera: str | None) -> str:
    cameras = [key for key, feature in features.items() if feature["dtype"] == "video"]
    if camera in cameras:
        return camera
    if camera is None and len(cameras) == 1:
        return cameras[0]
    wish = "name one camera" if camera is None else f"there is no camera {camera!r}"
    raise ValueError(f"{path}: {wish}; available: {', '.join(cameras) or 'none stored as video'}")


def _dimension_names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Names as LeRobot datasets give them: a list, lists under a heading, or nothing."""
    names, (size,) = feature.get("names"), feature["shape"]
    if isinstance(names, Mapping):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    if names is None or len(names) != size:
        return tuple(str(index) for index in range(size))
    return tuple(map(str, names))


def _read_tasks(path: Path) -> dict[int, str]:
    """Task texts by index. The texts are a pandas index; `__index_level_0__` is pandas' name for one without a name."""
    table = _read_table(path)
    text = "task" if "task" in table.column_names else "__index_level_0__"
    for name in ("task_index", text):
        if name not in table.column_names:
            raise ValueError(f"{path}: column {name!r} is missing, there are {', '.join(table.column_names)}")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
