"""What frozen networks compute, kept on disk under the content and the settings that it follows from.

A feature's folder is named after a hash of its key, of the dataset's contents and of how the dataset is seen: a changed
setting or file means another folder, never a stale value. Inside lie one safetensors file an episode and, once all that
are wanted are there, a manifest. Beside every array lies a CRC-32 of each of its rows, verified when the row is read.
"""

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agra.data.lerobot.dataset import LeRobotDataset
from agra.types import Episode

MANIFEST = "manifest.json"
_CHECK = "/crc32"


class Feature(Protocol):
    """Something to be computed once for every episode."""

    @property
    def name(self) -> str:
        """Names the folder, and the array that `CachedFeature.shape` tells of."""
        ...

    @property
    def key(self) -> Mapping[str, Any]:
        """Every setting that the values depend on, JSON-serialisable."""
        ...

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Named arrays of one episode. All but the first axis must have the same length for all episodes."""
        ...


def feature_folder(dataset: LeRobotDataset, feature: Feature, root: Path) -> Path:
    """Where a feature of a dataset, seen as its source says, is kept under `root`."""
    decides = {"key": dict(feature.key), "dataset": dataset.fingerprint, "view": dict(dataset.view)}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return root / f"{feature.name}-{digest[:16]}"


@dataclass(frozen=True, kw_only=True)
class CacheEstimate:
    """What preparing will take, measured on one episode and scaled by control steps."""

    episodes: int  # still to be computed
    bytes: int  # of files still to be written
    seconds: float  # for one process
    free_bytes: int  # on the cache's disk

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds >= 60 else f"{self.seconds:.0f} s"
        return (
            f"{self.episodes} episodes to prepare, about {self.bytes / 2**20:,.1f} MiB and {minutes} in one process;"
            f" {self.free_bytes / 2**30:,.1f} GiB are free"
        )


def estimate_cost(
    dataset: LeRobotDataset, features: Sequence[Feature], root: Path, *, episodes: Sequence[int] | None = None
) -> CacheEstimate:
    """Measure one episode of median length, in memory, and scale. Nothing is written but the folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    wanted = range(dataset.num_episodes) if episodes is None else episodes
    lacking = [
        (i, f) for f in features for i in wanted if not episode_file(feature_folder(dataset, f, root), i).is_file()
    ]
    if not lacking:
        return CacheEstimate(episodes=0, bytes=0, seconds=0.0, free_bytes=free)
    steps = {feature.name: int(dataset.lengths[[i for i, f in lacking if f is feature]].sum()) for feature in features}
    left = sorted({i for i, _ in lacking}, key=lambda i: dataset.lengths[i])
    sample = left[len(left) // 2]
    clock = time.perf_counter()
    episode = dataset.episode(sample)
    decoding = (time.perf_counter() - clock) / len(episode)
    seconds, size = decoding * int(dataset.lengths[left].sum()), 0.0
    for feature in features:
        if steps[feature.name]:
            clock = time.perf_counter()
            arrays = feature.compute(episode)
            seconds += (time.perf_counter() - clock) / len(episode) * steps[feature.name]
            rowwise = sum(a.nbytes for a in arrays.values() if len(a) == len(episode))
            fixed = sum(a.nbytes for a in arrays.values()) - rowwise
            count = sum(f is feature for _, f in lacking)
            size += rowwise / len(episode) * steps[feature.name] + fixed * count
    return CacheEstimate(episodes=len(left), bytes=round(size), seconds=seconds, free_bytes=free)


def cache_features(
    dataset: LeRobotDataset,
    features: Sequence[Feature],
    root: Path,
    *,
    episodes: Sequence[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> list[Path]:
    """Compute what is missing of `features` for `episodes` (all by default) and return their folders, in order.

    An episode is decoded once for all features that lack it. May be killed at any time and run again: finished
    episodes are kept, unfinished files have another name. Of several processes each computes its share of the
    episodes; whichever finishes last completes the folders.
    """
    wanted = list(range(dataset.num_episodes) if episodes is None else episodes)
    folders = [feature_folder(dataset, feature, root) for feature in features]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        for index in bar.track(wanted[rank::world_size], description=", ".join(f.name for f in features)):
            lacking = [(f, p) for f, p in zip(features, folders, strict=True) if not episode_file(p, index).is_file()]
            if lacking:
                episode = dataset.episode(index)
                for feature, path in lacking:
                    metadata = {"folder": path.name, "episode": str(index)}
                    save_arrays(episode_file(path, index), feature.compute(episode), metadata)
    for feature, path in zip(features, folders, strict=True):
        if all(episode_file(path, index).is_file() for index in wanted):
            _write_manifest(path, feature, dataset, wanted)
    return folders


class CachedFeature:
    """A prepared feature, read by rows; held in memory where all its files together are small."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, in_memory: bool) -> None:
        self.path = path
        self.name: str = manifest["name"]
        self.episodes: tuple[int, ...] = tuple(manifest["episodes"])
        self._shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        self._memory = {index: self._load(index) for index in self.episodes} if in_memory else None

    @classmethod
    def open(
        cls, path: Path, *, episodes: Sequence[int] | None = None, memory_limit: int = 2 * 2**30
    ) -> "CachedFeature":
        """Open a folder that `prepare` has finished; up to `memory_limit` bytes are read into memory.

        Raises FileNotFoundError where it is missing, unfinished, or lacks one of `episodes` (all prepared by default).
        """
        if not (path / MANIFEST).is_file():
            there = len(list(path.glob("*.safetensors")))
            state = f"only {there} episodes are prepared" if there else "not prepared"
            raise FileNotFoundError(f"{path}: {state}; run agra prepare with these settings")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        unprepared = [index for index in episodes or () if index not in set(manifest["episodes"])]
        if unprepared:
            raise FileNotFoundError(f"{path}: episode {unprepared[0]} is not prepared; run agra prepare")
        missing = [index for index in manifest["episodes"] if not episode_file(path, index).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{episode_file(path, missing[0])}: prepared file is missing; remove {path} and run agra prepare"
            )
        size = sum(episode_file(path, index).stat().st_size for index in manifest["episodes"])
        return cls(path, manifest, in_memory=size <= memory_limit)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row of the array that is named like the feature."""
        return self._shapes[self.name]

    def read(self, episode: int, name: str | None = None, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Rows of an episode's array (the one named like the feature by default), all of them by default.

        Only the stretch between the first and the last row is read from disk. Raises ValueError for a damaged file.
        """
        name = self.name if name is None else name
        if self._memory is not None:
            whole = self._memory[episode][name]
            return whole if rows is None else whole[np.asarray(rows)]
        path = episode_file(self.path, episode)
        try:
            with safe_open(path, framework="numpy") as file:
                self._check_identity(file.metadata(), path, episode)
                if rows is None:
                    return verified(file.get_tensor(name), file.get_tensor(name + _CHECK), path, name)
                rows = np.asarray(rows)
                stretch = slice(int(rows.min()), int(rows.max()) + 1)
                values, check = file.get_slice(name)[stretch], file.get_slice(name + _CHECK)[stretch]
                return verified(values, check, path, name, rows - stretch.start)
        except (SafetensorError, OSError) as error:
            raise ValueError(damaged(path, error)) from error

    def _load(self, episode: int) -> dict[str, np.ndarray]:
        path = episode_file(self.path, episode)
        try:
            with safe_open(path, framework="numpy") as file:
                self._check_identity(file.metadata(), path, episode)
                names = [name for name in file.keys() if not name.endswith(_CHECK)]  # noqa: SIM118
                return {n: verified(file.get_tensor(n), file.get_tensor(n + _CHECK), path, n) for n in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(damaged(path, error)) from error

    def _check_identity(self, metadata: Mapping[str, str] | None, path: Path, episode: int) -> None:
        expected = {"folder": self.path.name, "episode": str(episode)}
        if metadata != expected:
            raise ValueError(damaged(path, f"it says to be {metadata}"))


def episode_file(path: Path, episode: int) -> Path:
    """An episode's file in a feature's folder."""
    return path / f"episode-{episode:06d}.safetensors"


def damaged(path: Path, error: object) -> str:
    """An error message for a prepared file that cannot be trusted."""
    return f"{path}: damaged ({error}); remove {path.parent} and run agra prepare"


def _row_checks(array: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(array).reshape(len(array), -1)
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.uint32)


def verified(
    values: np.ndarray, check: np.ndarray, path: Path, name: str, rows: np.ndarray | None = None
) -> np.ndarray:
    """`values`, or its `rows`, each compared with its checksum."""
    if rows is not None:
        values, check = values[rows], check[rows]
    if not np.array_equal(_row_checks(values), check):
        raise ValueError(damaged(path, f"a row of {name!r} differs from its checksum"))
    return values


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays with a checksum of each of their rows beside them. Raises OSError naming the file where it cannot."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    whole |= {name + _CHECK: _row_checks(array) for name, array in arrays.items()}
    try:
        save_file(whole, temporary, metadata=dict(metadata))
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_manifest(path: Path, feature: Feature, dataset: LeRobotDataset, episodes: Sequence[int]) -> None:
    """Check that all episodes agree, and mark the folder as complete."""
    known = json.loads((path / MANIFEST).read_text(encoding="utf-8")) if (path / MANIFEST).is_file() else {}
    if set(episodes) <= set(known.get("episodes", ())):
        return
    shapes: dict[str, list[int]] = {}
    for index in episodes:
        try:
            with safe_open(episode_file(path, index), framework="numpy") as file:
                names = [name for name in file.keys() if not name.endswith(_CHECK)]  # noqa: SIM118
                found = {name: list(file.get_slice(name).get_shape()[1:]) for name in names}
        except SafetensorError as error:
            raise ValueError(damaged(episode_file(path, index), error)) from error
        shapes = shapes or found
        if found != shapes or feature.name not in found:
            raise ValueError(
                f"{episode_file(path, index)}: expected rows of {shapes} with {feature.name!r}, got {found}"
            )
    manifest = {
        "name": feature.name,
        "key": dict(feature.key),
        "dataset": dataset.fingerprint,
        "view": dict(dataset.view),
        "episodes": sorted({*episodes, *known.get("episodes", ())}),
        "shapes": shapes,
    }
    temporary = path / f"{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path / MANIFEST)
