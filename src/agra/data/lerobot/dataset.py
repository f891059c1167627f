"""Reading LeRobot datasets of versions 2.0, 2.1 and 3.0, with GR00T's extensions, in the view of a `SourceConfig`.

A data file is read at its first use, and its rows stay in memory as float32. Frames are decoded on demand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agra.data.config import SourceConfig
from agra.data.lerobot.cameras import Cameras
from agra.data.lerobot.checksums import Seal
from agra.data.lerobot.json_parquet import REMEDY, integers, matrix, read_json, read_table
from agra.data.lerobot.layout import INFO, STATS, DatasetLayout, EpisodeEntry
from agra.data.lerobot.modality import ACTION, MODALITY, STATE, Key, Modality, size
from agra.data.normalization.normalize import NormalizedPart, Quantity
from agra.hub import dataset_folder
from agra.types import Episode


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Rows of one data file. The positions of its episodes are checked at their first use."""

    path: Path
    first: int | None  # number of its first row within the dataset. None where rows are not numbered
    episode_index: np.ndarray  # (N,)
    frame_index: np.ndarray | None  # (N,)
    instruction: np.ndarray  # (N,) task number
    states: np.ndarray  # (N, S) float32, in the order of the source's keys
    actions: np.ndarray  # (N, D) float32
    success: np.ndarray  # (N,) bool. All False in a dataset without `next.success`


