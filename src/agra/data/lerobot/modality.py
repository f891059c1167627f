"""GR00T's `meta/modality.json`: names for parts of the state and action columns, for cameras and for annotations.

Source: NVIDIA/Isaac-GR00T, `getting_started/LeRobot_compatible_data_schema.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agra.data.lerobot.json_parquet import read_json
from agra.data.normalization import rotations

MODALITY = "meta/modality.json"
STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A named part of a column: dimensions [start, end).

    `rotation` is GR00T's rotation_type, "" for other quantities.
    """

    name: str
    column: str
    start: int
    end: int
    rotation: str = ""
    absolute: bool = True

    @property
    def size(self) -> int:
        """Number of dimensions."""
        return self.end - self.start

    @property
    def identity(self) -> np.ndarray:
        """(size,) float32. No movement: the rotation by 0, and zeros for other quantities."""
        return rotations.identity(self.rotation) if self.rotation else np.zeros(self.size, np.float32)


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Names of a dataset's parts, cameras and annotations. All empty where it has no modality.json."""

    path: Path
    state: Mapping[str, Key] = field(default_factory=dict)
    action: Mapping[str, Key] = field(default_factory=dict)
    video: Mapping[str, str] = field(default_factory=dict)  # name -> feature
    annotation: Mapping[str, str] = field(default_factory=dict)  # name -> column

    @classmethod
    def read(cls, root: Path, features: Mapping[str, Mapping[str, Any]]) -> "Modality":
        """Read a dataset's modality.json and check it against the features.

        Raises ValueError for a damaged file, or names that the features do not have.
        """
        path = root / MODALITY
        if not path.is_file():
            return cls(path=path)
        raw = read_json(path)
        sections = {}
        for name in ("state", "action", "video", "annotation"):
            sections[name] = raw.get(name, {})
            entries = sections[name].values() if isinstance(sections[name], dict) else [None]
            if not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{path}: {name!r}: expected an object of objects")
        video = {n: _text(path, n, e.get("original_key", n)) for n, e in sections["video"].items()}
        annotation = {
            n: _text(path, n, e.get("original_key", f"annotation.{n}")) for n, e in sections["annotation"].items()
        }
        for name, column in {**video, **annotation}.items():
            if column not in features:
                raise ValueError(f"{path}: {name!r}: the feature {column!r} is not in meta/info.json")
        return cls(
            path=path,
            state={n: _key(path, n, e, STATE, features) for n, e in sections["state"].items()},
            action={n: _key(path, n, e, ACTION, features) for n, e in sections["action"].items()},
            video=video,
            annotation=annotation,
        )

    def resolve(self, quantity: str, name: str, features: Mapping[str, Mapping[str, Any]]) -> Key:
        """Return a key of "state" or "action", or a whole column of that name.

        Raises ValueError with the available keys.
        """
        keys = self.state if quantity == "state" else self.action
        if name in keys:
            return keys[name]
        if name in features and features[name]["dtype"] not in ("video", "image", "string"):
            return Key(name=name, column=name, start=0, end=size(features[name]))
        available = ", ".join(keys) or f"none, since there is no {MODALITY}"
        raise ValueError(
            f"{self.path.parent.parent}: no {quantity} key or column {name!r}; available keys: {available}"
        )

    def moves(self, key: Key) -> np.ndarray:
        """(size,) bool. True for the dimensions of an action key, or of a whole column, that are not `absolute`."""
        moves = np.full(key.size, not key.absolute)
        for part in self._parts(key):
            moves[part.start : part.end] |= not part.absolute
        return moves

    def no_movement(self, key: Key) -> np.ndarray:
        """(size,) float32. The action key, or whole column, where nothing moves."""
        still = key.identity
        for part in self._parts(key):
            still[part.start : part.end] = part.identity
        return still

    def _parts(self, key: Key) -> list[Key]:
        """Return the action keys inside a whole column, and none of a key."""
        return [part for part in self.action.values() if part.column == key.column and key.name not in self.action]


def size(feature: Mapping[str, Any]) -> int:
    """Return how many numbers a row of a feature holds."""
    total = 1
    for length in feature["shape"]:
        total *= length
    return total


def _key(path: Path, name: str, entry: Mapping[str, Any], column: str, features: Mapping[str, Any]) -> Key:
    column = _text(path, name, entry.get("original_key") or column)
    if column not in features:
        raise ValueError(f"{path}: {name!r}: the feature {column!r} is not in meta/info.json")
    start, end, limit = entry.get("start"), entry.get("end"), size(features[column])
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= limit):
        raise ValueError(f"{path}: {name!r} spans {start} to {end} of {column!r}, which has {limit} dimensions")
    rotation, absolute = entry.get("rotation_type") or "", entry.get("absolute", True)
    if not isinstance(rotation, str) or not isinstance(absolute, bool):
        raise ValueError(f"{path}: {name!r} rotation_type or absolute has a wrong type: {rotation!r}, {absolute!r}")
    if rotation:
        try:
            rotations.check_type(rotation)
        except ValueError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from None
        if rotations.width(rotation) != end - start:
            raise ValueError(
                f"{path}: {name!r}: rotation_type {rotation} has {rotations.width(rotation)} dimensions, got "
                f"{end - start}"
            )
    return Key(name=name, column=column, start=start, end=end, rotation=rotation, absolute=absolute)


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{path}: original_key of {name!r}: expected text, got {value!r}")
    return value
