"""States and actions to the model's range and back. numpy and scipy only: a robot's client un-normalises too.

A quantity is a row of parts, each with its method. Affine methods are `(values - offset) / scale`; a dimension that never
changes has scale 0: it becomes 0, and its inverse is the constant. `sin_cos` turns an angle into two numbers, `rot6d` a
rotation into six (docs/paper.md #30), so a part may be wider in the model than on the robot. Every method has its inverse.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from agra import files
from agra.data.normalization import rotations
from agra.data.normalization.dataset_statistics import Statistics, describe_stream

Normalization = Literal["min_max", "mean_std", "q01_q99", "sin_cos", "rot6d", "none"]
Quantity = Literal["state", "action"]
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

_KEPT = ("min", "max", "mean", "std", "q01", "q99", "count")


def normalize(values: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(values - offset) / scale, and 0 where scale is 0; (..., D) float32."""
    moved = np.asarray(values, dtype=np.float64) - offset
    return np.where(scale > 0, moved / np.where(scale > 0, scale, 1), 0).astype(np.float32)


def unnormalize(values: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Inverse of `normalize`: values * scale + offset, (..., D) float32."""
    return (np.asarray(values, dtype=np.float64) * scale + offset).astype(np.float32)


def _between(low: str, high: str) -> Callable[[Statistics], tuple[np.ndarray, np.ndarray]]:
    return lambda s: ((s[high] + s[low]) / 2, (s[high] - s[low]) / 2)


AFFINE: Mapping[Normalization, Callable[[Statistics], tuple[np.ndarray, np.ndarray]]] = {
    "min_max": _between("min", "max"),  # to [-1, 1], GR00T's choice for actions
    "q01_q99": _between("q01", "q99"),  # 98 % of the values to [-1, 1]
    "mean_std": lambda s: (s["mean"], s["std"]),
}
"""Affine method -> (offset, scale), each (D,), from the statistics of a quantity."""


@dataclass(frozen=True, kw_only=True)
class NormalizedPart:
    """Dimensions [start, end) of a state or an action, and how they go to the model's range.

    `rotation` is GR00T's rotation_type of these dimensions, "" where they are no rotation; "rot6d" needs it.
    """

    name: str
    start: int
    end: int
    method: Normalization
    rotation: str = ""

    def __post_init__(self) -> None:
        if self.method not in NORMALIZATIONS:
            raise ValueError(
                f"normalisation of {self.name}: expected one of {', '.join(NORMALIZATIONS)}, got {self.method!r}"
            )
        if self.method == "rot6d" and not self.rotation:
            raise ValueError(f"normalisation of {self.name}: rot6d needs a rotation_type in meta/modality.json")
        if self.rotation and rotations.width(rotations.check_type(self.rotation)) != self.end - self.start:
            raise ValueError(f"{self.name}: a {self.rotation} of {self.end - self.start} dimensions")

    @property
    def width(self) -> int:
        """How many numbers the model sees."""
        return {"sin_cos": 2 * (self.end - self.start), "rot6d": 6}.get(self.method, self.end - self.start)

    def encode(self, values: np.ndarray, statistics: Statistics) -> np.ndarray:
        """(..., end - start) in the robot's units to (..., width) float32. Sines come before cosines, as in GR00T."""
        if self.method == "none":
            return np.asarray(values, dtype=np.float32)
        if self.method == "sin_cos":
            angles = np.asarray(values, dtype=np.float64)
            return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
        if self.method == "rot6d":
            return rotations.to_six(np.asarray(values), self.rotation).astype(np.float32)
        return normalize(values, *AFFINE[self.method](self._own(statistics)))

    def decode(self, values: np.ndarray, statistics: Statistics) -> np.ndarray:
        """Inverse of `encode`. Nothing is clipped; angles come back in (-pi, pi], rotations as `from_six` says."""
        if self.method == "none":
            return np.asarray(values, dtype=np.float32)
        if self.method == "sin_cos":
            sines, cosines = np.split(np.asarray(values, dtype=np.float64), 2, axis=-1)
            return np.arctan2(sines, cosines).astype(np.float32)
        if self.method == "rot6d":
            return rotations.from_six(np.asarray(values), self.rotation).astype(np.float32)
        return unnormalize(values, *AFFINE[self.method](self._own(statistics)))

    def _own(self, statistics: Statistics) -> Statistics:
        return {name: statistics[name][self.start : self.end] for name in _KEPT if name != "count"}


class Rows(Protocol):
    """What is needed of a dataset. `lacks` names parts that are only zeros there: they enter no statistics."""

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Names of parts."""
        ...

    @property
    def episodes(self) -> Iterable[int]:
        """The episodes that count."""
        ...

    def states(self, episode: int) -> np.ndarray:
        """(N, S)."""
        ...

    def actions(self, episode: int) -> np.ndarray:
        """(N, D)."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class NormStats:
    """One embodiment's statistics and the methods that they are used with; without parts, `method` is that of all."""

    method: Normalization
    state: Statistics  # each (S,) float64
    action: Statistics  # each (D,) float64
    state_parts: tuple[NormalizedPart, ...] = ()
    action_parts: tuple[NormalizedPart, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in NORMALIZATIONS:
            raise ValueError(f"NormStats.method: expected one of {', '.join(NORMALIZATIONS)}, got {self.method!r}")

    @classmethod
    def of(
        cls,
        datasets: Sequence[Rows],
        method: Normalization,
        *,
        state_parts: tuple[NormalizedPart, ...] = (),
        action_parts: tuple[NormalizedPart, ...] = (),
    ) -> "NormStats":
        """Exact statistics over the rows of all `datasets` together, read as a stream.

        Raises ValueError where a value is not finite, or where every dataset lacks a part.
        """
        return cls(
            method=method,
            state=_describe_parts(datasets, "state", state_parts),
            action=_describe_parts(datasets, "action", action_parts),
            state_parts=state_parts,
            action_parts=action_parts,
        )

    @property
    def state_dim(self) -> int:
        """S, as the robot has it."""
        return len(self.state["mean"])

    @property
    def action_dim(self) -> int:
        """D, as the robot has it."""
        return len(self.action["mean"])

    def width(self, quantity: Quantity) -> int:
        """How many numbers the model sees of a quantity."""
        return sum(part.width for part in self.parts(quantity))

    def parts(self, quantity: Quantity) -> tuple[NormalizedPart, ...]:
        """What a quantity consists of, in order."""
        given = self.state_parts if quantity == "state" else self.action_parts
        size = self.state_dim if quantity == "state" else self.action_dim
        return given or (NormalizedPart(name=quantity, start=0, end=size, method=self.method),)

    def mask(self, quantity: Quantity, lacks: Sequence[str] = ()) -> np.ndarray:
        """(width,) bool: False for the numbers of parts that are lacking."""
        return np.concatenate([np.full(part.width, part.name not in lacks) for part in self.parts(quantity)])

    def normalize(self, quantity: Quantity, values: np.ndarray) -> np.ndarray:
        """States (..., S) or actions (..., D) in the robot's units to the model's (..., width), float32."""
        statistics = self.state if quantity == "state" else self.action
        parts, values = self.parts(quantity), np.asarray(values)
        if values.shape[-1:] != (parts[-1].end,):
            raise ValueError(f"{quantity}: expected {parts[-1].end} dimensions, got an array of {np.shape(values)}")
        return np.concatenate([p.encode(values[..., p.start : p.end], statistics) for p in parts], axis=-1)

    def unnormalize(self, quantity: Quantity, values: np.ndarray) -> np.ndarray:
        """Inverse of `normalize`. Nothing is clipped."""
        statistics = self.state if quantity == "state" else self.action
        parts, values = self.parts(quantity), np.asarray(values)
        if values.shape[-1:] != (self.width(quantity),):
            raise ValueError(f"{quantity}: expected {self.width(quantity)} dimensions, got an array of {values.shape}")
        ends = np.cumsum([part.width for part in parts])[:-1]
        pieces = zip(parts, np.split(values, ends, axis=-1), strict=True)
        return np.concatenate([part.decode(piece, statistics) for part, piece in pieces], axis=-1)

    @staticmethod
    def save_all(stats: Mapping[str, "NormStats"], path: Path) -> None:
        """Write the statistics of all embodiments as JSON: embodiment -> method, state, action, and their parts."""
        content = {}
        for embodiment, one in stats.items():
            content[embodiment] = {
                "method": one.method,
                "state": {name: np.asarray(one.state[name]).tolist() for name in _KEPT},
                "action": {name: np.asarray(one.action[name]).tolist() for name in _KEPT},
                "state_parts": [asdict(part) for part in one.state_parts],
                "action_parts": [asdict(part) for part in one.action_parts],
            }
        files.write_text(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load_all(cls, path: Path) -> dict[str, "NormStats"]:
        """Inverse of `save_all`. Raises FileNotFoundError without the file, ValueError for other content."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: normalisation statistics are missing from this checkpoint")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stats = {name: cls._parse(entry) for name, entry in content.items()}
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not normalisation statistics ({type(error).__name__}: {error})") from error
        if not stats:
            raise ValueError(f"{path}: expected the statistics of at least one embodiment, got none")
        return stats

    @classmethod
    def _parse(cls, entry: Mapping[str, Any]) -> "NormStats":
        state, action = (_read_statistics(q, entry[q]) for q in QUANTITIES)
        # Checkpoints from before there were parts have none.
        parts = {
            f"{q}_parts": tuple(NormalizedPart(**part) for part in entry.get(f"{q}_parts", ())) for q in QUANTITIES
        }
        for name, size in (("state_parts", len(state["mean"])), ("action_parts", len(action["mean"]))):
            spans = [(part.start, part.end) for part in parts[name]]
            ends = [0, *(end for _, end in spans)]
            if spans and ([start for start, _ in spans] != ends[:-1] or ends[-1] != size):
                raise ValueError(f"{name}: expected parts that follow each other from 0 to {size}, got {spans}")
        return cls(method=entry["method"], state=state, action=action, **parts)


def _read_statistics(quantity: str, entry: Mapping[str, Any]) -> Statistics:
    """Finite numbers, one a dimension. Raises ValueError for anything else."""
    found = {name: np.array(entry[name], dtype=np.float64) for name in _KEPT if name != "count"}
    sizes = {value.shape for value in found.values()}
    if len(sizes) != 1 or any(value.ndim != 1 or not len(value) for value in found.values()):
        raise ValueError(f"{quantity}: expected lists of one length, got the shapes {sorted(sizes)}")
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{quantity}: {name} is not finite in dimension {np.flatnonzero(~np.isfinite(value))[0]}")
    return found | {"count": np.array(entry["count"], dtype=np.int64)}


def _describe_parts(datasets: Sequence[Rows], quantity: Quantity, parts: tuple[NormalizedPart, ...]) -> Statistics:
    """Statistics of a quantity, each part over the datasets that have it."""
    described = [_describe_part(datasets, quantity, part) for part in parts or (None,)]
    counts = np.max([one["count"] for one in described], axis=0)
    return {name: np.concatenate([one[name] for one in described]) for name in described[0] if name != "count"} | {
        "count": counts
    }


def _describe_part(datasets: Sequence[Rows], quantity: Quantity, part: NormalizedPart | None) -> Statistics:
    having = [rows for rows in datasets if part is None or part.name not in rows.missing_keys]
    if not having:
        raise ValueError(
            f"{quantity}: every dataset lacks {part.name if part else quantity!r}, so its size has no scale"
        )
    where = slice(None) if part is None else slice(part.start, part.end)

    def chunks() -> Iterator[np.ndarray]:
        for rows in having:
            read = rows.states if quantity == "state" else rows.actions
            yield from (read(episode)[:, where] for episode in rows.episodes)

    return describe_stream(chunks)
