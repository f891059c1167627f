import math

import numpy as np
import pytest
from scipy import stats

from agra.evaluation.statistics import (
    clustered_bootstrap,
    crossed_bootstrap,
    mcnemar,
    minimum_detectable_effect,
    p_text,
    paired_bootstrap,
    paired_minimum_detectable_effect,
    stratified_average,
    wilson_interval,
)

contingency_tables = pytest.importorskip("statsmodels.stats.contingency_tables")
proportion = pytest.importorskip("statsmodels.stats.proportion")


@pytest.mark.parametrize(
    ("successes", "trials", "confidence", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.95, 0.2553, 0.3662),
        (15, 148, 0.95, 0.0624, 0.1605),
        (0, 20, 0.95, 0.0, 0.1611),
        (1, 29, 0.95, 0.0061, 0.1718),
        (10, 10, 0.90, 0.7871, 1.0),  # n / (n + z^2), z = 1.6449
    ],
)
def test_wilson(successes, trials, confidence, low, high):
    assert wilson_interval(successes, trials, confidence) == pytest.approx((low, high), abs=6e-5)


def test_p_values_in_tables():
    assert [p_text(p) for p in (0.0, 0.00099, 0.001, 0.17449, 1.0)] == ["< 0.001", "< 0.001", "0.001", "0.174", "1.000"]


def test_mcnemar():
    # 12 trials that one alone solved, 2 of them the first: 2 * (1 + 12 + 66) / 2^12
    a = [True] * 5 + [True] * 2 + [False] * 10 + [False] * 3
    b = [True] * 5 + [False] * 2 + [True] * 10 + [False] * 3
    test = mcnemar(a, b)
    assert test == (pytest.approx(2 * 79 / 4096), 2, 10, 5, 3)
    assert mcnemar(b, a).p_value == test.p_value
    assert mcnemar([True, False], [True, False]).p_value == 1
    assert mcnemar([True] * 3, [False] * 3).p_value == pytest.approx(0.25)
    with pytest.raises(ValueError, match="of equal length"):
        mcnemar([True], [True, False])


def test_wilson_against_statsmodels():
    for trials in (1, 7, 50, 1200):
        for successes in {0, 1, trials // 3, trials}:
            for confidence in (0.9, 0.95, 0.99):
                reference = proportion.proportion_confint(successes, trials, alpha=1 - confidence, method="wilson")
                assert wilson_interval(successes, trials, confidence) == pytest.approx(reference, abs=1e-9)


def test_wilson_covers():
    """Exact coverage at 50 trials: every outcome weighed by its probability, averaged over the rates."""
    intervals = np.array([wilson_interval(k, 50) for k in range(51)])
    rates = np.linspace(0.02, 0.98, 97)
    covered = (intervals[:, :1] <= rates) & (rates <= intervals[:, 1:])
    coverage = (stats.binom.pmf(np.arange(51)[:, None], 50, rates) * covered).sum(axis=0)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01)
    assert coverage.min() > 0.83


def test_mcnemar_against_statsmodels():
    rng = np.random.default_rng(0)
    for rate_a, rate_b, trials in ((0.5, 0.6, 40), (0.2, 0.8, 15), (0.9, 0.9, 200)):
        a, b = rng.random(trials) < rate_a, rng.random(trials) < rate_b
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert mcnemar(a, b).p_value == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue)


def test_bootstrap_is_the_mean_over_tasks():
    """An unbalanced design counts tasks, not episodes; the interval is the same whenever it is asked for."""
    values, tasks = [1, 1, 1, 1, 0, 1], ["a", "a", "a", "a", "b", "b"]
    average = clustered_bootstrap(values, tasks)
    assert (average.value, average.clusters) == (0.75, 2)
    assert average == clustered_bootstrap(values, tasks)
    with pytest.raises(ValueError, match="at least two clusters, got 1"):
        clustered_bootstrap([1, 0], "aa")
    with pytest.raises(ValueError, match="3 cluster labels do not fit values of shape"):
        clustered_bootstrap([1, 0], "aab")


def test_bootstrap_against_student():
    """For task rates without outliers the interval is close to Student's of the task rates."""
    rates = np.random.default_rng(1).uniform(0.2, 0.8, 24)
    average = clustered_bootstrap(rates, range(24))
    student = stats.t.interval(0.95, 23, rates.mean(), stats.sem(rates))
    assert (average.low, average.high) == pytest.approx(student, abs=0.006)


