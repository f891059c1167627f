"""Writing the files of a LeRobot v3.0 dataset: many episodes in one parquet file and in one mp4, up to a size.

Each episode is a row group with page checksums. Videos are joined packet by packet.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agra.data.lerobot.episode_files import JsonStatistics, RawEpisode, as_lists, is_number, numbers
from agra.data.lerobot.layout import DATA_PATH, EPISODES_PATH, TASKS, VIDEO_PATH
from agra.data.lerobot.video import VideoFile
from agra.data.normalization.dataset_statistics import describe_stream

DATA_FILE_MIB, VIDEO_FILE_MIB, FILES_PER_CHUNK = 100, 200, 1000
"""LeRobot's defaults. A file is closed before an episode that would make it exceed its size."""


class _Place:
    """The position in a numbered series of files."""

    def __init__(self, files_per_chunk: int) -> None:
        self.chunk_index, self.file_index, self._files_per_chunk = 0, 0, files_per_chunk

    def advance(self) -> None:
        self.file_index += 1
        if self.file_index == self._files_per_chunk:
            self.chunk_index, self.file_index = self.chunk_index + 1, 0

    def __call__(self, template: str, **names: str) -> str:
        return template.format(chunk_index=self.chunk_index, file_index=self.file_index, **names)


class FilesV3:
    """The rows, videos and episode list below `root`. `add` appends an episode, `finish` writes the metadata."""

    def __init__(
        self,
        root: Path,
        *,
        fps: int,
        data_file_mib: float = DATA_FILE_MIB,
        video_file_mib: float = VIDEO_FILE_MIB,
        files_per_chunk: int = FILES_PER_CHUNK,
    ) -> None:
        self.root, self.fps, self.files_per_chunk = root, fps, files_per_chunk
        self.limits = {"data": data_file_mib, "video": video_file_mib}
        self._data_place = _Place(files_per_chunk)
        self._data_files: list[Path] = []
        self._rows: tuple[Any, pq.ParquetWriter] | None = None  # open file and its parquet writer
        self._video_places: dict[str, _Place] = {}
        self._videos: dict[str, VideoFile] = {}
        self._entries: list[dict[str, Any]] = []
        self.num_frames = 0

    @property
    def num_episodes(self) -> int:
        """Number of episodes so far."""
        return len(self._entries)

    def add(self, episode: RawEpisode, features: Mapping[str, Mapping[str, Any]]) -> None:
        """Append one episode. Raises ValueError where its columns differ from those of the first episode."""
        statistics = episode.statistics(features)
        entry = {
            "episode_index": len(self._entries),
            "tasks": list(episode.tasks),
            "length": len(episode),
            **self._write_rows(episode.table),
        }
        for camera, video in episode.videos.items():
            entry |= self._write_video(camera, video, len(episode))
        entry |= {
            f"stats/{feature}/{name}": value for feature, values in statistics.items() for name, value in values.items()
        }
        self._entries.append(entry)
        self.num_frames += len(episode)

    def finish(self, tasks: Mapping[str, int]) -> None:
        """Close the files and write the episode list and the tasks (text -> number)."""
        self.close()
        self._write_episodes()
        _write_tasks(self.root / TASKS, tasks)

    def statistics(self, features: Mapping[str, Mapping[str, Any]]) -> JsonStatistics:
        """Compute exact statistics of all rows, read back as a stream. Call it after `finish`."""
        return {
            name: as_lists(describe_stream(lambda name=name: self._column(name, features)))
            for name, feature in features.items()
            if is_number(feature)
        }

    def close(self) -> None:
        """Close the open files. Raises OSError where the disk is full."""
        self._close_rows()
        while self._videos:
            self._videos.popitem()[1].close()

    def discard(self) -> None:
        """Close the open files of a dataset that is given up. Errors do not matter then."""
        while self._rows or self._videos:
            with suppress(OSError):
                self.close()

    def _column(self, name: str, features: Mapping[str, Mapping[str, Any]]) -> Iterator[np.ndarray]:
        for path in self._data_files:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield numbers(file.read_row_group(group, columns=[name]), {name: features[name]})[name]

    def _write_rows(self, table: pa.Table) -> dict[str, int]:
        table = _as_parquet_names(table)
        if self._rows and self._rows[0].tell() + table.nbytes > self.limits["data"] * 2**20:
            self._close_rows()
            self._data_place.advance()
        if self._rows is None:
            path = self.root / self._data_place(DATA_PATH)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("wb")
            self._data_files.append(path)
            writer = pq.ParquetWriter(handle, table.schema, compression="snappy", write_page_checksum=True)
            self._rows = handle, writer
        try:
            table = table.cast(self._rows[1].schema)
        except (pa.ArrowInvalid, ValueError) as error:
            raise ValueError(
                f"{self.root}: the columns of episode {len(self._entries)} differ from those of episode 0 ({error})"
            ) from error
        self._rows[1].write_table(table, row_group_size=table.num_rows)
        return {
            "data/chunk_index": self._data_place.chunk_index,
            "data/file_index": self._data_place.file_index,
            "dataset_from_index": self.num_frames,
            "dataset_to_index": self.num_frames + table.num_rows,
        }

    def _write_video(self, camera: str, video: bytes, count: int) -> dict[str, Any]:
        place = self._video_places.setdefault(camera, _Place(self.files_per_chunk))
        open_file = self._videos.get(camera)
        full = open_file and open_file.num_bytes + len(video) > self.limits["video"] * 2**20
        if open_file and (full or not open_file.accepts(video)):
            self._videos.pop(camera).close()
            place.advance()
        if camera not in self._videos:
            self._videos[camera] = VideoFile(self.root / place(VIDEO_PATH, video_key=camera), fps=self.fps)
        start, stop = self._videos[camera].append(video, num_frames=count)
        return {
            f"videos/{camera}/chunk_index": place.chunk_index,
            f"videos/{camera}/file_index": place.file_index,
            f"videos/{camera}/from_timestamp": start,
            f"videos/{camera}/to_timestamp": stop,
        }

    def _write_episodes(self) -> None:
        table = pa.Table.from_pylist(self._entries)
        place = _Place(self.files_per_chunk)
        rows = max(1, int(self.limits["data"] * 2**20 * table.num_rows / table.nbytes))
        for start in range(0, table.num_rows, rows):
            entries = table.slice(start, rows)
            for name in ("chunk_index", "file_index"):
                indices = np.full(entries.num_rows, getattr(place, name), dtype=np.int64)
                entries = entries.append_column(f"meta/episodes/{name}", pa.array(indices))
            path = self.root / place(EPISODES_PATH)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(entries, path, compression="snappy", write_page_checksum=True)
            place.advance()

    def _close_rows(self) -> None:
        if self._rows:
            (handle, writer), self._rows = self._rows, None
            try:
                writer.close()
            finally:
                handle.close()


