"""Grounding metrics with intervals: attention in the mask, centroid error, matched sensitivity ratio (4.2.1, Table 1).

numpy in, numpy out, no torch. Grids are (..., T, H, W): latent frame, token row, token column. A grid unit is the side
of one token of the video DiT. Intervals are those of `agra.evaluation.statistics`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agra.evaluation.statistics import expanded_percentile_interval

Statistic = Callable[..., np.ndarray | float | np.floating]
"""Reduces the axis that it is given, as np.mean and np.median do."""


@dataclass(frozen=True, kw_only=True)
class IntervalEstimate:
    """A statistic over `count` samples from `groups` independent units, with its bootstrap interval."""

    value: float
    low: float
    high: float
    count: int
    groups: int

    def includes(self, reference: float) -> bool:
        """Whether `reference` lies in the interval. An undefined interval includes everything."""
        return not (reference < self.low or reference > self.high)


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityRatio:
    """The matched sensitivity ratio over samples, averaged in the three usual ways. Reports quote `ratio`.

    `ratio` is the median of the per-sample ratios. The paper defines R per sample. A few samples with a background
    deviation near zero cannot dominate a median, and it becomes 1/R when both sides trade places. `mean` is the plain
    mean of the ratios, `ratio_of_means` the quotient of the two summed deviations.
    """

    ratio: IntervalEstimate
    mean: IntervalEstimate
    ratio_of_means: IntervalEstimate
    per_sample: np.ndarray  # (N,), NaN where neither side moves the action
    undefined: int  # number of NaN, left out of every average


def _grid(attention: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as (..., T, H, W), the mask broadcast.

    Raises ValueError for negative attention and masks of other values.
    """
    attention, mask = np.asarray(attention, dtype=np.float64), np.asarray(mask)
    if mask.dtype != np.bool_ and not np.isin(mask, (0, 1)).all():
        raise ValueError("mask: expected booleans (or 0 and 1), got other values; threshold it first")
    if attention.ndim < 2 or mask.ndim < 2:
        raise ValueError(f"expected grids of (..., T, H, W) or (H, W), got {attention.shape} and {mask.shape}")
    if not np.isfinite(attention).all() or (attention < 0).any():
        raise ValueError("attention: expected finite, non-negative weights")
    attention = attention[None] if attention.ndim == 2 else attention
    mask = mask[None] if mask.ndim == 2 else mask
    try:
        return attention, np.broadcast_to(mask.astype(bool), attention.shape)
    except ValueError:
        raise ValueError(f"mask of shape {mask.shape} does not broadcast to attention {attention.shape}") from None


def attention_in_mask_ratio(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fraction of the attention mass inside the interaction mask, in [0, 1] (4.2.1).

    `attention` is (..., T, H, W) or (H, W), of any scale. `mask` broadcasts to it. The mass of all latent frames of a
    sample is added up. The result has the leading shape. Uniform attention scores the mask's fraction of the grid,
    which is the baseline to compare with. Raises ValueError where a sample has no mass.
    """
    attention, mask = _grid(attention, mask)
    total = attention.sum(axis=(-3, -2, -1))
    if (total == 0).any():
        raise ValueError("attention: a sample has no mass at all, its fraction inside the mask is undefined")
    return np.where(mask, attention, 0).sum(axis=(-3, -2, -1)) / total


def _centroid(mass: np.ndarray) -> np.ndarray:
    """(..., H, W) -> (..., 2): mean (row + .5, column + .5) under `mass`. NaN where the mass is zero."""
    rows, columns = np.arange(mass.shape[-2]) + 0.5, np.arange(mass.shape[-1]) + 0.5
    total = mass.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        row = (mass.sum(axis=-1) * rows).sum(axis=-1) / total
        column = (mass.sum(axis=-2) * columns).sum(axis=-1) / total
    return np.stack([row, column], axis=-1)


def centroid_error(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Distance between the attention's centroid and the mask's centroid, in grid units (4.2.1).

    Shapes as in `attention_in_mask_ratio`. Both centroids are weighted means of (row + .5, column + .5), computed per
    latent frame. The distances are averaged over the latent frames that have both: an empty mask or zero attention has
    no centroid. NaN where no latent frame is left.
    """
    attention, mask = _grid(attention, mask)
    distance = np.linalg.norm(_centroid(attention) - _centroid(mask.astype(np.float64)), axis=-1)
    defined = np.isfinite(distance)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, distance, 0).sum(axis=-1) / defined.sum(axis=-1)


def mask_to_grid(mask: np.ndarray, grid: tuple[int, int], *, threshold: float = 0.25) -> np.ndarray:
    """Pixel masks (..., H, W) as token masks (..., h, w), bool.

    A token belongs to the mask where at least the fraction `threshold` of its area is covered. Areas are exact, also
    where H/h is no integer. If no token of a mask reaches the threshold, its most covered token is kept, so that only
    an empty mask becomes empty.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a fraction in (0, 1], got {threshold}")
    mask = np.asarray(mask)
    if mask.ndim < 2 or min(grid) < 1:
        raise ValueError(f"expected a mask (..., H, W) and a grid of at least 1 x 1, got {mask.shape} and {grid}")
    covered = _overlap(grid[0], mask.shape[-2]) @ mask.astype(np.float64) @ _overlap(grid[1], mask.shape[-1]).T
    most = covered.max(axis=(-2, -1), keepdims=True)
    return (covered > 0) & (covered >= np.minimum(threshold - 1e-9, most))


def _overlap(cells: int, pixels: int) -> np.ndarray:
    """(cells, pixels): the fraction of each cell's length that each pixel covers. Rows sum to 1."""
    edges = np.arange(cells + 1) * pixels / cells
    starts = np.arange(pixels)
    lengths = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return lengths.clip(min=0) * cells / pixels


