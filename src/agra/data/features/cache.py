"""A disk cache of the outputs of frozen networks.

The folder of a feature is named after a hash of its key, of the dataset's contents and of the source's view of the
dataset. A changed setting or file gives another folder, never a stale value. The folder holds one safetensors file for
each episode, and a manifest as soon as all requested episodes are there. Every array has a CRC-32 of each of its rows,
which is verified when the row is read.
"""

import hashlib
import json
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

from agra import files
from agra.data.lerobot.dataset import LeRobotDataset
from agra.types import Episode
from agra.weights import sort_metadata

MANIFEST = "manifest.json"
_CHECK = "/crc32"
MEMORY_LIMIT = 2 * 2**30  # bytes. Features of one folder up to this size are held in memory


class Feature(Protocol):
    """A computation that runs once for every episode."""

    @property
    def name(self) -> str:
        """Name of the folder and of the main array, whose shape is `CachedFeature.shape`."""
        ...

    @property
    def key(self) -> Mapping[str, Any]:
        """Every setting that the values depend on, JSON-serialisable."""
        ...

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Compute named arrays of one episode. Except for the first axis, shapes must be the same for all episodes."""
        ...


def feature_folder(dataset: LeRobotDataset, feature: Feature, root: Path) -> Path:
    """Return the folder of a feature, for a dataset in the view of its source, below `root`."""
    identity = {"key": dict(feature.key), "dataset": dataset.fingerprint, "view": dict(dataset.view)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return root / f"{feature.name}-{digest[:16]}"


@dataclass(frozen=True, kw_only=True)
class CacheEstimate:
    """The cost of computing features, measured on one episode and scaled by control steps."""

    episodes: int  # not computed yet
    bytes: int  # of their files
    seconds: float  # for one process
    free_bytes: int  # on the disk of the cache

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds >= 60 else f"{self.seconds:.0f} s"
        return (
            f"{self.episodes} episodes to prepare, about {self.bytes / 2**20:,.1f} MiB and {minutes} in one process;"
            f" {self.free_bytes / 2**30:,.1f} GiB free"
        )


def estimate_cost(
    dataset: LeRobotDataset, features: Sequence[Feature], root: Path, *, episodes: Sequence[int] | None = None
) -> CacheEstimate:
    """Measure the computation of one episode of median length, and scale it. Nothing is written, but `root` is made."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    requested = range(dataset.num_episodes) if episodes is None else episodes
    missing = [
        (index, feature)
        for feature in features
        for index in requested
        if not episode_file(feature_folder(dataset, feature, root), index).is_file()
    ]
    if not missing:
        return CacheEstimate(episodes=0, bytes=0, seconds=0.0, free_bytes=free)
    steps = {feature.name: int(dataset.lengths[[i for i, f in missing if f is feature]].sum()) for feature in features}
    remaining = sorted({i for i, _ in missing}, key=lambda i: dataset.lengths[i])
    sample = remaining[len(remaining) // 2]
    clock = time.perf_counter()
    episode = dataset.episode(sample)
    decoding = (time.perf_counter() - clock) / len(episode)
    seconds, size = decoding * int(dataset.lengths[remaining].sum()), 0.0
    for feature in features:
        if steps[feature.name]:
            clock = time.perf_counter()
            arrays = feature.compute(episode)
            seconds += (time.perf_counter() - clock) / len(episode) * steps[feature.name]
            row_bytes = sum(a.nbytes for a in arrays.values() if len(a) == len(episode))
            fixed_bytes = sum(a.nbytes for a in arrays.values()) - row_bytes
            count = sum(f is feature for _, f in missing)
            size += row_bytes / len(episode) * steps[feature.name] + fixed_bytes * count
    return CacheEstimate(episodes=len(remaining), bytes=round(size), seconds=seconds, free_bytes=free)


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
    """Compute the missing episodes of `features` and return their folders, in order. `episodes` are all by default.

    An episode is decoded once for all features. The process can be killed at any time and started again: finished
    episodes remain, and unfinished files have temporary names. Each of `world_size` processes computes every
    `world_size`-th episode. The last process to finish writes the manifests. Raises OSError, naming the file, where the
    disk is full.
    """
    requested = list(range(dataset.num_episodes) if episodes is None else episodes)
    folders = [feature_folder(dataset, feature, root) for feature in features]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        for index in bar.track(requested[rank::world_size], description=", ".join(f.name for f in features)):
            missing = [(f, p) for f, p in zip(features, folders, strict=True) if not episode_file(p, index).is_file()]
            if missing:
                episode = dataset.episode(index)
                for feature, path in missing:
                    metadata = {"folder": path.name, "episode": str(index)}
                    save_arrays(episode_file(path, index), feature.compute(episode), metadata)
    for feature, path in zip(features, folders, strict=True):
        if all(episode_file(path, index).is_file() for index in requested):
            _write_manifest(path, feature, dataset, requested)
    return folders


class CachedFeature:
    """A cached feature, read by rows. Small features are held in memory."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, in_memory: bool) -> None:
        self.path = path
        self.name: str = manifest["name"]
        self.episodes: tuple[int, ...] = tuple(manifest["episodes"])
        self._shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        self._memory = {index: self._load(index) for index in self.episodes} if in_memory else None

    @classmethod
    def open(
        cls, path: Path, *, episodes: Sequence[int] | None = None, memory_limit: int = MEMORY_LIMIT
    ) -> "CachedFeature":
        """Open a complete folder. Its files are read into memory where they have at most `memory_limit` bytes together.

        Raises FileNotFoundError where the folder is missing or incomplete, or one of `episodes` is not prepared.
        """
        if not (path / MANIFEST).is_file():
            count = len(list(path.glob("*.safetensors")))
            state = f"only {count} episodes are prepared" if count else "not prepared"
            raise FileNotFoundError(f"{path}: {state}; run agra prepare with these settings")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        prepared = set(manifest["episodes"])
        unprepared = [index for index in episodes or () if index not in prepared]
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
        """Shape of one row of the main array."""
        return self._shapes[self.name]

    def read(self, episode: int, name: str | None = None, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Read rows of an array of an episode: by default all rows of the main array.

        Only the range from the first to the last row is read from disk. Raises ValueError for a damaged file.
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
                span = slice(int(rows.min()), int(rows.max()) + 1)
                values, check = file.get_slice(name)[span], file.get_slice(name + _CHECK)[span]
                return verified(values, check, path, name, rows - span.start)
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
            raise ValueError(damaged(path, f"its metadata is {metadata}"))


def episode_file(path: Path, episode: int) -> Path:
    """Return the file of an episode in a feature's folder."""
    return path / f"episode-{episode:06d}.safetensors"


def damaged(path: Path, error: object) -> str:
    """Return the error message for a damaged file of a feature's folder."""
    return f"{path}: damaged ({error}); remove {path.parent} and run agra prepare"


def _row_checks(array: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(array).reshape(len(array), -1)
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.uint32)


def verified(
    values: np.ndarray, check: np.ndarray, path: Path, name: str, rows: np.ndarray | None = None
) -> np.ndarray:
    """Return `values`, or `rows` of them, after each row is compared with its checksum.

    Raises ValueError for a difference.
    """
    if rows is not None:
        values, check = values[rows], check[rows]
    if not np.array_equal(_row_checks(values), check):
        raise ValueError(damaged(path, f"a row of {name!r} differs from its checksum"))
    return values


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays and a checksum of each of their rows. Raises OSError, naming the file, where the disk is full."""
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    tensors |= {name + _CHECK: _row_checks(array) for name, array in arrays.items()}
    with files.replacing(path, failures=SafetensorError) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata))
        sort_metadata(temporary)


def _write_manifest(path: Path, feature: Feature, dataset: LeRobotDataset, episodes: Sequence[int]) -> None:
    """Check that all episodes have the same shapes, and mark the folder as complete."""
    earlier = json.loads((path / MANIFEST).read_text(encoding="utf-8")) if (path / MANIFEST).is_file() else {}
    if set(episodes) <= set(earlier.get("episodes", ())):
        return
    shapes: dict[str, list[int]] = {}
    for index in episodes:
        try:
            with safe_open(episode_file(path, index), framework="numpy") as file:
                names = [name for name in file.keys() if not name.endswith(_CHECK)]  # noqa: SIM118
                episode_shapes = {name: list(file.get_slice(name).get_shape()[1:]) for name in names}
        except SafetensorError as error:
            raise ValueError(damaged(episode_file(path, index), error)) from error
        shapes = shapes or episode_shapes
        if episode_shapes != shapes or feature.name not in episode_shapes:
            raise ValueError(
                f"{episode_file(path, index)}: expected rows of {shapes} with {feature.name!r}, got {episode_shapes}"
            )
    manifest = {
        "name": feature.name,
        "key": dict(feature.key),
        "dataset": dataset.fingerprint,
        "view": dict(dataset.view),
        "episodes": sorted({*episodes, *earlier.get("episodes", ())}),
        "shapes": shapes,
    }
    files.write_text(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
