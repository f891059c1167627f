"""Statistics of success counts: intervals, paired tests and detectable differences.

Outcomes of single trials are Bernoulli samples (Wilson, McNemar). The average of a benchmark has a second source of
variance, the choice of its tasks: episodes of one task resemble each other, so whole tasks are resampled (clustered
bootstrap).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq

MIN_CLUSTERS = 5
"""Fewest tasks for an interval that resamples tasks. With fewer, trials are resampled."""


def p_text(p_value: float) -> str:
    """Write a p-value with three decimals, or as "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (without continuity correction) of a success rate: (low, high)."""
    interval = stats.binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


class McNemar(NamedTuple):
    """McNemar's exact test: two-sided p-value and the four counts."""

    p_value: float
    only_a: int
    only_b: int
    both: int
    neither: int


def mcnemar(paired_a: Sequence[bool], paired_b: Sequence[bool]) -> McNemar:
    """Test whether two policies succeed equally often on the same trials (exact binomial, two-sided).

    Only trials in which exactly one policy succeeds inform the test. Without any, p is 1. Raises ValueError for
    sequences of different length.
    """
    a, b = _pairs(paired_a, paired_b)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p_value = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return McNemar(float(p_value), only_a, only_b, int((a & b).sum()), int((~a & ~b).sum()))


