"""Reading LeRobot datasets of versions 2.0, 2.1 and 3.0, GR00T's flavour included, as a source's settings ask.

Rows are read once, file by file when first needed, and stay in memory as float32; frames are decoded on demand.
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
from agra.data.lerobot.checksums import Seal, dataset_files
from agra.data.lerobot.json_parquet import REMEDY, integers, matrix, read_json, read_table
from agra.data.lerobot.layout import INFO, STATS, DatasetLayout, EpisodeEntry
from agra.data.lerobot.modality import ACTION, STATE, Key, Modality, size
from agra.data.normalization.normalize import NormalizedPart, Quantity
from agra.hub import dataset_folder
from agra.types import Episode


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """What is read of one data file; the episodes' places are checked when they are looked up."""

    path: Path
    first: int | None  # the dataset's number of its first row, where its rows are numbered
    episode_index: np.ndarray  # (N,)
    frame_index: np.ndarray | None  # (N,)
    instruction: np.ndarray  # (N,) task number
    states: np.ndarray  # (N, S) float32, in the order of the source's keys
    actions: np.ndarray  # (N, D) float32
    success: np.ndarray  # (N,) bool, all False where the dataset has no `next.success`


class LeRobotDataset:
    """A LeRobot dataset on disk, seen as a source says: its camera, the keys of state and action, every n-th row."""

    def __init__(self, path: str | Path, *, camera: str | None = None, source: SourceConfig | None = None) -> None:
        """Open the dataset at `path`: a folder or a hub id. `camera` may be left out where there is only one.

        `source` (its `path` aside) says what else is read. Raises FileNotFoundError for a missing dataset or file and
        ValueError for a damaged or foreign one, each with the file's name and what to do.
        """
        self.source = source if source is not None else SourceConfig(camera=camera or "")
        self.path = dataset_folder(str(path), self.source.revision)
        self.seal = Seal(self.path)
        for name in dataset_files(self.path):
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
        self._task_column = self._instruction_column()
        self._rows: dict[Path, _Rows] = {}

    @classmethod
    def of(cls, source: SourceConfig, root: str = "") -> "LeRobotDataset":
        """The dataset that a source names, its path below `root` where that is given."""
        return cls(Path(root) / source.path if root else source.path, source=source)

    @property
    def num_episodes(self) -> int:
        """How many episodes there are."""
        return len(self.layout.entries)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Control steps of every episode, (num_episodes,) int64."""
        lengths = np.array([entry.length for entry in self.layout.entries], dtype=np.int64)
        return -(-lengths // self.source.row_stride)

    @property
    def embodiment(self) -> str:
        """The robot's name: the source's, else LeRobot's `robot_type`, "unknown" where that is null."""
        return self.source.embodiment or self.info.get("robot_type") or "unknown"

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Keys that the embodiment has and this dataset has not."""
        return self.source.missing_keys

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """What each state dimension is called, its number where the dataset does not say."""
        return self._names("state")

    @cached_property
    def action_names(self) -> tuple[str, ...]:
        """What each action dimension is called, its number where the dataset does not say."""
        return self._names("action")

    @cached_property
    def stats(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """`meta/stats.json`: feature -> statistic -> array. Raises ValueError for other content."""
        path, found = self.path / STATS, {}
        for key, entry in read_json(path).items():
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: {key!r} should map statistics to numbers; {REMEDY}")
            found[key] = {name: _numbers(path, f"{name} of {key!r}", value) for name, value in entry.items()}
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names and contents of all files under meta, data and videos."""
        return self.seal.fingerprint()

    @property
    def view(self) -> Mapping[str, Any]:
        """Whatever of the source's settings changes frames or instructions, JSON-serialisable."""
        source = self.source
        return {
            "cameras": list(self.cameras.features),
            "crop": [source.crop_rows, source.crop_columns],
            "every": source.row_stride,
            "instruction": [self._task_column, *source.strip_prefixes],
        }

    def parts(self, quantity: Quantity) -> tuple[NormalizedPart, ...]:
        """How the keys of a quantity are normalised, each at its place in `states` or `actions`; none without keys."""
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
        """(D,) bool: which actions are movements, by the source or by modality.json's `absolute`."""
        given = self.source.relative
        return np.concatenate([np.full(key.size, key.name in given or not key.absolute) for key in self.keys["action"]])

    def states(self, episode: int) -> np.ndarray:
        """(N, S) float32 states of an episode."""
        rows, where = self._locate(episode)
        return rows.states[where]

    def actions(self, episode: int) -> np.ndarray:
        """(N, D) float32 actions of an episode."""
        rows, where = self._locate(episode)
        return rows.actions[where]

    def instruction(self, episode: int) -> str:
        """The task text of an episode's first row, without the source's prefixes."""
        rows, where = self._locate(episode)
        text, announced = self.task(int(rows.instruction[where.start]), rows.path), self._entry(episode).tasks
        if self._task_column == "task_index" and announced and text not in announced:
            raise ValueError(
                f"{rows.path}: episode {episode} is {text!r} by its rows, {', '.join(map(repr, announced))} by the episode"
                f" list in {self.path / 'meta'}; {REMEDY}"
            )
        for prefix in self.source.strip_prefixes:
            text = text.removeprefix(prefix)
        return text

    def task(self, index: int, path: Path) -> str:
        """The text of a task number found in the rows of `path`."""
        if index not in self.layout.tasks:
            raise ValueError(f"{path}: task {index} is not in the tasks of {self.path / 'meta'}; {REMEDY}")
        return self.layout.tasks[index]

    def frames(self, episode: int) -> np.ndarray:
        """(N, H, W, 3) uint8 RGB frames of an episode, decoded."""
        return self.clip(episode, np.arange(self.lengths[self._entry(episode).index]))

    def clip(self, episode: int, steps: np.ndarray, *, threads: int = 0) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB frames at ascending control steps (T,) of an episode."""
        return self.cameras.frames(self._entry(episode), np.asarray(steps) * self.source.row_stride, threads=threads)

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

    def _entry(self, episode: int) -> EpisodeEntry:
        if not 0 <= episode < self.num_episodes:
            raise ValueError(f"{self.path}: episode {episode} does not exist, there are {self.num_episodes}")
        return self.layout.entries[episode]

    def _locate(self, episode: int) -> tuple[_Rows, slice]:
        """The file's rows and the episode's place among them, checked against the file's own numbers."""
        entry = self._entry(episode)
        if entry.data not in self._rows:
            self.seal.verify(entry.data)
            self._rows[entry.data] = self._read_rows(entry)
        rows = self._rows[entry.data]
        start = 0 if entry.first_row is None or rows.first is None else entry.first_row - rows.first
        stop = start + entry.length
        own = rows.episode_index[start:stop] if start >= 0 else np.zeros(0)
        whole = entry.first_row is not None or len(rows.episode_index) == entry.length
        if len(own) != entry.length or (own != episode).any() or not whole:
            raise ValueError(
                f"{rows.path}: rows {start} to {stop} should be the {entry.length} rows of episode {episode} that"
                f" {self.path / 'meta'} announces, and are not; {REMEDY}"
            )
        if rows.frame_index is not None and (rows.frame_index[start:stop] != np.arange(entry.length)).any():
            raise ValueError(f"{rows.path}: frame_index of episode {episode} does not count from 0; {REMEDY}")
        return rows, slice(start, stop, self.source.row_stride)

    def _read_rows(self, entry: EpisodeEntry) -> _Rows:
        path = entry.data
        keys = {quantity: [key for key in keys if key.column] for quantity, keys in self.keys.items()}
        wanted = {key.column for group in keys.values() for key in group} | {self._task_column, "episode_index"}
        wanted |= {name for name in ("index", "frame_index", "timestamp", "next.success") if name in self.features}
        if entry.first_row is not None:
            wanted.add("index")
        table = read_table(path, sorted(wanted), most=self.layout.rows)
        if table.num_rows == 0:
            raise ValueError(f"{path}: holds no rows; {REMEDY}")
        columns = {key.column for group in keys.values() for key in group}
        values = {name: self._column(table, name, path) for name in columns}
        if "timestamp" in wanted:
            self._check_rate(matrix(table, "timestamp", path)[:, 0], path)
        success = np.zeros(table.num_rows, bool)
        if "next.success" in wanted:
            success = matrix(table, "next.success", path)[:, 0] > 0
        return _Rows(
            path=path,
            first=int(integers(table, "index", path)[0]) if entry.first_row is not None else None,
            episode_index=integers(table, "episode_index", path),
            frame_index=integers(table, "frame_index", path) if "frame_index" in wanted else None,
            instruction=integers(table, self._task_column, path),
            states=self._select("state", values, table.num_rows),
            actions=self._select("action", values, table.num_rows),
            success=success,
        )

    def _check_rate(self, timestamps: np.ndarray, path: Path) -> None:
        """Rows usually come at the announced rate; that some are late is for `agra doctor` to say."""
        steps = np.diff(timestamps.astype(np.float64))
        usual = np.median(steps[steps > 0]) if (steps > 0).any() else None
        if usual is not None and abs(usual * self.info["fps"] - 1) > 0.02:
            raise ValueError(
                f"{path}: its timestamps are {usual:.4f} s apart, {INFO} announces {self.info['fps']:g} rows a second;"
                f" {REMEDY}"
            )

    def _column(self, table: pa.Table, name: str, path: Path) -> np.ndarray:
        values = matrix(table, name, path)
        if values.shape[1] != size(self.features[name]):
            raise ValueError(
                f"{path}: {name!r} has {values.shape[1]} dimensions, {INFO} announces {size(self.features[name])};"
                f" {REMEDY}"
            )
        if not np.isfinite(values).all():
            row, dimension = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(f"{path}: {name!r} is {values[row, dimension]} in row {row}, dimension {dimension}")
        return values

    def _select(self, quantity: str, values: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """The keys' dimensions side by side, zeros for what this dataset lacks."""
        pieces = [
            values[key.column][:, key.start : key.end] if key.column else np.zeros((count, key.size), np.float32)
            for key in self.keys[quantity]
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _keys(self, quantity: str) -> tuple[Key, ...]:
        """The source's keys; one that the dataset lacks has no column, and no size until `fill` gives it one."""
        names = [name for name, _ in self.source.keys(quantity)] or [STATE if quantity == "state" else ACTION]
        found = []
        for name in names:
            if name in self.source.missing_keys:
                found.append(Key(name=name, column="", start=0, end=0))
            else:
                found.append(self.modality.resolve(quantity, name, self.features))
        return tuple(found)

    def fill(self, others: Sequence["LeRobotDataset"]) -> None:
        """Take the size and kind of keys that this dataset lacks from others of its embodiment.

        Raises ValueError where none has such a key, or where they differ in their keys.
        """
        for quantity, keys in self.keys.items():
            names = [key.name for key in keys]
            for other in others:
                if [key.name for key in other.keys[quantity]] != names:
                    raise ValueError(
                        f"{self.path} and {other.path}: both are of embodiment {self.embodiment!r} and differ in their"
                        f" {quantity} keys: {', '.join(names)} and {', '.join(k.name for k in other.keys[quantity])}"
                    )
            known = {key.name: key for other in others for key in other.keys[quantity] if key.column}
            missing = [key.name for key in keys if not key.column and key.name not in known]
            if missing:
                raise ValueError(
                    f"{self.path}: lacks {missing[0]!r}, and no other dataset of embodiment {self.embodiment!r} has it"
                )
            self.keys[quantity] = tuple(
                key if key.column else replace(known[key.name], column="", start=0, end=known[key.name].size)
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
                f"{self.path}: every {self.source.row_stride} of {self.info['fps']} rows a second leaves {rate:g}, expected a"
                " whole number"
            )
        return round(rate)

    def _only_camera(self, camera: str) -> str:
        if camera:
            return camera
        available = self.layout.names("video", "image")
        if len(available) != 1:
            raise ValueError(f"{self.path}: name one camera; available: {', '.join(available) or 'none'}")
        return available[0]

    def _instruction_column(self) -> str:
        key = self.source.instruction_key
        column = self.modality.annotation.get(key, key) or "task_index"
        if column not in self.features:
            known = sorted({*self.modality.annotation, *(n for n in self.features if n.startswith("annotation."))})
            raise ValueError(
                f"{self.path}: no column {column!r} of task numbers; there are {', '.join(['task_index', *known])}"
            )
        return column


def _numbers(path: Path, what: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:  # ragged
        raise ValueError(f"{path}: {what} should be numbers ({error}); {REMEDY}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {what} should be numbers, got {value!r:.60}; {REMEDY}")
    return array


def _dimension_names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Names as LeRobot datasets give them: a list, lists under a heading, or nothing."""
    names, count = feature.get("names"), size(feature)
    if isinstance(names, Mapping):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    if not isinstance(names, list) or len(names) != count:
        return tuple(str(index) for index in range(count))
    return tuple(map(str, names))
