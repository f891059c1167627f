"""Checks of a dataset's numbers and images for `agra doctor`, as pure functions of arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LAGS = range(-5, 11)  # control steps by which an action may precede the state that it commands
_VARIANCE_ROUNDING = 64 * np.finfo(np.float32).eps  # of the mean of squares, after thousands of additions


class Jump(NamedTuple):
    """A step in which a dimension moves far more than usual."""

    dimension: int
    episode: int
    step: int
    size: float
    usual: float  # 99th percentile of its movements


def constant_dimensions(low: np.ndarray, high: np.ndarray) -> list[int]:
    """Return the dimensions that never change, from their minima and maxima (D,)."""
    return [int(i) for i in np.flatnonzero(low == high)]


def jumps(episodes: Sequence[np.ndarray]) -> list[Jump]:
    """Return the largest jump of each dimension: more than 20 times its usual movement and more than half of its
    range.
    """
    moves = [np.abs(np.diff(rows.astype(np.float64), axis=0)) for rows in episodes]
    all_moves = np.concatenate(moves)
    if len(all_moves) < 100:
        return []
    usual = np.quantile(all_moves, 0.99, axis=0)
    rows = np.concatenate(episodes)
    span = rows.max(0) - rows.min(0)
    result = []
    for dimension in np.flatnonzero((all_moves.max(0) > 20 * usual) & (all_moves.max(0) > 0.5 * span) & (span > 0)):
        largest = [move[:, dimension].max(initial=0) for move in moves]
        episode = int(np.argmax(largest))
        step = int(moves[episode][:, dimension].argmax()) + 1
        result.append(Jump(int(dimension), episode, step, largest[episode], float(usual[dimension])))
    return result


def is_turn(size: float) -> bool:
    """Return whether a jump is a full turn of an angle, in radians or degrees."""
    return abs(size - 2 * np.pi) < 0.3 or abs(size - 360) < 15


def squeezed_dimensions(statistics: dict[str, np.ndarray]) -> list[int]:
    """Return the dimensions with outliers, for which min_max would map 98 % of the values to less than a tenth of
    its range.
    """
    inner, full = statistics["q99"] - statistics["q01"], statistics["max"] - statistics["min"]
    return [int(i) for i in np.flatnonzero((full > 10 * inner) & (inner > 0))]


def rare_dimensions(statistics: dict[str, np.ndarray]) -> list[int]:
    """Return the dimensions that change in so few rows that their 1 % and 99 % quantiles are equal."""
    same, full = statistics["q99"] == statistics["q01"], statistics["max"] > statistics["min"]
    return [int(i) for i in np.flatnonzero(same & full)]


def lag(states: Sequence[np.ndarray], actions: Sequence[np.ndarray]) -> tuple[int, float] | None:
    """Return the number of control steps by which actions precede the most similar states, and that similarity.

    The similarity is 1 minus the mean squared distance over the variance of the states, over the dimensions that move.
    None where the dimensions differ or the similarity is below 0.5. A command precedes its effect, so 1 or more is
    right. 0 means that the action is the state of the same step, a negative number that actions are late.
    """
    if not states or states[0].shape[1] != actions[0].shape[1]:
        return None
    variance = np.concatenate(states).var(0)
    moving = variance > 1e-12
    if not moving.any():
        return None
    similarity = {}
    for ahead in _LAGS:
        distances = []
        for state, action in zip(states, actions, strict=True):
            count = len(state) - abs(ahead)
            if count > 1:
                early, late = (action[:count], state[ahead:]) if ahead >= 0 else (action[-ahead:], state[:count])
                distances.append(((late - early)[:, moving].astype(np.float64) ** 2 / variance[moving]).mean(1))
        if distances:
            similarity[ahead] = 1 - float(np.concatenate(distances).mean())
    best = max(similarity, key=lambda ahead: (similarity[ahead], -abs(ahead - 1)), default=None)
    return None if best is None or similarity[best] < 0.5 else (best, similarity[best])


def content_rows(frames: np.ndarray) -> tuple[int, int]:
    """Return [first, end) of the rows inside the padding, which has one colour in all frames (T, H, W, 3)."""
    rows = frames.astype(np.int16)
    plain = (rows.max((0, 2, 3)) - rows.min((0, 2, 3))) <= 12
    inside = np.flatnonzero(~plain)
    return (0, len(plain)) if len(inside) == 0 else (int(inside[0]), int(inside[-1]) + 1)


def frozen(frames: np.ndarray) -> bool:
    """Return whether all frames (T, H, W, 3) are the same picture."""
    return len(frames) > 1 and bool((np.abs(frames[1:].astype(np.int16) - frames[:-1]).max((1, 2, 3)) <= 2).all())


def disagreement(stored: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> tuple[str, int, float, float] | None:
    """Return the first (statistic, dimension, stored, exact) that differ by more than 0.1 % of the dimension's
    range.

    LeRobot computes a variance in float32 as the mean of squares minus the square of the mean. Where both are much
    larger than the variance, its std may differ by that rounding.
    """
    scale = np.maximum(exact["max"] - exact["min"], 1e-6)
    rounding = _VARIANCE_ROUNDING * (exact["mean"] ** 2 + exact["std"] ** 2)
    for name in ("min", "max", "mean", "std"):
        if name not in stored:
            continue
        value = np.asarray(stored[name], dtype=np.float64).ravel()
        if value.shape != exact[name].shape:
            return name, -1, float(value.size), float(exact[name].size)
        wrong = ~(np.abs(value - exact[name]) <= 1e-3 * scale)
        if name == "std":
            wrong &= ~(np.abs(value**2 - exact[name] ** 2) <= rounding)
        if wrong.any():
            dimension = int(np.argmax(wrong))
            return name, dimension, float(value[dimension]), float(exact[name][dimension])
    return None
