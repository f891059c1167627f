"""Writing LeRobot v3.0 datasets: the layout that `agra.data.lerobot` and LeRobot itself read.

An episode is encoded on its own (`encode_episode`, in any process) and then appended; videos are joined packet by
packet and rows as one row group an episode, so that the result does not depend on who encoded what.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agra.data.lerobot import ACTION, DATA_PATH, EGO_VIEW, EPISODES_PATH, INFO, STATE, STATS, TASKS, VERSION, VIDEO_PATH
from agra.data.statistics import describe, describe_pictures, picture_histogram
from agra.data.video import GROUP_OF_PICTURES, OPTIONS, VideoFile, encode_frames
from agra.types import Embodiment, Episode

DEFAULT_COLUMNS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}
DEFAULT_COLUMNS |= {"index": "int64", "task_index": "int64"}
"""The columns that every LeRobot dataset has, each of shape (1,)."""

EXTRA_DTYPES = ("bool", "int64", "float32")


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedEpisode:
    """An episode as it is stored: rows, its own little mp4, and the histogram its image statistics come from."""

    states: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, D) float32
    instruction: str
    video: bytes
    size: tuple[int, int]  # height, width
    histogram: np.ndarray  # (3, 256) int64
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)  # column name -> (N,)

    def __len__(self) -> int:
        return len(self.actions)


def encode_episode(episode: Episode, *, extra: Mapping[str, np.ndarray] | None = None) -> EncodedEpisode:
    """Encode an episode's frames; `extra` adds columns of shape (N,), of dtype bool, int64 or float32."""
    extra = extra or {}
    for name, column in extra.items():
        if column.shape != (len(episode),) or column.dtype.name not in EXTRA_DTYPES:
            raise ValueError(
                f"extra column {name!r}: expected ({len(episode)},) of {', '.join(EXTRA_DTYPES)},"
                f" got {column.shape} {column.dtype}"
            )
    return EncodedEpisode(
        states=episode.states.astype(np.float32),
        actions=episode.actions.astype(np.float32),
        instruction=episode.instruction,
        video=encode_frames(episode.frames, fps=episode.fps),
        size=(episode.frames.shape[1], episode.frames.shape[2]),
        histogram=picture_histogram(episode.frames),
        extra=dict(extra),
    )


def write_dataset(path: Path, episodes: Iterable[Episode], *, embodiment: Embodiment, fps: int) -> None:
    """Write `episodes` as the LeRobot v3.0 dataset `path`, which must not exist yet."""
    with LeRobotWriter(path, embodiment=embodiment, fps=fps) as writer:
        for episode in episodes:
            writer.add(encode_episode(episode))


class _Place:
    """Which file of a numbered series is being written."""

    def __init__(self, files_per_chunk: int) -> None:
        self.chunk_index, self.file_index, self._files_per_chunk = 0, 0, files_per_chunk

    def advance(self) -> None:
        self.file_index += 1
        if self.file_index == self._files_per_chunk:
            self.chunk_index, self.file_index = self.chunk_index + 1, 0

    def __call__(self, template: str, **names: str) -> str:
        return template.format(chunk_index=self.chunk_index, file_index=self.file_index, **names)