class LeRobotDataset:
    """A LeRobot dataset on disk in the view of a source: its cameras, its keys of state and action, its row stride."""

    def __init__(self, path: str | Path, *, camera: str | None = None, source: SourceConfig | None = None) -> None:
        """Open the dataset at `path`, a folder or a hub id. A dataset with one camera needs no `camera`.

        `source` replaces `camera` and sets the whole view, except its `path`. Raises FileNotFoundError for a missing
        dataset or file and ValueError for a damaged or unsupported one. The error names the file and the remedy.
        """
        self.source = source if source is not None else SourceConfig(camera=camera or "")
        self.path = dataset_folder(str(path), self.source.revision)
        self.seal = Seal(self.path)
        for name in self.seal.names:
            if name.startswith("meta/"):
                self.seal.verify(self.path / name)
        self.layout = DatasetLayout.read(self.path)
        self.info = self.layout.info
        self.features: Mapping[str, Mapping[str, Any]] = self.info["features"]
        self.modality = Modality.read(self.path, self.features)
        self.fps = self._control_rate()
        names = (self._only_camera(self.source.camera), *self.source.extra_cameras)
        self.cameras = Cameras(self.layout, self.modality, self.seal, names, self.source)
        self.camera = self.cameras.features[0]
        self.keys = {quantity: self._keys(quantity) for quantity in ("state", "action")}
        self._check_stride()
        self._task_column = self._instruction_column()
        self._rows: dict[Path, _Rows] = {}

    @classmethod
    def of(cls, source: SourceConfig, root: str = "") -> "LeRobotDataset":
        """Open the dataset of a source. Its path is relative to `root`, unless that is empty."""
        return cls(Path(root) / source.path if root else source.path, source=source)

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.layout.entries)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Control steps of every episode, (num_episodes,) int64."""
        lengths = np.array([entry.length for entry in self.layout.entries], dtype=np.int64)
        return -(-lengths // self.source.row_stride)

    @property
    def embodiment(self) -> str:
        """Name of the robot: the source's `embodiment`, else LeRobot's `robot_type`, else "unknown"."""
        return self.source.embodiment or self.info.get("robot_type") or "unknown"

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Keys of the embodiment that are absent from this dataset."""
        return self.source.missing_keys

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """Name of each state dimension. Its number where the dataset has no name."""
        return self._names("state")

    @cached_property
    def action_names(self) -> tuple[str, ...]:
        """Name of each action dimension. Its number where the dataset has no name."""
        return self._names("action")

    @cached_property
    def stats(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """`meta/stats.json`: feature -> statistic -> array. Raises ValueError for other content."""
        path, stats = self.path / STATS, {}
        for key, entry in read_json(path).items():
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{path}: {key!r}: expected an object of statistics, got {type(entry).__name__}; {REMEDY}"
                )
            stats[key] = {name: _numbers(path, f"{name} of {key!r}", value) for name, value in entry.items()}
        return stats

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names and contents of all files under meta, data and videos."""
        return self.seal.fingerprint()

    @property
    def view(self) -> Mapping[str, Any]:
        """Settings of the source that change frames or instructions, JSON-serialisable.

        Cached features are named after them.
        """
        source = self.source
        return {
            "cameras": list(self.cameras.features),
            "crop": [source.crop_rows, source.crop_columns],
            "every": source.row_stride,
            "instruction": [self._task_column, *source.strip_prefixes],
        }

    def parts(self, quantity: Quantity) -> tuple[NormalizedPart, ...]:
        """Return the normalisation of each key of a quantity, with its dimensions in `states` or `actions`.

        Empty without keys.
        """
        if not self.source.keys(quantity):
            return ()
        parts, start = [], 0
        for key, (_, method) in zip(self.keys[quantity], self.source.keys(quantity), strict=True):
            end = start + key.size
            parts.append(NormalizedPart(name=key.name, start=start, end=end, method=method, rotation=key.rotation))
            start = end
        return tuple(parts)

    @cached_property
    def relative(self) -> np.ndarray:
        """(D,) bool. True for actions that are movements, by the source or by `absolute` in modality.json."""
        names = self.source.relative
        return np.concatenate([self.modality.moves(key) | (key.name in names) for key in self.keys["action"]])

    @cached_property
    def no_movement(self) -> np.ndarray:
        """(D,) float32. The action without movement, where all keys are relative."""
        return np.concatenate([self.modality.no_movement(key) for key in self.keys["action"]])

    def states(self, episode: int) -> np.ndarray:
        """Return the states (N, S) float32 of an episode."""
        rows, where = self._locate(episode)
        return rows.states[where]

    def actions(self, episode: int) -> np.ndarray:
        """Return the actions (N, D) float32 of an episode."""
        rows, where = self._locate(episode)
        return rows.actions[where]

    def instruction(self, episode: int, step: int = 0) -> str:
        """Return the task text of a control step of an episode, without the source's prefixes."""
        rows, where = self._locate(episode)
        return self._instruction(episode, int(rows.instruction[where][step]), rows.path)

    def instructions(self, episode: int) -> tuple[str, ...]:
        """Return the distinct task texts of an episode's control steps, in order of their first step."""
        rows, where = self._locate(episode)
        return tuple(self._instruction(episode, int(task), rows.path) for task in _distinct(rows.instruction[where]))

    def _instruction(self, episode: int, task: int, path: Path) -> str:
        text, listed = self.task(task, path), self._entry(episode).tasks
        if self._task_column == "task_index" and listed and text not in listed:
            raise ValueError(
                f"{path}: the task of episode {episode} is {text!r}, expected {', '.join(map(repr, listed))} from "
                f"the episode list in {self.path / 'meta'}; {REMEDY}"
            )
        return self.source.without_prefixes(text)

    def task(self, index: int, path: Path) -> str:
        """Return the text of a task number that the rows of `path` hold."""
        if index not in self.layout.tasks:
            raise ValueError(f"{path}: task {index} is not among the tasks in {self.path / 'meta'}; {REMEDY}")
        return self.layout.tasks[index]

    def frames(self, episode: int) -> np.ndarray:
        """Decode the frames (N, H, W, 3) uint8 RGB of an episode."""
        return self.clip(episode, np.arange(self.lengths[self._entry(episode).index]))

    def clip(self, episode: int, steps: np.ndarray, *, threads: int = 0) -> np.ndarray:
        """Decode the frames (T, H, W, 3) uint8 RGB at ascending control steps (T,) of an episode."""
        return self.cameras.frames(self._entry(episode), np.asarray(steps) * self.source.row_stride, threads=threads)

    def episode(self, episode: int) -> Episode:
        """Return the whole episode with its frames decoded."""
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

    def _entry(self, episode: int) -> EpisodeEntry:
        if not 0 <= episode < self.num_episodes:
            raise ValueError(
                f"{self.path}: episode {episode} does not exist; the dataset has {self.num_episodes} episodes, from 0"
            )
        return self.layout.entries[episode]

    def _locate(self, episode: int) -> tuple[_Rows, slice]:
        """Return the rows of the episode's file and its slice of them, checked against episode_index and
        frame_index.
        """
        entry = self._entry(episode)
        if entry.data not in self._rows:
            self.seal.verify(entry.data)
            self._rows[entry.data] = self._read_rows(entry)
        rows = self._rows[entry.data]
        start = 0 if entry.first_row is None or rows.first is None else entry.first_row - rows.first
        stop = start + entry.length
        indices = rows.episode_index[start:stop] if start >= 0 else np.zeros(0)
        whole = entry.first_row is not None or len(rows.episode_index) == entry.length
        if len(indices) != entry.length or (indices != episode).any() or not whole:
            raise ValueError(
                f"{rows.path}: rows {start} to {stop} are not the {entry.length} rows of episode {episode} that"
                f" {self.path / 'meta'} lists; {REMEDY}"
            )
        if rows.frame_index is not None and (rows.frame_index[start:stop] != np.arange(entry.length)).any():
            raise ValueError(f"{rows.path}: frame_index of episode {episode} does not count up from 0; {REMEDY}")
        return rows, slice(start, stop, self.source.row_stride)

    def _read_rows(self, entry: EpisodeEntry) -> _Rows:
        path = entry.data
        keys = {quantity: [key for key in keys if key.column] for quantity, keys in self.keys.items()}
        names = {key.column for group in keys.values() for key in group} | {self._task_column, "episode_index"}
        names |= {name for name in ("index", "frame_index", "timestamp", "next.success") if name in self.features}
        if entry.first_row is not None:
            names.add("index")
        table = read_table(path, sorted(names), max_rows=self.layout.rows)
        if table.num_rows == 0:
            raise ValueError(f"{path}: expected rows, got none; {REMEDY}")
        columns = {key.column for group in keys.values() for key in group}
        values = {name: self._column(table, name, path) for name in columns}
        if "timestamp" in names:
            self._check_rate(matrix(table, "timestamp", path)[:, 0], path)
        success = np.zeros(table.num_rows, bool)
        if "next.success" in names:
            success = matrix(table, "next.success", path)[:, 0] > 0
        return _Rows(
            path=path,
            first=int(integers(table, "index", path)[0]) if entry.first_row is not None else None,
            episode_index=integers(table, "episode_index", path),
            frame_index=integers(table, "frame_index", path) if "frame_index" in names else None,
            instruction=integers(table, self._task_column, path),
            states=self._select("state", values, table.num_rows),
            actions=self._select("action", values, table.num_rows),
            success=success,
        )

    def _check_rate(self, timestamps: np.ndarray, path: Path) -> None:
        """Compare the median step of the timestamps with the frame rate. `agra doctor` finds single late rows."""
        steps = np.diff(timestamps.astype(np.float64))
        median = np.median(steps[steps > 0]) if (steps > 0).any() else None
        if median is not None and abs(median * self.info["fps"] - 1) > 0.02:
            raise ValueError(
                f"{path}: timestamps are {median:.4f} s apart, expected {1 / self.info['fps']:.4f} s from the"
                f" {self.info['fps']:g} rows/s in {INFO}; {REMEDY}"
            )

    def _column(self, table: pa.Table, name: str, path: Path) -> np.ndarray:
        values = matrix(table, name, path)
        if values.shape[1] != size(self.features[name]):
            raise ValueError(
                f"{path}: {name!r} has {values.shape[1]} dimensions, expected {size(self.features[name])} from {INFO};"
                f" {REMEDY}"
            )
        if not np.isfinite(values).all():
            row, dimension = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"{path}: {name!r} is {values[row, dimension]} in row {row}, dimension {dimension}, expected a finite "
                f"number; {REMEDY}"
            )
        return values

    def _select(self, quantity: str, values: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Concatenate the dimensions of the keys, with zeros (or rotations by 0) for missing keys."""
        pieces = [
            values[key.column][:, key.start : key.end] if key.column else np.tile(key.identity, (count, 1))
            for key in self.keys[quantity]
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _keys(self, quantity: str) -> tuple[Key, ...]:
        """Return the source's keys. A missing key has no column, and size 0 until `resolve_missing_keys`."""
        names = [name for name, _ in self.source.keys(quantity)] or [STATE if quantity == "state" else ACTION]
        return tuple(
            Key(name=name, column="", start=0, end=0)
            if name in self.source.missing_keys
            else self.modality.resolve(quantity, name, self.features)
            for name in names
        )

    def resolve_missing_keys(self, others: Sequence["LeRobotDataset"]) -> None:
        """Take the size and kind of missing keys from the `others` of the same embodiment.

        Raises ValueError where no dataset has such a key, or where the datasets differ in their keys.
        """
        for quantity, keys in self.keys.items():
            names = [key.name for key in keys]
            for other in others:
                if [key.name for key in other.keys[quantity]] != names:
                    raise ValueError(
                        f"{self.path} and {other.path}: datasets of embodiment {self.embodiment!r} differ in their"
                        f" {quantity} keys: {', '.join(names)} and {', '.join(k.name for k in other.keys[quantity])}; "
                        "list the same keys for both, and the absent ones in missing_keys"
                    )
            present = {key.name: key for other in others for key in other.keys[quantity] if key.column}
            unknown = [key.name for key in keys if not key.column and key.name not in present]
            if unknown:
                raise ValueError(
                    f"{self.path}: the size of the missing key {unknown[0]!r} is unknown, since no other dataset of"
                    f" embodiment {self.embodiment!r} has it"
                )
            self.keys[quantity] = tuple(
                key if key.column else replace(present[key.name], column="", start=0, end=present[key.name].size)
                for key in keys
            )

    def _names(self, quantity: str) -> tuple[str, ...]:
        names: list[str] = []
        for key in self.keys[quantity]:
            if key.column:
                names += _dimension_names(self.features[key.column])[key.start : key.end]
            else:
                names += [f"{key.name}_{index}" for index in range(key.size)]
        return tuple(names)

    def _control_rate(self) -> int:
        rate = self.info["fps"] / self.source.row_stride
        if rate != round(rate):
            raise ValueError(
                f"{self.path}: a row stride of {self.source.row_stride} at {self.info['fps']} rows/s gives {rate:g} "
                "rows/s, expected a whole number; choose another data.row_stride"
            )
        return round(rate)

    def _check_stride(self) -> None:
        moving = [key.name for key in self.keys["action"] if self.modality.moves(key).any()]
        if moving and self.source.row_stride > 1:
            raise ValueError(
                f"{self.path}: expected data.row_stride 1, got {self.source.row_stride}: {', '.join(moving)} holds"
                f" movements (absolute is false in {MODALITY}), and a stride would drop some"
            )

    def _only_camera(self, camera: str) -> str:
        if camera:
            return camera
        available = self.layout.names("video", "image")
        if len(available) != 1:
            raise ValueError(
                f"{self.path}: choose one camera with data.camera; available: {', '.join(available) or 'none'}"
            )
        return available[0]

    def _instruction_column(self) -> str:
        key = self.source.instruction_key
        column = self.modality.annotation.get(key, key) or "task_index"
        if column not in self.features:
            annotations = sorted(
                {*self.modality.annotation, *(n for n in self.features if n.startswith("annotation."))}
            )
            raise ValueError(
                f"{self.path}: no column {column!r} of task numbers; available: "
                f"{', '.join(['task_index', *annotations])}"
            )
        return column


def _numbers(path: Path, name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:  # ragged
        raise ValueError(f"{path}: {name}: expected numbers ({error}); {REMEDY}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {name}: expected numbers, got {value!r:.60}; {REMEDY}")
    return array


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Return the distinct numbers of (N,), in order of their first place."""
    return numbers[np.sort(np.unique(numbers, return_index=True)[1])]


def _dimension_names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a feature's dimensions. LeRobot stores a list, lists by heading, or nothing."""
    names, count = feature.get("names"), size(feature)
    if isinstance(names, Mapping):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    if not isinstance(names, list) or len(names) != count:
        return tuple(str(index) for index in range(count))
    return tuple(map(str, names))