def test_where_all_tasks_agree_the_interval_is_wilsons_over_tasks():
    failures, labels = [0.0] * 500, np.repeat(np.arange(50), 10).tolist()
    assert clustered_bootstrap(failures, labels) == (0, 0, pytest.approx(wilson_interval(0, 50)[1]), 50)
    assert clustered_bootstrap([1, 1, 1, 1], "aabb") == (1, pytest.approx(wilson_interval(2, 2)[0]), 1, 2)
    halves = clustered_bootstrap([1, 0, 1, 0], "aabb")
    assert (halves.value - halves.low, halves.high - halves.value) == pytest.approx([wilson_interval(0, 2)[1] / 2] * 2)
    strata = dict(enumerate(np.repeat(range(4), (28, 11, 6, 5))))
    sides = [wilson_interval(0, size)[1] for size in (28, 11, 6, 5)]
    grouped = stratified_average(failures, labels, strata)
    assert grouped == (0, 0, pytest.approx(math.hypot(*sides) / 4), 50)
    some = [
        float(label < 28 and trial % 2) for trial, label in enumerate(labels)
    ]  # half of the trials of the first group
    assert stratified_average(some, labels, strata).high > 0.125 + 0.9 * math.hypot(*sides[1:]) / 4
    both = paired_bootstrap([1] * 180, [1] * 180, [0] * 180)
    assert (both.low, both.high) == pytest.approx((-both.high, wilson_interval(0, 180)[1]))
    better = paired_bootstrap([1] * 6, [0] * 6, "aabcde")
    assert better == (1, pytest.approx(1 - 2 * wilson_interval(0, 5)[1]), 1, 5)
    assert crossed_bootstrap(by_trial([[0.0] * 40] * 3), bounds=(0, 1))[:3] == (
        0,
        0,
        pytest.approx(wilson_interval(0, 40)[1]),
    )
    with pytest.raises(ValueError, match=r"expected a value in \[0.0, 1.0\], got -1.0; give its bounds"):
        clustered_bootstrap([-1, -1], "ab")


def test_the_interval_of_a_group_of_hard_tasks_covers():
    """Five tasks with ten trials each and rates of 2 %: half of the benchmarks have no success at all."""
    rng = np.random.default_rng(8)
    averages = [clustered_bootstrap(rng.random(50) < 0.02, np.arange(50) % 5, resamples=500) for _ in range(200)]
    assert np.mean([average.low <= 0.02 <= average.high for average in averages]) > 0.93


def test_stratified_average():
    """Groups weigh the same whatever their number of tasks. For groups of one size it is Welch's test of a difference."""
    strata = dict.fromkeys("abcd", "easy") | dict.fromkeys("efgh", "hard")
    a, b = [0.9, 0.7, 0.8, 0.95], [0.2, 0.5, 0.1, 0.3]
    average = stratified_average([*a, *b], "abcdefgh", strata)
    welch = stats.ttest_ind(a, [-value for value in b], equal_var=False)
    interval = welch.confidence_interval()
    assert average == pytest.approx((np.mean(a + b), interval.low / 2, interval.high / 2, 8))
    unequal = stratified_average([1, 1, 1, 0, 1, 0, 0, 0], "aabbcdef", {**strata, "d": "hard"})
    assert unequal.value == pytest.approx(((1 + 0.5 + 1) / 3 + 0) / 2)
    with pytest.raises(ValueError, match="at least two clusters in every stratum"):
        stratified_average([1, 0, 1], "abe", strata)


def test_stratified_average_covers():
    """Groups of the sizes of Meta-World's with 10 episodes a task: the interval covers the mean of the groups' means."""
    rng = np.random.default_rng(5)
    sizes, shapes = (28, 11, 6, 5), ((6, 2), (2, 2), (2, 4), (1, 3))
    strata = dict(enumerate(np.repeat(range(4), sizes)))
    labels = np.repeat(np.arange(50), 10)
    truth = np.mean([a / (a + b) for a, b in shapes])
    covered = []
    for _ in range(500):
        rates = np.concatenate([rng.beta(*shape, size) for shape, size in zip(shapes, sizes, strict=True)])
        average = stratified_average(rng.random(500) < np.repeat(rates, 10), labels.tolist(), strata)
        covered.append(average.low <= truth <= average.high)
    assert 0.92 <= np.mean(covered) <= 0.975


@pytest.mark.parametrize(("tasks", "episodes"), [(6, 50), (24, 50), (50, 10)])
def test_bootstrap_covers_where_pooled_wilson_does_not(tasks, episodes):
    """Benchmarks of tasks whose true rates are Beta(2, 2): the clustered interval covers the mean of all such tasks."""
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(tasks), episodes)
    covered, pooled = [], []
    for _ in range(400):
        outcomes = rng.random(tasks * episodes) < np.repeat(rng.beta(2, 2, tasks), episodes)
        average = clustered_bootstrap(outcomes, labels, resamples=999)
        low, high = wilson_interval(int(outcomes.sum()), len(outcomes))
        covered.append(average.low <= 0.5 <= average.high)
        pooled.append(low <= 0.5 <= high)
    assert 0.915 <= np.mean(covered) <= 0.975
    assert np.mean(pooled) < 0.75


