"""What can be wrong with a dataset's numbers and pictures: pure functions of arrays, for `agra doctor`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LAGS = range(-5, 11)  # control steps that an action may be ahead of the state it asks for


class Jump(NamedTuple):
    """A step in which a dimension moves far more than it otherwise does."""

    dimension: int
    episode: int
    step: int
    size: float
    usual: float  # the 99th percentile of its movements


def constant_dimensions(low: np.ndarray, high: np.ndarray) -> list[int]:
    """Dimensions that never change, from their minima and maxima (D,)."""
    return [int(i) for i in np.flatnonzero(low == high)]


def jumps(episodes: Sequence[np.ndarray]) -> list[Jump]:
    """The largest jump of every dimension that has one: more than 20 times its usual movement and half of its range."""
    moves = [np.abs(np.diff(rows.astype(np.float64), axis=0)) for rows in episodes]
    everything = np.concatenate(moves)
    if len(everything) < 100:
        return []
    usual = np.quantile(everything, 0.99, axis=0)
    whole = np.concatenate(episodes)
    span = whole.max(0) - whole.min(0)
    found = []
    for dimension in np.flatnonzero((everything.max(0) > 20 * usual) & (everything.max(0) > 0.5 * span) & (span > 0)):
        largest = [move[:, dimension].max(initial=0) for move in moves]
        episode = int(np.argmax(largest))
        step = int(moves[episode][:, dimension].argmax()) + 1
        found.append(Jump(int(dimension), episode, step, largest[episode], float(usual[dimension])))
    return found


def is_turn(size: float) -> bool:
    """Whether a jump is a full turn of an angle, in radians or degrees."""
    return abs(size - 2 * np.pi) < 0.3 or abs(size - 360) < 15


def squeezed_dimensions(statistics: dict[str, np.ndarray]) -> list[int]:
    """Dimensions whose extremes are so far out that min_max would leave 98 % of the values a tenth of its range."""
    inner, whole = statistics["q99"] - statistics["q01"], statistics["max"] - statistics["min"]
    return [int(i) for i in np.flatnonzero((whole > 10 * inner) & (inner > 0))]


def lag(states: Sequence[np.ndarray], actions: Sequence[np.ndarray]) -> tuple[int, float] | None:
    """By how many control steps actions run ahead of the states that they resemble most, and how much they do.

    The resemblance is one minus the mean squared distance over the variance of the states, over the dimensions that move;
    None where the sizes differ or nothing resembles. A command is ahead of its effect, so 1 or more is as it should be, 0
    says that the action is the state of its own step, less that actions are late.
    """
    if not states or states[0].shape[1] != actions[0].shape[1]:
        return None
    variance = np.concatenate(states).var(0)
    moving = variance > 1e-12
    if not moving.any():
        return None
    resemblance = {}
    for ahead in _LAGS:
        distances = []
        for state, action in zip(states, actions, strict=True):
            count = len(state) - abs(ahead)
            if count > 1:
                early, late = (action[:count], state[ahead:]) if ahead >= 0 else (action[-ahead:], state[:count])
                distances.append(((late - early)[:, moving].astype(np.float64) ** 2 / variance[moving]).mean(1))
        if distances:
            resemblance[ahead] = 1 - float(np.concatenate(distances).mean())
    best = max(resemblance, key=lambda ahead: (resemblance[ahead], -abs(ahead - 1)), default=None)
    return None if best is None or resemblance[best] < 0.5 else (best, resemblance[best])


def content_rows(frames: np.ndarray) -> tuple[int, int]:
    """[first, end) of the rows that hold a picture: those above and below are of one colour in all frames (T, H, W, 3)."""
    rows = frames.astype(np.int16)
    plain = (rows.max((0, 2, 3)) - rows.min((0, 2, 3))) <= 12
    inside = np.flatnonzero(~plain)
    return (0, len(plain)) if len(inside) == 0 else (int(inside[0]), int(inside[-1]) + 1)


def frozen(frames: np.ndarray) -> bool:
    """Whether all frames (T, H, W, 3) are the same picture."""
    return len(frames) > 1 and bool((np.abs(frames[1:].astype(np.int16) - frames[:-1]).max((1, 2, 3)) <= 2).all())


def disagreement(given: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> tuple[str, int, float, float] | None:
    """The first (statistic, dimension, given, found) that differ by more than a thousandth of the dimension's range."""
    scale = np.maximum(found["max"] - found["min"], 1e-6)
    for name in ("min", "max", "mean", "std"):
        if name not in given:
            continue
        value = np.asarray(given[name], dtype=np.float64).ravel()
        if value.shape != found[name].shape:
            return name, -1, float(value.size), float(found[name].size)
        wrong = ~(np.abs(value - found[name]) <= 1e-3 * scale)
        if wrong.any():
            dimension = int(np.argmax(wrong))
            return name, dimension, float(value[dimension]), float(found[name][dimension])
    return None
