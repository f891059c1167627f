"""What frozen networks compute, kept on disk under the content and the settings that it follows from.

A feature's folder is named after a hash of its key and of the dataset's contents: a changed setting or dataset means
another folder, never a stale value. Inside lie one safetensors file an episode and, once all are there, a manifest.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agra.data.lerobot import LeRobotDataset
from agra.types import Episode

MANIFEST = "manifest.json"


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


def folder(dataset: LeRobotDataset, feature: Feature, root: Path) -> Path:
    """Where a feature of a dataset, seen through its chosen camera, is kept under `root`."""
    decides = {"key": dict(feature.key), "dataset": dataset.fingerprint, "camera": dataset.camera}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return root / f"{feature.name}-{digest[:16]}"


def prepare(dataset: LeRobotDataset, features: Sequence[Feature], root: Path, *, progress: bool = True) -> list[Path]:
    """Compute what is missing of `features` and return their folders, in order.

    An episode is decoded once for all features that lack it. May be killed at any time and run again: finished
    episodes are kept, unfinished files have another name.
    """
    folders = [folder(dataset, feature, root) for feature in features]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        for index in bar.track(range(dataset.num_episodes), description=", ".join(f.name for f in features)):
            lacking = [(f, p) for f, p in zip(features, folders, strict=True) if not _file(p, index).is_file()]
            if lacking:
                episode = dataset.episode(index)
                for feature, path in lacking:
                    _save(_file(path, index), feature.compute(episode))
    for feature, path in zip(features, folders, strict=True):
        if not (path / MANIFEST).is_file():
            _write_manifest(path, feature, dataset)
    return folders


class CachedFeature:
    """A prepared feature, read by rows; held in memory where all its files together are small."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, in_memory: bool) -> None:
        self.path = path
        self.name: str = manifest["name"]
        self.num_episodes: int = manifest["episodes"]
        self._shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        self._memory = [self._load(index) for index in range(self.num_episodes)] if in_memory else None

    @classmethod
    def open(cls, path: Path, *, memory_limit: int = 2 * 2**30) -> "CachedFeature":
        """Open a folder that `prepare` has finished; up to `memory_limit` bytes are read into memory.

        Raises FileNotFoundError where it is missing or unfinished.
        """
        if not (path / MANIFEST).is_file():
            there = len(list(path.glob("*.safetensors")))
            state = f"only {there} episodes are prepared" if there else "not prepared"
            raise FileNotFoundError(f"{path}: {state}; run agra prepare with these settings")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        missing = [index for index in range(manifest["episodes"]) if not _file(path, index).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{_file(path, missing[0])}: prepared file is missing; remove {path} and run agra prepare"
            )
        size = sum(_file(path, index).stat().st_size for index in range(manifest["episodes"]))
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
        path = _file(self.path, episode)
        try:
            with safe_open(path, framework="numpy") as file:
                if rows is None:
                    return file.get_tensor(name)
                rows = np.asarray(rows)
                first = int(rows.min())
                return file.get_slice(name)[first : int(rows.max()) + 1][rows - first]
        except SafetensorError as error:
            raise ValueError(_damaged(path, error)) from error

    def _load(self, episode: int) -> dict[str, np.ndarray]:
        path = _file(self.path, episode)
        try:
            with safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(_damaged(path, error)) from error


def _file(path: Path, episode: int) -> Path:
    return path / f"episode-{episode:06d}.safetensors"


def _damaged(path: Path, error: SafetensorError) -> str:
    return f"{path}: damaged ({error}); remove {path.parent} and run agra prepare"


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
    os.replace(temporary, path)


def _write_manifest(path: Path, feature: Feature, dataset: LeRobotDataset) -> None:
    """Check that all episodes agree, and mark the folder as complete."""
    shapes: dict[str, list[int]] = {}
    for index in range(dataset.num_episodes):
        try:
            with safe_open(_file(path, index), framework="numpy") as file:
                found = {name: list(file.get_slice(name).get_shape()[1:]) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(_damaged(_file(path, index), error)) from error
        shapes = shapes or found
        if found != shapes or feature.name not in found:
            raise ValueError(f"{_file(path, index)}: expected rows of {shapes} with {feature.name!r}, got {found}")
    manifest = {
        "name": feature.name,
        "key": dict(feature.key),
        "dataset": dataset.fingerprint,
        "camera": dataset.camera,
        "episodes": dataset.num_episodes,
        "shapes": shapes,
    }
    temporary = path / f"{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path / MANIFEST)