def expanded_percentile_interval(
    statistic: Callable[[np.ndarray], np.ndarray | float],
    units: int,
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    vectorized: bool = True,
) -> tuple[float, float]:
    """Bootstrap interval (low, high) of a statistic over independent units. Crossed groups need `crossed_bootstrap`.

    `statistic` takes the numbers, 0 to `units` - 1, of the resampled units. If it is `vectorized`, it takes many
    resamples at once and reduces the last axis. The percentile bootstrap of few units is too narrow, because it uses a
    normal quantile and a variance over n instead of n - 1. Its percentiles are widened to Student's (Hesterberg 2015,
    "expanded percentile"). Raises ValueError for fewer than two units.
    """
    if units < 2:
        raise ValueError(f"bootstrap: expected at least two independent units, got {units}")
    quantile = math.sqrt(units / (units - 1)) * stats.t.ppf((1 - confidence) / 2, units - 1)
    resampled = stats.bootstrap(
        (np.arange(units),),
        (lambda numbers, axis=-1: statistic(numbers)) if vectorized else statistic,
        n_resamples=resamples,
        batch=1000,
        vectorized=vectorized,
        confidence_level=float(1 - 2 * stats.norm.cdf(quantile)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = resampled.confidence_interval
    return float(low), float(high)


def agreeing_interval(
    value: float, units: int, bounds: tuple[float, float] = (0.0, 1.0), confidence: float = 0.95
) -> tuple[float, float]:
    """A conservative interval (low, high) of the mean over a population of which all sampled `units` have one `value`.

    At most the fraction of the population differs that Wilson's interval of 0 of `units` allows, each unit by as much as
    `bounds` allow. A rate of 0 or 1 gets Wilson's interval of no or of all units. Raises ValueError outside `bounds`.
    """
    if not bounds[0] <= value <= bounds[1]:
        raise ValueError(f"agreeing_interval: expected a value in {list(bounds)}, got {value}; give its bounds")
    different = wilson_interval(0, units, confidence)[1]
    return value - different * (value - bounds[0]), value + different * (bounds[1] - value)


class Average(NamedTuple):
    """A mean over `clusters` independent units, with its interval."""

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
    """The mean of the cluster means of `values` (N,), with an interval that resamples whole clusters.

    `clusters` labels each value. If all clusters agree, the interval is Wilson's over clusters (`agreeing_interval`),
    for values in [0, 1]. Raises ValueError for fewer than two clusters.
    """
    means = np.array(list(_cluster_means(values, clusters).values()))
    count = len(means)
    if count < 2:
        raise ValueError(f"clustered_bootstrap: expected at least two clusters, got {count}")
    if np.ptp(means) == 0:
        return Average(float(means[0]), *agreeing_interval(float(means[0]), count, confidence=confidence), count)
    low, high = expanded_percentile_interval(
        lambda numbers: means[numbers].mean(axis=-1), count, confidence=confidence, resamples=resamples, seed=seed
    )
    return Average(float(means.mean()), low, high, count)


def crossed_bootstrap(
    groups: Mapping[Any, Mapping[Any, float]],
    *,
    bounds: tuple[float, float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Average:
    """The mean over groups, such as training seeds, and trials, with a percentile interval. `groups` holds values by trial.

    The design is crossed: every group has the same trials, and what makes a trial hard is common to all groups. A
    resample draws groups, and one set of trials for all of them (Owen 2007, the pigeonhole bootstrap). With one group
    the interval covers the trials alone. With few groups that differ it is too narrow, because the percentiles are not
    widened. If all values agree, it is Wilson's over trials (`agreeing_interval`), where values can lie in `bounds`.
    Raises ValueError without values, and for groups with different trials.
    """
    names = list(next(iter(groups.values()), ()))
    if not names or any(set(values) != set(names) for values in groups.values()):
        sizes = [len(values) for values in groups.values()]
        raise ValueError(f"crossed_bootstrap: expected the same trials in every group, at least one, got {sizes}")
    table = np.array([[values[name] for name in names] for values in groups.values()], dtype=np.float64)
    rng, (rows, columns), value = np.random.default_rng(seed), table.shape, float(table.mean())
    if np.ptp(table) == 0:
        return Average(value, *agreeing_interval(value, columns, bounds, confidence), rows)
    drawn_groups = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    drawn_trials = rng.multinomial(columns, np.full(columns, 1 / columns), size=resamples)
    means = (drawn_groups @ table * drawn_trials).sum(axis=1) / table.size
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Average(value, float(low), float(high), rows)


def stratified_average(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[object],
    strata: Mapping[Any, object],
    *,
    confidence: float = 0.95,
) -> Average:
    """The mean over strata of the mean of their cluster means of `values` (N,) in [0, 1], with Student's interval.

    `clusters` labels each value and `strata` maps cluster to stratum. The variance comes from the clusters within each
    stratum, the degrees of freedom from Welch and Satterthwaite. A stratum whose clusters agree has no variance. Its
    margins are those of Wilson's interval over its clusters (`agreeing_interval`), and squares of margins add up (Zou
    and Donner 2008). Raises ValueError for a stratum with fewer than two clusters.
    """
    means = _cluster_means(values, clusters)
    groups: dict[object, list[float]] = {}
    for cluster, mean in means.items():
        groups.setdefault(strata[cluster], []).append(mean)
    if not groups or min(map(len, groups.values())) < 2:
        raise ValueError(f"stratified_average: expected at least two clusters in every stratum, got {groups}")
    value = float(np.mean([np.mean(group) for group in groups.values()]))
    terms = np.array([np.var(group, ddof=1) / len(group) for group in groups.values()]) / len(groups) ** 2
    margin = 0.0
    if terms.any():
        freedom = terms.sum() ** 2 / (terms**2 / [len(group) - 1 for group in groups.values()]).sum()
        margin = math.sqrt(terms.sum()) * float(stats.t.ppf((1 + confidence) / 2, freedom))
    below, above = margin**2, margin**2
    for group in groups.values():
        if np.ptp(group) == 0:
            low, high = agreeing_interval(group[0], len(group), confidence=confidence)
            below, above = below + ((group[0] - low) / len(groups)) ** 2, above + ((high - group[0]) / len(groups)) ** 2
    return Average(value, max(value - math.sqrt(below), 0.0), min(value + math.sqrt(above), 1.0), len(means))


def _cluster_means(values: Sequence[float] | np.ndarray, clusters: Sequence[object]) -> dict[object, float]:
    """The mean of each cluster's values (N,), in the order of their first occurrence."""
    labels, sums, sizes = _cluster_sums(values, clusters)
    return dict(zip(labels, (sums / sizes).tolist(), strict=True))


def _cluster_sums(
    values: Sequence[float] | np.ndarray, clusters: Sequence[object]
) -> tuple[list[object], np.ndarray, np.ndarray]:
    """The clusters in the order of their first occurrence, the sum of each one's values (N,), and their number."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) != len(clusters):
        raise ValueError(f"{len(clusters)} cluster labels do not fit values of shape {array.shape}")
    labels = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    members = np.array([labels[label] for label in clusters])
    return list(labels), np.bincount(members, weights=array), np.bincount(members)


def paired_bootstrap(
    paired_a: Sequence[bool],
    paired_b: Sequence[bool],
    tasks: Sequence[object],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Average:
    """Success rate of A minus that of B on the same trials, with its interval. `tasks` labels each trial.

    Resamples whole tasks if there are at least `MIN_CLUSTERS`, else trials. `clusters` of the result is their number.
    A task weighs as much as it has trials, in the value and in every resample. If all tasks (or trials) agree, the
    interval is Wilson's over them (`agreeing_interval`). That of a single trial is [-1, 1].
    """
    a, b = _pairs(paired_a, paired_b)
    if len(a) < 2:
        return Average(float(a.mean() - b.mean()), -1.0, 1.0, len(a))
    clusters = tasks if len(set(tasks)) >= MIN_CLUSTERS else range(len(a))
    _, sums, sizes = _cluster_sums(a.astype(float) - b, clusters)
    value, count = float(sums.sum() / sizes.sum()), len(sums)
    if np.ptp(sums / sizes) == 0:
        return Average(value, *agreeing_interval(value, count, (-1.0, 1.0), confidence=confidence), count)
    low, high = expanded_percentile_interval(
        lambda numbers: sums[numbers].sum(axis=-1) / sizes[numbers].sum(axis=-1),
        count,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    return Average(value, low, high, count)


def minimum_detectable_effect(trials: int, rate: float, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest improvement on a success `rate` that a second policy on as many other trials can show.

    A two-sided z-test of two independent proportions detects it with probability `power` (Cohen 1988, chapter 6,
    arcsine transformation). Infinite if even success in every trial would not be detected.
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
    """The difference in success rate that McNemar's test on `trials` pairs detects with probability `power`.

    `discordant` is the fraction of pairs in which exactly one policy succeeds (Connor 1987). Infinite if even a
    difference of that size would not be detected.
    """
    _check_design(trials, power, confidence)
    if not 0 <= discordant <= 1:
        raise ValueError(f"discordant: expected a fraction in [0, 1], got {discordant}")
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
        raise ValueError(
            f"expected outcomes of the same trials, two sequences of equal length, got {a.shape} and {b.shape}"
        )
    return a, b


def _check_design(trials: int, power: float, confidence: float) -> None:
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    if not 0 < power < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected power and confidence in (0, 1), got {power} and {confidence}")
