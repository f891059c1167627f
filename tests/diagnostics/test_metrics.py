import numpy as np
import pytest

from agra.diagnostics.metrics import (
    attention_in_mask_ratio,
    bootstrap_interval,
    centroid_error,
    mask_to_grid,
    matched_sensitivity_ratio,
    paired_difference,
)
from agra.evaluation.statistics import clustered_bootstrap


def test_in_mask_ratio_by_hand():
    attention = np.array([[1.0, 2.0], [3.0, 4.0]])
    mask = np.array([[False, True], [False, True]])
    assert attention_in_mask_ratio(attention, mask) == pytest.approx(0.6)
    two_frames = np.stack([attention, np.full((2, 2), 10.0)])
    assert attention_in_mask_ratio(two_frames, np.stack([mask, ~mask & False])) == pytest.approx(6 / 50)


def test_in_mask_ratio_keeps_leading_axes_and_broadcasts_the_mask():
    attention = np.random.default_rng(0).random((5, 3, 2, 4, 6))
    mask = np.zeros((2, 4, 6), dtype=bool)
    mask[:, 1:3, 2:] = True
    ratio = attention_in_mask_ratio(attention, mask)
    assert ratio.shape == (5, 3)
    np.testing.assert_allclose(ratio[1, 2], attention[1, 2][mask].sum() / attention[1, 2].sum())
    np.testing.assert_allclose(attention_in_mask_ratio(7 * attention, mask), ratio)
    np.testing.assert_allclose(ratio + attention_in_mask_ratio(attention, ~mask), 1)
    assert attention_in_mask_ratio(np.ones((2, 4, 6)), mask) == pytest.approx(mask.mean())


@pytest.mark.parametrize("attention", [np.zeros((2, 3)), np.full((2, 3), np.nan), np.array([[1.0, -1.0]])])
def test_in_mask_ratio_refuses_what_is_no_mass(attention):
    with pytest.raises(ValueError, match="attention"):
        attention_in_mask_ratio(attention, np.ones(attention.shape, dtype=bool))


def test_centroid_error_by_hand():
    attention = np.zeros((2, 4, 6))
    attention[0, 0, 0] = 1  # centroid (.5, .5)
    attention[1, 2, 1] = attention[1, 2, 3] = 5  # centroid (2.5, 2.5)
    mask = np.zeros((2, 4, 6), dtype=bool)
    mask[0, 3, 4] = True  # (3.5, 4.5): distance 5
    mask[1, 1:4, 2] = True  # (2.5, 2.5): distance 0
    assert centroid_error(attention, mask) == pytest.approx(2.5)
    mask[1] = False  # an empty frame has no centroid
    assert centroid_error(attention, mask) == pytest.approx(5)
    assert np.isnan(centroid_error(attention, np.zeros_like(mask)))
    assert centroid_error(attention[0], mask[0]) == pytest.approx(5)
    assert centroid_error(np.stack([attention, attention]), mask).shape == (2,)


def test_mask_to_grid():
    mask = np.zeros((2, 8, 12), dtype=bool)
    mask[0, :4, :4] = True
    mask[0, 4:6, 4:6] = True  # a quarter of its token
    mask[0, 0, 8] = True  # a sixteenth
    grid = mask_to_grid(mask, (2, 3))
    assert grid.tolist() == [[[True, False, False], [False, True, False]], [[False] * 3, [False] * 3]]
    assert mask_to_grid(mask, (2, 3), threshold=0.3)[0].sum() == 1
    lone = np.zeros((8, 12), dtype=bool)
    lone[7, 11] = True
    assert np.argwhere(mask_to_grid(lone, (2, 3))).tolist() == [[1, 2]]
    everything = mask_to_grid(np.ones((7, 11), dtype=bool), (3, 4), threshold=1)  # cells of fractional size
    assert everything.all()
    thirds = np.zeros((3, 4), dtype=bool)
    thirds[1] = True  # a third of each of two rows' 1.5 pixels
    assert mask_to_grid(thirds, (2, 4), threshold=0.33).all()
    assert mask_to_grid(thirds, (2, 4), threshold=0.34).all()  # nothing reaches it: the most covered stay


def test_matched_sensitivity_ratio_definitions():
    inside, outside = np.array([2.0, 6.0, 3.0]), np.array([[0.5, 1.5], [1.0, 3.0], [9.0, 3.0]])
    result = matched_sensitivity_ratio(inside, outside)
    np.testing.assert_allclose(result.per_sample, [2, 3, 0.5])
    assert result.ratio.value == pytest.approx(2)
    assert result.mean.value == pytest.approx(5.5 / 3)
    assert result.ratio_of_means.value == pytest.approx(11 / 9)
    assert result.ratio.count == 3
    assert result.ratio.low <= 2 <= result.ratio.high
    again = matched_sensitivity_ratio(inside, outside)
    assert again.ratio == result.ratio