def info_v3(
    info: Mapping[str, Any], *, files: FilesV3, tasks: int, features: Mapping[str, Any], splits: Mapping[str, str]
) -> dict[str, Any]:
    """Return `info.json` of v3.0: its keys from the written files, and all further keys of `info` unchanged."""
    video = any(feature["dtype"] == "video" for feature in features.values())
    written = {
        "codebase_version": "v3.0",
        "robot_type": info.get("robot_type"),
        "total_episodes": files.num_episodes,
        "total_frames": files.num_frames,
        "total_tasks": tasks,
        "chunks_size": files.files_per_chunk,
        "data_files_size_in_mb": files.limits["data"],
        "video_files_size_in_mb": files.limits["video"],
        "fps": info["fps"],
        "splits": dict(splits),
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if video else None,
        "features": dict(features),
    }
    return written | {key: value for key, value in info.items() if key not in written}


def _as_parquet_names(table: pa.Table) -> pa.Table:
    """Name the items of lists as parquet does, so that a table from memory and a table from a file give the same
    bytes.
    """

    def renamed(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(pa.field("element", renamed(kind.value_type)), kind.list_size)
        if pa.types.is_list(kind):
            return pa.list_(pa.field("element", renamed(kind.value_type)))
        return kind

    fields = [pa.field(field.name, renamed(field.type), metadata=field.metadata) for field in table.schema]
    return table.cast(pa.schema(fields, metadata=table.schema.metadata))


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """Write the file of `DataFrame.to_parquet` for a text index named "task" and a column "task_index"."""

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
    texts: Sequence[str] = list(tasks)
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(texts, pa.string())})
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
    pq.write_table(table, path, write_page_checksum=True)
