"""What success counts allow to say: intervals, paired tests, and how large a difference has to be to show.

Outcomes of single trials are Bernoulli draws (Wilson, McNemar). The average of a benchmark has a second source of
chance, the choice of its tasks: episodes of one task resemble each other, so whole tasks are drawn (clustered bootstrap).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq

MIN_CLUSTERS = 5
"""With fewer tasks an interval over tasks says next to nothing; it is then taken over trials."""


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (without continuity correction) of a success rate: (low, high)."""
    interval = stats.binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


class McNemar(NamedTuple):
    """McNemar's exact test: the two-sided p-value and the four counts it rests on."""

    p_value: float
    only_a: int
    only_b: int
    both: int
    neither: int


def mcnemar(paired_a: Sequence[bool], paired_b: Sequence[bool]) -> McNemar:
    """Do two policies, tried on the same trials, succeed equally often? Exact binomial, two-sided.

    Only trials in which one succeeds and the other fails inform the test; without any, p is 1. Raises ValueError for
    sequences of different length.
    """
    a, b = _pairs(paired_a, paired_b)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p_value = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return McNemar(float(p_value), only_a, only_b, int((a & b).sum()), int((~a & ~b).sum()))


class Average(NamedTuple):
    """A mean over clusters with its bootstrap interval; `clusters` independent units were drawn."""

    value: float
    low: float
    high: float
    clusters: int


def clustered_bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[object],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Average:
    """The mean over clusters of each one's mean of `values` (N,), and an interval that draws whole clusters.

    `clusters` names each value's unit. The percentile bootstrap of few units is too narrow, being a normal quantile and
    a variance over n instead of n - 1; its percentiles are widened to Student's (Hesterberg 2015, "expanded percentile").
    Where all clusters agree the interval is a point, whatever their number. Raises ValueError for fewer than two clusters.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or len(given) != len(clusters):
        raise ValueError(f"clustered_bootstrap: {len(clusters)} labels do not fit values of shape {given.shape}")
    labels = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    count = len(labels)
    if count < 2:
        raise ValueError(f"clustered_bootstrap: expected at least two clusters, got {count}")
    members = np.array([labels[label] for label in clusters])
    means = np.bincount(members, weights=given) / np.bincount(members)
    if np.ptp(means) == 0:
        return Average(float(means[0]), float(means[0]), float(means[0]), count)
    quantile = math.sqrt(count / (count - 1)) * stats.t.ppf((1 - confidence) / 2, count - 1)
    drawn = stats.bootstrap(
        (means,),
        np.mean,
        n_resamples=resamples,
        batch=1000,
        confidence_level=float(1 - 2 * stats.norm.cdf(quantile)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = drawn.confidence_interval
    return Average(float(means.mean()), float(low), float(high), count)


def paired_bootstrap(
    paired_a: Sequence[bool],
    paired_b: Sequence[bool],
    tasks: Sequence[object],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Average:
    """Success rate of A minus that of B on the same trials, with its interval; `tasks` names each trial's task.

    Draws whole tasks where there are at least `MIN_CLUSTERS`, else trials; `clusters` of the answer tells which.
    One trial alone leaves every difference open.
    """
    a, b = _pairs(paired_a, paired_b)
    if len(a) < 2:
        return Average(float(a.mean() - b.mean()), -1.0, 1.0, len(a))
    clusters = tasks if len(set(tasks)) >= MIN_CLUSTERS else range(len(a))
    return clustered_bootstrap(a.astype(float) - b, clusters, confidence=confidence, resamples=resamples, seed=seed)


def minimum_detectable_effect(trials: int, rate: float, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """By how much a second policy, tried on as many other trials, has to exceed a success `rate` to be told apart.

    The difference that a two-sided z-test of two independent proportions shows with probability `power` (Cohen 1988,
    chapter 6, arcsine transformation); infinite where even success in every trial would not show.
    """
    _check_design(trials, power, confidence)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a success rate in [0, 1], got {rate}")
    effect = (stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)) * math.sqrt(2 / trials)
    angle = math.asin(math.sqrt(rate)) + effect / 2
    return math.inf if angle > math.pi / 2 else math.sin(angle) ** 2 - rate


def paired_minimum_detectable_effect(
    trials: int, discordant: float, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The difference in success rate that McNemar's test on `trials` pairs shows with probability `power`.

    `discordant` is the share of pairs in which one policy alone succeeds (Connor 1987). Infinite where even
    a difference as large as that share would not show.
    """
    _check_design(trials, power, confidence)
    if not 0 <= discordant <= 1:
        raise ValueError(f"discordant: expected a share in [0, 1], got {discordant}")
    z_size, z_power = stats.norm.ppf((1 + confidence) / 2), stats.norm.ppf(power)

    def surplus(difference: float) -> float:
        spread = math.sqrt(max(discordant - difference**2, 0.0))
        return float(difference * math.sqrt(trials) - z_size * math.sqrt(discordant) - z_power * spread)

    if surplus(discordant) <= 0:
        return math.inf
    root: Any = brentq(surplus, 0.0, discordant)
    return float(root)


def _pairs(paired_a: Sequence[bool], paired_b: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(paired_a, dtype=bool), np.asarray(paired_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected outcomes of the same trials, equally long sequences, got {a.shape} and {b.shape}")
    return a, b


def _check_design(trials: int, power: float, confidence: float) -> None:
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    if not 0 < power < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected power and confidence in (0, 1), got {power} and {confidence}")
