"""Normalisation of states and actions to the model's range, and its inverse.

Imports numpy and scipy only, for robot clients. A quantity consists of parts, each with its method. Affine methods are
`(values - offset) / scale`. A constant dimension has scale 0: it becomes 0, and its inverse is the constant. `sin_cos`
turns an angle into two numbers, `rot6d` a rotation into six (docs/paper.md #30), so a part can be wider in the model
than on the robot. Every method has its inverse.
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

_STORED = ("min", "max", "mean", "std", "q01", "q99", "count")


def normalize(values: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return (values - offset) / scale, and 0 where scale is 0, as (..., D) float32."""
    centred = np.asarray(values, dtype=np.float64) - offset
    return np.where(scale > 0, centred / np.where(scale > 0, scale, 1), 0).astype(np.float32)


def unnormalize(values: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Invert `normalize`: return values * scale + offset as (..., D) float32."""
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
    """Dimensions [start, end) of a state or an action, and their normalisation.

    `rotation` is GR00T's rotation_type of these dimensions, or "" for other quantities. The method "rot6d" needs it.
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
            raise ValueError(
                f"{self.name}: expected {rotations.width(self.rotation)} dimensions for rotation_type {self.rotation},"
                f" got {self.end - self.start}"
            )

    @property
    def width(self) -> int:
        """Number of dimensions in the model."""
        return {"sin_cos": 2 * (self.end - self.start), "rot6d": 6}.get(self.method, self.end - self.start)

    def encode(self, values: np.ndarray, statistics: Statistics) -> np.ndarray:
        """Convert (..., end - start) in the robot's units to (..., width) float32.

        Sines precede cosines, as in GR00T.
        """
        if self.method == "none":
            return np.asarray(values, dtype=np.float32)
        if self.method == "sin_cos":
            angles = np.asarray(values, dtype=np.float64)
            return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
        if self.method == "rot6d":
            return rotations.to_six(np.asarray(values), self.rotation).astype(np.float32)
        return normalize(values, *AFFINE[self.method](self._select(statistics)))

    def decode(self, values: np.ndarray, statistics: Statistics) -> np.ndarray:
        """Invert `encode`, without clipping. Angles are in (-pi, pi]. See `from_six` for rotations."""
        if self.method == "none":
            return np.asarray(values, dtype=np.float32)
        if self.method == "sin_cos":
            sines, cosines = np.split(np.asarray(values, dtype=np.float64), 2, axis=-1)
            return np.arctan2(sines, cosines).astype(np.float32)
        if self.method == "rot6d":
            return rotations.from_six(np.asarray(values), self.rotation).astype(np.float32)
        return unnormalize(values, *AFFINE[self.method](self._select(statistics)))

    def _select(self, statistics: Statistics) -> Statistics:
        return {name: statistics[name][self.start : self.end] for name in _STORED if name != "count"}


class Rows(Protocol):
    """The rows of a dataset, as statistics read them."""

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Names of parts that hold only zeros. They enter no statistics."""
        ...

    @property
    def episodes(self) -> Iterable[int]:
        """Episodes that enter the statistics."""
        ...

    def states(self, episode: int) -> np.ndarray:
        """Return the states (N, S) of an episode."""
        ...

    def actions(self, episode: int) -> np.ndarray:
        """Return the actions (N, D) of an episode."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class NormStats:
    """Statistics of one embodiment and the methods that use them. Without parts, `method` applies to all dimensions."""

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
        """Compute exact statistics over the rows of all `datasets` together, read as a stream.

        Raises ValueError for a value that is not finite, or a part that is missing from every dataset.
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
        """S, the number of state dimensions of the robot."""
        return len(self.state["mean"])

    @property
    def action_dim(self) -> int:
        """D, the number of action dimensions of the robot."""
        return len(self.action["mean"])

    def width(self, quantity: Quantity) -> int:
        """Return the number of dimensions of a quantity in the model."""
        return sum(part.width for part in self.parts(quantity))

    def parts(self, quantity: Quantity) -> tuple[NormalizedPart, ...]:
        """Return the parts of a quantity, in order."""
        parts = self.state_parts if quantity == "state" else self.action_parts
        size = self.state_dim if quantity == "state" else self.action_dim
        return parts or (NormalizedPart(name=quantity, start=0, end=size, method=self.method),)

    def mask(self, quantity: Quantity, missing_keys: Sequence[str] = ()) -> np.ndarray:
        """Return (width,) bool, False for the dimensions of missing parts."""
        return np.concatenate([np.full(part.width, part.name not in missing_keys) for part in self.parts(quantity)])

    def normalize(self, quantity: Quantity, values: np.ndarray) -> np.ndarray:
        """Convert states (..., S) or actions (..., D) in the robot's units to the model's (..., width) float32."""
        statistics = self.state if quantity == "state" else self.action
        parts, values = self.parts(quantity), np.asarray(values)
        if values.shape[-1:] != (parts[-1].end,):
            raise ValueError(f"{quantity}: expected {parts[-1].end} dimensions, got shape {np.shape(values)}")
        return np.concatenate([p.encode(values[..., p.start : p.end], statistics) for p in parts], axis=-1)

    def unnormalize(self, quantity: Quantity, values: np.ndarray) -> np.ndarray:
        """Invert `normalize`, without clipping."""
        statistics = self.state if quantity == "state" else self.action
        parts, values = self.parts(quantity), np.asarray(values)
        if values.shape[-1:] != (self.width(quantity),):
            raise ValueError(f"{quantity}: expected {self.width(quantity)} dimensions, got shape {values.shape}")
        ends = np.cumsum([part.width for part in parts])[:-1]
        pieces = zip(parts, np.split(values, ends, axis=-1), strict=True)
        return np.concatenate([part.decode(piece, statistics) for part, piece in pieces], axis=-1)

    @staticmethod
    def save_all(stats: Mapping[str, "NormStats"], path: Path) -> None:
        """Write the statistics of all embodiments as JSON: embodiment -> method, state, action, and their parts."""
        content = {}
        for embodiment, entry in stats.items():
            content[embodiment] = {
                "method": entry.method,
                "state": {name: np.asarray(entry.state[name]).tolist() for name in _STORED},
                "action": {name: np.asarray(entry.action[name]).tolist() for name in _STORED},
                "state_parts": [asdict(part) for part in entry.state_parts],
                "action_parts": [asdict(part) for part in entry.action_parts],
            }
        files.write_text(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load_all(cls, path: Path) -> dict[str, "NormStats"]:
        """Read the file of `save_all`. Raises FileNotFoundError for a missing file and ValueError for other content."""
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
        # The oldest checkpoints have no parts.
        parts = {
            f"{q}_parts": tuple(NormalizedPart(**part) for part in entry.get(f"{q}_parts", ())) for q in QUANTITIES
        }
        for name, size in (("state_parts", len(state["mean"])), ("action_parts", len(action["mean"]))):
            spans = [(part.start, part.end) for part in parts[name]]
            ends = [0, *(end for _, end in spans)]
            if spans and ([start for start, _ in spans] != ends[:-1] or ends[-1] != size):
                raise ValueError(f"{name}: expected consecutive parts from 0 to {size}, got {spans}")
        return cls(method=entry["method"], state=state, action=action, **parts)


def _read_statistics(quantity: str, entry: Mapping[str, Any]) -> Statistics:
    """Read statistics: finite numbers, one for each dimension. Raises ValueError for other content."""
    statistics = {name: np.array(entry[name], dtype=np.float64) for name in _STORED if name != "count"}
    sizes = {value.shape for value in statistics.values()}
    if len(sizes) != 1 or any(value.ndim != 1 or not len(value) for value in statistics.values()):
        raise ValueError(f"{quantity}: expected lists of one length, got shapes {sorted(sizes)}")
    for name, value in statistics.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{quantity}: {name} is not finite in dimension {np.flatnonzero(~np.isfinite(value))[0]}")
    return statistics | {"count": np.array(entry["count"], dtype=np.int64)}


def _describe_parts(datasets: Sequence[Rows], quantity: Quantity, parts: tuple[NormalizedPart, ...]) -> Statistics:
    """Compute the statistics of a quantity, each part over the datasets that have it."""
    described = [_describe_part(datasets, quantity, part) for part in parts or (None,)]
    names = [name for name in described[0] if name != "count"]
    statistics = {name: np.concatenate([entry[name] for entry in described]) for name in names}
    return statistics | {"count": np.max([entry["count"] for entry in described], axis=0)}


def _describe_part(datasets: Sequence[Rows], quantity: Quantity, part: NormalizedPart | None) -> Statistics:
    present = [rows for rows in datasets if part is None or part.name not in rows.missing_keys]
    if not present:
        raise ValueError(
            f"{quantity}: {part.name if part else quantity!r} is missing from every dataset, so it has no statistics"
        )
    columns = slice(None) if part is None else slice(part.start, part.end)

    def chunks() -> Iterator[np.ndarray]:
        for rows in present:
            read = rows.states if quantity == "state" else rows.actions
            yield from (read(episode)[:, columns] for episode in rows.episodes)

    return describe_stream(chunks)
