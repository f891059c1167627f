"""Exact descriptive statistics in LeRobot v3.0's terms, of rows and of pictures.

LeRobot approximates quantiles and, over a data set, brackets them; here every figure is computed over all values.
"""

from collections.abc import Mapping

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Statistics = Mapping[str, np.ndarray]
"""min, max, mean, std, count and the five quantiles; count (1,), the others the shape of one value."""


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics over the first axis of `values` (N, D): every entry (D,) float64, count (1,) int64.

    std divides by N. Raises ValueError without rows or with a value that is not finite.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"statistics need rows: expected (N, D) with N >= 1, got {values.shape}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"statistics need finite values: row {row}, dimension {column} is {values[row, column]}")
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def picture_histogram(frames: np.ndarray) -> np.ndarray:
    """Counts of every 8-bit value per channel, (3, 256) int64, of `frames` (N, H, W, 3) uint8; histograms add up."""
    return np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])


def describe_pictures(histogram: np.ndarray, *, count: int) -> dict[str, np.ndarray]:
    """Statistics per channel in [0, 1], (3, 1, 1) each, from a `picture_histogram` of `count` frames.

    A quantile is the smallest value that at least that share of the pixels does not exceed.
    """
    values = np.arange(256) / 255
    share = histogram / histogram.sum(1, keepdims=True)
    cumulative = share.cumsum(1)
    mean = share @ values
    present = histogram > 0

    def quantile(q: float) -> np.ndarray:
        return values[(cumulative < q - 1e-12).sum(1)]

    per_channel = {
        "min": values[present.argmax(1)],
        "max": values[255 - present[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ values**2 - mean**2, 0)),
        **{name: quantile(q) for name, q in QUANTILES.items()},
    }
    return {**{k: v.reshape(3, 1, 1) for k, v in per_channel.items()}, "count": np.array([count])}
