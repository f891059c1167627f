"""GR00T's `meta/modality.json`: names for parts of the state and action columns, for cameras and for annotations.

Source: NVIDIA/Isaac-GR00T, `getting_started/LeRobot_compatible_data_schema.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agra.data.lerobot.json_parquet import read_json
from agra.data.normalization import rotations

MODALITY = "meta/modality.json"
STATE, ACTION = "observation.state", "action"


@dataclass(frozen=True, kw_only=True)
class Key:
    """A named part of a column: dimensions [start, end); `rotation` is GR00T's rotation_type, "" for other quantities."""

    name: str
    column: str
    start: int
    end: int
    rotation: str = ""
    absolute: bool = True

    @property
    def size(self) -> int:
        """How many dimensions it has."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Modality:
    """The names that a dataset gives; all empty where it has no modality.json."""

    path: Path
    state: Mapping[str, Key] = field(default_factory=dict)
    action: Mapping[str, Key] = field(default_factory=dict)
    video: Mapping[str, str] = field(default_factory=dict)  # name -> feature
    annotation: Mapping[str, str] = field(default_factory=dict)  # name -> column

    @classmethod
    def read(cls, root: Path, features: Mapping[str, Mapping[str, Any]]) -> "Modality":
        """The dataset's modality.json, checked against its features; empty where it has none. Raises ValueError."""
        path = root / MODALITY
        if not path.is_file():
            return cls(path=path)
        raw = read_json(path)
        sections = {}
        for name in ("state", "action", "video", "annotation"):
            sections[name] = raw.get(name, {})
            entries = sections[name].values() if isinstance(sections[name], dict) else [None]
            if not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{path}: {name!r} should map names to objects")
        video = {n: _text(path, n, e.get("original_key", n)) for n, e in sections["video"].items()}
        annotation = {
            n: _text(path, n, e.get("original_key", f"annotation.{n}")) for n, e in sections["annotation"].items()
        }
        for name, column in {**video, **annotation}.items():
            if column not in features:
                raise ValueError(f"{path}: {name!r} names the feature {column!r}, which meta/info.json does not have")
        return cls(
            path=path,
            state={n: _key(path, n, e, STATE, features) for n, e in sections["state"].items()},
            action={n: _key(path, n, e, ACTION, features) for n, e in sections["action"].items()},
            video=video,
            annotation=annotation,
        )

    def resolve(self, quantity: str, name: str, features: Mapping[str, Mapping[str, Any]]) -> Key:
        """A key of "state" or "action", or a whole column by that name. Raises ValueError listing what there is."""
        keys = self.state if quantity == "state" else self.action
        if name in keys:
            return keys[name]
        if name in features and features[name]["dtype"] not in ("video", "image", "string"):
            return Key(name=name, column=name, start=0, end=size(features[name]))
        known = ", ".join(keys) or f"no keys, as there is no {MODALITY}"
        raise ValueError(f"{self.path.parent.parent}: no {quantity} key or column {name!r}; there are {known}")


def size(feature: Mapping[str, Any]) -> int:
    """How many numbers a row of a feature holds."""
    total = 1
    for length in feature["shape"]:
        total *= length
    return total


def _key(path: Path, name: str, entry: Mapping[str, Any], column: str, features: Mapping[str, Any]) -> Key:
    column = _text(path, name, entry.get("original_key") or column)
    if column not in features:
        raise ValueError(f"{path}: {name!r} names the feature {column!r}, which meta/info.json does not have")
    start, end, limit = entry.get("start"), entry.get("end"), size(features[column])
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= limit):
        raise ValueError(f"{path}: {name!r} spans {start} to {end} of {column!r}, which has {limit} dimensions")
    rotation, absolute = entry.get("rotation_type") or "", entry.get("absolute", True)
    if not isinstance(rotation, str) or not isinstance(absolute, bool):
        raise ValueError(f"{path}: {name!r} has an ill-typed rotation_type or absolute: {rotation!r}, {absolute!r}")
    if rotation:
        try:
            rotations.check_type(rotation)
        except ValueError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from None
        if rotations.width(rotation) != end - start:
            raise ValueError(f"{path}: {name!r} is a {rotation} of {end - start} dimensions")
    return Key(name=name, column=column, start=start, end=end, rotation=rotation, absolute=absolute)


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{path}: original_key of {name!r} should be a text, got {value!r}")
    return value