def test_matched_sensitivity_ratio_properties():
    random = np.random.default_rng(1)
    outside = random.gamma(2.0, size=41)
    inside = outside * random.lognormal(0.7, 0.4, size=41)
    forward, backward = matched_sensitivity_ratio(inside, outside), matched_sensitivity_ratio(outside, inside)
    assert forward.ratio.value == pytest.approx(1 / backward.ratio.value)  # the median trades places with its inverse
    scaled = matched_sensitivity_ratio(10 * inside, 10 * outside)
    assert scaled.ratio.value == pytest.approx(forward.ratio.value)
    assert forward.ratio.low > 1
    order = random.permutation(41)
    assert matched_sensitivity_ratio(inside[order], outside[order]).ratio.value == forward.ratio.value


def test_matched_sensitivity_ratio_without_background_effect():
    result = matched_sensitivity_ratio(np.array([1.0, 2.0, 0.0]), np.zeros((3, 4)))
    assert np.isinf(result.ratio.value)
    assert result.undefined == 1
    assert result.ratio.count == 2
    assert np.isnan(matched_sensitivity_ratio(np.zeros(2), np.zeros(2)).ratio.value)
    with pytest.raises(ValueError, match="expected \\(N,\\)"):
        matched_sensitivity_ratio(np.ones(3), np.ones((2, 3)))


def test_no_matched_sample_gives_no_ratio():
    """As in a diagnosis without masks."""
    result = matched_sensitivity_ratio(np.zeros((0, 2)), np.zeros((0, 2, 3)))
    assert np.isnan(result.ratio.value)
    assert (result.ratio.count, result.undefined) == (0, 0)


def test_noise_samples_and_background_sets_are_averaged_before_the_ratio():
    inside, outside = np.array([[1.0, 3.0], [6.0, 6.0]]), np.array([[[0.5, 1.5], [1.0, 1.0]], [[2.0, 4.0], [3.0, 3.0]]])
    result = matched_sensitivity_ratio(inside, outside)
    np.testing.assert_allclose(result.per_sample, [2, 2])
    assert result.ratio == matched_sensitivity_ratio(inside.mean(axis=1), outside.mean(axis=2)).ratio


def test_bootstrap_interval_draws_groups():
    values = np.repeat([0.0, 1.0, 2.0, 3.0], 25) + np.tile(np.linspace(-0.01, 0.01, 25), 4)
    groups = np.repeat(["a", "b", "c", "d"], 25).tolist()
    alone, grouped = bootstrap_interval(values), bootstrap_interval(values, groups=groups)
    assert alone.value == grouped.value == pytest.approx(1.5)
    assert grouped.groups == 4
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    assert bootstrap_interval(values) == alone
    lone = bootstrap_interval(np.array([1.0, np.nan]))
    assert lone.value == 1
    assert np.isnan(lone.low)
    assert lone.includes(99)


def test_bootstrap_interval_covers():
    random = np.random.default_rng(3)
    hits = sum(bootstrap_interval(random.normal(size=30), resamples=300, seed=i).includes(0) for i in range(60))
    assert 50 <= hits <= 60


def test_paired_difference_uses_the_pairing():
    random = np.random.default_rng(0)
    common = random.normal(scale=10, size=40)
    a, b = common + 1 + random.normal(scale=0.1, size=40), common
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(1, abs=0.1)
    assert not difference.includes(0)
    assert paired_difference(b, a).value == pytest.approx(-difference.value)
    holes = np.where(np.arange(40) < 5, np.nan, a)
    assert paired_difference(holes, b).count == 35
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(a, b[:3])


def test_the_interval_is_that_of_the_evaluation():
    """One bootstrap for success rates and for diagnostics, widened for few units."""
    values = np.random.default_rng(4).normal(size=40)
    grouped = bootstrap_interval(values, groups=list(range(40)), resamples=9999)
    expected = clustered_bootstrap(values, range(40))
    assert (grouped.low, grouped.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert grouped.value == pytest.approx(expected.value)


@pytest.mark.parametrize(("trials", "wider"), [(10, 1.217), (40, 1.045), (160, 1.011)])
def test_the_interval_is_wider_than_a_plain_percentile_bootstrap(trials, wider):
    """Student's quantile and the variance over n - 1: 4.5 % of the width at 40 trials."""
    values = np.random.default_rng(0).normal(size=trials)
    drawn = np.random.default_rng(1).integers(0, trials, (40_000, trials))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    estimate = bootstrap_interval(values, resamples=40_000)
    assert (estimate.high - estimate.low) / (high - low) == pytest.approx(wider, rel=0.03)