class LeRobotWriter:
    """Writes one dataset, episode by episode, into `<path>.partial`, and renames it when closed.

    A context manager: leaving it by an exception removes what was written. All episodes share size, state, action and
    extra columns with the first. A file is closed before the episode that would make it exceed its limit (MiB).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        embodiment: Embodiment,
        fps: int,
        camera: str = EGO_VIEW,
        data_file_mib: float = 100,
        video_file_mib: float = 200,
        files_per_chunk: int = 1000,
    ) -> None:
        self.path, self.embodiment, self.fps, self.camera = Path(path), embodiment, fps, camera
        if self.path.exists():
            raise ValueError(f"{self.path}: already exists; choose another output or remove it")
        self.limits = {"data": data_file_mib, "video": video_file_mib}
        self.files_per_chunk = files_per_chunk
        self._root = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self._root, ignore_errors=True)
        self._data_place, self._video_place = _Place(files_per_chunk), _Place(files_per_chunk)
        self._rows: tuple[Any, pq.ParquetWriter] | None = None  # open file and the parquet writer on it
        self._video: VideoFile | None = None
        self._tasks: dict[str, int] = {}
        self._entries: list[dict[str, Any]] = []
        self._values: dict[str, list[np.ndarray]] = {}
        self._histogram = np.zeros((3, 256), np.int64)
        self.num_frames = 0
        self._features: dict[str, dict[str, Any]] = {}

    def add(self, episode: EncodedEpisode) -> None:
        """Append one episode. Raises ValueError where its shapes or columns differ from the first episode's."""
        features = self._describe_features(episode)
        self._features = self._features or features
        if features != self._features:
            different = [k for k in {**features, **self._features} if features.get(k) != self._features.get(k)]
            raise ValueError(f"{self.path}: episode {len(self._entries)} differs from episode 0 in {different[0]!r}")
        columns = self._columns(episode)
        self._entries.append(
            {
                "episode_index": len(self._entries),
                "tasks": [episode.instruction],
                "length": len(episode),
                **self._write_rows(columns, len(episode)),
                **self._write_video(episode),
                **self._episode_statistics(columns, episode),
            }
        )
        for name, values in columns.items():
            self._values.setdefault(name, []).append(values)
        self._histogram += episode.histogram
        self.num_frames += len(episode)

    def close(self) -> None:
        """Write the metadata and give the dataset its name. Raises ValueError without episodes."""
        self._close_files()
        if not self._entries:
            raise ValueError(f"{self.path}: a dataset needs at least one episode")
        self._write_tasks()
        self._write_episodes()
        statistics = {name: describe(np.concatenate(values)) for name, values in self._values.items()}
        statistics[self.camera] = describe_pictures(self._histogram, count=self.num_frames)
        self._write_json(STATS, {k: {s: v.tolist() for s, v in entry.items()} for k, entry in statistics.items()})
        self._write_json(INFO, self._info())
        os.replace(self._root, self.path)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()
            shutil.rmtree(self._root, ignore_errors=True)

    def _describe_features(self, episode: EncodedEpisode) -> dict[str, dict[str, Any]]:
        """`info.json`'s features, in the order of the columns."""
        height, width = episode.size
        video = {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": self.fps,
            "video.channels": 3,
            "video.g": GROUP_OF_PICTURES,
            "video.crf": int(OPTIONS["crf"]),
            "has_audio": False,
        }
        picture = {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        return {
            self.camera: {**picture, "info": video},
            STATE: _vector(episode.states, self.embodiment.state_names, STATE),
            ACTION: _vector(episode.actions, self.embodiment.action_names, ACTION),
            **{k: {"dtype": v.dtype.name, "shape": [1], "names": None} for k, v in episode.extra.items()},
            **{k: {"dtype": dtype, "shape": [1], "names": None} for k, dtype in DEFAULT_COLUMNS.items()},
        }

    def _columns(self, episode: EncodedEpisode) -> dict[str, np.ndarray]:
        """Every column of the episode as (N, D)."""
        count = len(episode)
        steps = np.arange(count)
        task = self._tasks.setdefault(episode.instruction, len(self._tasks))
        scalars = {
            **episode.extra,
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(count, len(self._entries)),
            "index": steps + self.num_frames,
            "task_index": np.full(count, task),
        }
        vectors = {STATE: episode.states, ACTION: episode.actions}
        return vectors | {name: values.reshape(count, 1) for name, values in scalars.items()}

    def _write_rows(self, columns: Mapping[str, np.ndarray], count: int) -> dict[str, int]:
        arrays = {name: _arrow(values, self._features[name]) for name, values in columns.items()}
        table = pa.table(arrays)
        if self._rows and self._rows[0].tell() + table.nbytes > self.limits["data"] * 2**20:
            self._close_rows()
            self._data_place.advance()
        if self._rows is None:
            path = self._root / self._data_place(DATA_PATH)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("wb")
            self._rows = handle, pq.ParquetWriter(handle, table.schema, compression="snappy")
        self._rows[1].write_table(table, row_group_size=count)
        return {
            "data/chunk_index": self._data_place.chunk_index,
            "data/file_index": self._data_place.file_index,
            "dataset_from_index": self.num_frames,
            "dataset_to_index": self.num_frames + count,
        }

    def _write_video(self, episode: EncodedEpisode) -> dict[str, Any]:
        if self._video and self._video.num_bytes + len(episode.video) > self.limits["video"] * 2**20:
            self._video.close()
            self._video = None
            self._video_place.advance()
        if self._video is None:
            self._video = VideoFile(self._root / self._video_place(VIDEO_PATH, video_key=self.camera), fps=self.fps)
        start, stop = self._video.append(episode.video, num_frames=len(episode))
        return {
            f"videos/{self.camera}/chunk_index": self._video_place.chunk_index,
            f"videos/{self.camera}/file_index": self._video_place.file_index,
            f"videos/{self.camera}/from_timestamp": start,
            f"videos/{self.camera}/to_timestamp": stop,
        }

    def _episode_statistics(self, columns: Mapping[str, np.ndarray], episode: EncodedEpisode) -> dict[str, Any]:
        statistics = {name: describe(values) for name, values in columns.items()}
        statistics[self.camera] = describe_pictures(episode.histogram, count=len(episode))
        return {f"stats/{k}/{name}": v.tolist() for k, entry in statistics.items() for name, v in entry.items()}

    def _write_episodes(self) -> None:
        table = pa.Table.from_pylist(self._entries)
        place = _Place(self.files_per_chunk)
        rows = max(1, int(self.limits["data"] * 2**20 * table.num_rows / table.nbytes))
        for start in range(0, table.num_rows, rows):
            part = table.slice(start, rows)
            for name in ("chunk_index", "file_index"):
                here = np.full(part.num_rows, getattr(place, name), dtype=np.int64)
                part = part.append_column(f"meta/episodes/{name}", pa.array(here))
            path = self._root / place(EPISODES_PATH)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(part, path, compression="snappy")
            place.advance()

    def _write_tasks(self) -> None:
        """What `DataFrame.to_parquet` writes for an index of texts named "task" and a column "task_index"."""

        def column(name: str | None, kind: str, numpy_type: str, metadata: Any = None) -> dict[str, Any]:
            types = {"pandas_type": kind, "numpy_type": numpy_type, "metadata": metadata}
            return {"name": name, "field_name": name, **types}

        pandas = {
            "index_columns": ["task"],
            "column_indexes": [column(None, "unicode", "object", {"encoding": "UTF-8"})],
            "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
            "creator": {"library": "pyarrow", "version": pa.__version__},
            "pandas_version": "2.2.3",
        }
        table = pa.table({"task_index": pa.array(self._tasks.values(), pa.int64()), "task": list(self._tasks)})
        (self._root / TASKS).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), self._root / TASKS)

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": VERSION,
            "robot_type": self.embodiment.name,
            "total_episodes": len(self._entries),
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": self.files_per_chunk,
            "data_files_size_in_mb": self.limits["data"],
            "video_files_size_in_mb": self.limits["video"],
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._entries)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self._features,
        }

    def _write_json(self, name: str, value: Any) -> None:
        (self._root / name).write_text(json.dumps(value, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")

    def _close_rows(self) -> None:
        if self._rows:
            handle, writer = self._rows
            writer.close()
            handle.close()
            self._rows = None

    def _close_files(self) -> None:
        self._close_rows()
        if self._video:
            self._video.close()
            self._video = None


def _vector(values: np.ndarray, names: tuple[str, ...], key: str) -> dict[str, Any]:
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"{key}: expected (N, {len(names)}) for {', '.join(names)}, got {values.shape}")
    return {"dtype": "float32", "shape": [len(names)], "names": list(names)}


def _arrow(values: np.ndarray, feature: Mapping[str, Any]) -> pa.Array:
    """(N, D) values as fixed-size lists, or as plain numbers where the feature's shape is (1,)."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return flat if feature["shape"] == [1] else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