@pytest.mark.parametrize("tasks", [2, 12])
def test_paired_bootstrap_covers(tasks):
    """Two policies on the same trials, easy and hard ones: the interval covers their difference of .1."""
    rng = np.random.default_rng(3)
    labels = np.arange(240) % tasks
    covered = []
    for _ in range(300):
        ease = rng.uniform(0.1, 0.8, 240)
        a, b = rng.random(240) < ease + 0.1, rng.random(240) < ease
        difference = paired_bootstrap(a, b, labels, resamples=999)
        assert difference.value == pytest.approx(a.mean() - b.mean())
        assert difference.clusters == (240 if tasks == 2 else 12)
        covered.append(difference.low <= 0.1 <= difference.high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_the_difference_is_that_of_the_rates_where_tasks_have_unequal_numbers_of_trials():
    tasks, a, b = "aabcde", [1, 1, 0, 0, 0, 0], [0] * 6
    difference = paired_bootstrap(a, b, tasks)
    assert (difference.value, difference.clusters) == (pytest.approx(1 / 3), 5)
    assert difference.low <= 0 < 1 / 3 < difference.high


def test_with_equal_numbers_of_trials_the_difference_is_the_mean_over_tasks():
    rng = np.random.default_rng(6)
    a, b, tasks = rng.random(60) < 0.6, rng.random(60) < 0.4, np.arange(60) % 6
    average = clustered_bootstrap(a.astype(float) - b, tasks.tolist())
    assert paired_bootstrap(a, b, tasks.tolist()) == pytest.approx(average)


def test_minimum_detectable_effect_against_statsmodels():
    from statsmodels.stats.power import NormalIndPower

    for trials, rate in ((50, 0.5), (500, 0.3), (1200, 0.66), (1200, 0.05)):
        effect = minimum_detectable_effect(trials, rate)
        size = proportion.proportion_effectsize(rate + effect, rate)
        assert NormalIndPower().power(size, nobs1=trials, alpha=0.05) == pytest.approx(0.8, abs=1e-4)
    assert minimum_detectable_effect(50, 0.95) == math.inf


def test_paired_minimum_detectable_effect_is_seen_in_four_of_five():
    rng = np.random.default_rng(4)
    trials, discordant = 400, 0.2
    effect = paired_minimum_detectable_effect(trials, discordant)
    chances = [(discordant + effect) / 2, (discordant - effect) / 2, 1 - discordant]
    counts = rng.multinomial(trials, chances, 1000)
    detected = [stats.binomtest(only_a, only_a + only_b).pvalue < 0.05 for only_a, only_b, _ in counts]
    assert 0.74 <= np.mean(detected) <= 0.84  # the exact test is a little conservative
    assert effect < minimum_detectable_effect(trials, 0.5)
    assert paired_minimum_detectable_effect(10, 0.1) == math.inf
    with pytest.raises(ValueError, match=r"discordant: expected a fraction in \[0, 1\]"):
        paired_minimum_detectable_effect(10, 1.2)


def by_trial(table):
    return {seed: dict(enumerate(row)) for seed, row in enumerate(table)}


def test_the_crossed_bootstrap_draws_groups_and_the_trials_that_they_share():
    rng = np.random.default_rng(0)
    one = (rng.random(200) < 0.5).astype(float)
    mean, low, high, count = crossed_bootstrap(by_trial([one]), bounds=(0, 1))
    assert (mean, count) == (pytest.approx(one.mean()), 1)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(mean * (1 - mean) / 200), rel=0.1)
    five = crossed_bootstrap(by_trial([one] * 5), bounds=(0, 1))  # no seed adds anything to the first one
    assert (five.low, five.high) == pytest.approx((low, high), abs=0.01)
    apart = [np.full(200, seed) for seed in (0, 1)]  # all variation is between groups
    assert crossed_bootstrap(by_trial(apart), bounds=(0, 1))[:3] == pytest.approx((0.5, 0.0, 1.0))
    for groups in ({}, {0: {}}, {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0}}, {0: {"a": 1.0}, 1: {"b": 1.0}}):
        with pytest.raises(ValueError, match="expected the same trials in every group, at least one"):
            crossed_bootstrap(groups, bounds=(0, 1))


@pytest.mark.parametrize("effect", [0.0, 0.3])
def test_the_crossed_bootstrap_covers(effect):
    """Five seeds on the same 180 easy and hard trials: the interval covers the rate over all seeds and trials, one half."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(100):
        ease = rng.normal(size=180) + effect * rng.normal(size=(5, 1))
        average = crossed_bootstrap(by_trial(rng.random((5, 180)) < stats.norm.cdf(ease)), bounds=(0, 1), resamples=500)
        covered.append(average.low <= 0.5 <= average.high)
    assert 0.9 <= np.mean(covered) <= 0.99
