"""States and actions to the model's range and back. numpy only: a robot's client un-normalises too.

Every method is one affine map, `(values - offset) / scale`, so that each has its inverse beside it. A dimension that
never changes has scale 0: it becomes 0, and its inverse is the constant.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from agra.data.statistics import Statistics, describe

Method = Literal["min_max", "mean_std", "q01_q99"]
Quantity = Literal["state", "action"]

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


METHODS: Mapping[str, Callable[[Statistics], tuple[np.ndarray, np.ndarray]]] = {
    "min_max": _between("min", "max"),  # to [-1, 1], GR00T's choice
    "q01_q99": _between("q01", "q99"),  # 98 % of the values to [-1, 1]
    "mean_std": lambda s: (s["mean"], s["std"]),
}
"""Method -> (offset, scale), each (D,), from the statistics of a quantity."""


class _Rows(Protocol):
    """What is needed of a dataset."""

    @property
    def num_episodes(self) -> int: ...
    def states(self, episode: int) -> np.ndarray: ...
    def actions(self, episode: int) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class NormStats:
    """One embodiment's statistics, and the method that they are used with."""

    method: Method
    state: Statistics  # each (S,) float64
    action: Statistics  # each (D,) float64

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"NormStats.method: expected one of {', '.join(METHODS)}, got {self.method!r}")

    @classmethod
    def of(cls, dataset: _Rows, method: Method) -> "NormStats":
        """Exact statistics over all rows of a dataset."""
        episodes = range(dataset.num_episodes)
        return cls(
            method=method,
            state=describe(np.concatenate([dataset.states(i) for i in episodes])),
            action=describe(np.concatenate([dataset.actions(i) for i in episodes])),
        )

    @property
    def state_dim(self) -> int:
        """S."""
        return len(self.state["mean"])

    @property
    def action_dim(self) -> int:
        """D."""
        return len(self.action["mean"])

    def normalize(self, quantity: Quantity, values: np.ndarray) -> np.ndarray:
        """States (..., S) or actions (..., D) in the robot's units to the model's range, float32."""
        return normalize(values, *self._affine(quantity, values))

    def unnormalize(self, quantity: Quantity, values: np.ndarray) -> np.ndarray:
        """Inverse of `normalize`. Nothing is clipped."""
        return unnormalize(values, *self._affine(quantity, values))

    def _affine(self, quantity: Quantity, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        statistics = self.state if quantity == "state" else self.action
        offset, scale = METHODS[self.method](statistics)
        if np.shape(values)[-1:] != offset.shape:
            raise ValueError(f"{quantity}: expected {len(offset)} dimensions, got an array of {np.shape(values)}")
        return offset, scale

    @staticmethod
    def save_all(stats: Mapping[str, "NormStats"], path: Path) -> None:
        """Write the statistics of all embodiments as JSON: embodiment -> method, state, action."""
        content = {
            embodiment: {
                "method": one.method,
                "state": {name: np.asarray(one.state[name]).tolist() for name in _KEPT},
                "action": {name: np.asarray(one.action[name]).tolist() for name in _KEPT},
            }
            for embodiment, one in stats.items()
        }
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load_all(cls, path: Path) -> dict[str, "NormStats"]:
        """Inverse of `save_all`. Raises FileNotFoundError without the file, ValueError for other content."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: normalisation statistics are missing from this checkpoint")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {name: cls._parse(entry) for name, entry in content.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not normalisation statistics ({type(error).__name__}: {error})") from error

    @classmethod
    def _parse(cls, entry: Mapping[str, Any]) -> "NormStats":
        state, action = ({name: np.array(entry[q][name]) for name in _KEPT} for q in ("state", "action"))
        return cls(method=entry["method"], state=state, action=action)