def _units(rows: np.ndarray, groups: Sequence[object] | None) -> list[np.ndarray]:
    """`rows` split into independent units. Without `groups` every row is a unit."""
    if groups is None:
        return [np.array([row]) for row in rows]
    units: dict[object, list[int]] = {}
    for row in rows.tolist():
        units.setdefault(groups[row], []).append(row)
    return [np.array(unit) for unit in units.values()]


def _estimate(
    statistic: Callable[[np.ndarray], np.ndarray],
    defined: np.ndarray,
    groups: Sequence[object] | None,
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> IntervalEstimate:
    """`statistic(rows)` over the row numbers where `defined`, and its interval over resamples of whole groups.

    `statistic` reduces the last axis of `rows`. Where every group is one row, all resamples are computed at once.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"expected a confidence in (0, 1) and at least one resample, got {confidence}, {resamples}")
    if groups is not None and len(groups) != len(defined):
        raise ValueError(f"groups: expected one label for each of {len(defined)} values, got {len(groups)}")
    rows = np.flatnonzero(defined)
    units = _units(rows, groups)
    value = float(statistic(rows)) if len(rows) else float("nan")
    low = high = float("nan")
    if len(units) > 1 and np.isfinite(value):
        vectorized, order = len(units) == len(rows), np.concatenate(units)

        def resampled(drawn: np.ndarray) -> np.ndarray:
            return statistic(order[drawn] if vectorized else np.concatenate([units[unit] for unit in drawn]))

        low, high = expanded_percentile_interval(
            resampled, len(units), confidence=confidence, resamples=resamples, seed=seed, vectorized=vectorized
        )
    return IntervalEstimate(value=value, low=low, high=high, count=len(rows), groups=len(units))


def bootstrap_interval(
    values: np.ndarray,
    *,
    statistic: Statistic = np.mean,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> IntervalEstimate:
    """`statistic` of the finite entries of `values` (N,), with its bootstrap interval.

    `groups` names the independent unit of each value. Samples of one trial resemble each other, so whole trials are
    drawn. With fewer than two units the interval is NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values: expected one axis, got shape {values.shape}")
    return _estimate(
        lambda rows: np.asarray(statistic(values[rows], axis=-1)),
        np.isfinite(values),
        groups,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    statistic: Statistic = np.mean,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> IntervalEstimate:
    """`statistic(a) - statistic(b)` for two measurements (N,) of the same samples, with its bootstrap interval.

    Pairs are drawn together. A pair with a value that is not finite is left out on both sides.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"paired_difference: expected two arrays of one shape (N,), got {a.shape} and {b.shape}")
    return _estimate(
        lambda rows: np.asarray(statistic(a[rows], axis=-1) - statistic(b[rows], axis=-1)),
        np.isfinite(a) & np.isfinite(b),
        groups,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def matched_sensitivity_ratio(
    deviation_interaction: np.ndarray,
    deviation_background: np.ndarray,
    *,
    groups: Sequence[object] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> SensitivityRatio:
    """R = Delta(I) / Delta(B) (4.2.1): the effect of the interaction tokens over that of as many background tokens.

    `deviation_interaction` is (N,) or (N, noise samples). `deviation_background`, for background sets with |B| = |I|,
    is (N,), (N, background sets) or (N, noise samples, background sets). Each side of a sample is averaged first. A
    sample in which neither side moves the action has no ratio: it is left out and counted. If only the background does
    not move the action, the ratio is infinite.
    """
    inside = np.asarray(deviation_interaction, dtype=np.float64)
    outside = np.asarray(deviation_background, dtype=np.float64)
    if (
        not inside.ndim
        or not outside.ndim
        or len(outside) != len(inside)
        or 0 in (*inside.shape[1:], *outside.shape[1:])
    ):
        raise ValueError(
            f"deviations: expected (N,) or (N, noise samples), and (N,), (N, background sets) or (N, noise samples, "
            f"background sets), got {inside.shape} and {outside.shape}"
        )
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()) or (inside < 0).any() or (outside < 0).any():
        raise ValueError("deviations: expected finite, non-negative distances")
    inside, outside = (
        side.reshape(len(side), -1).mean(axis=1) if len(side) else side.reshape(0) for side in (inside, outside)
    )
    defined = inside + outside > 0

    def estimate(statistic: Callable[[np.ndarray], np.ndarray]) -> IntervalEstimate:
        return _estimate(statistic, defined, groups, confidence=confidence, resamples=resamples, seed=seed)

    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = inside / outside
        return SensitivityRatio(
            ratio=estimate(lambda rows: np.median(ratios[rows], axis=-1)),
            mean=estimate(lambda rows: np.mean(ratios[rows], axis=-1)),
            ratio_of_means=estimate(lambda rows: np.divide(inside[rows].sum(axis=-1), outside[rows].sum(axis=-1))),
            per_sample=ratios,
            undefined=int((~defined).sum()),
        )
