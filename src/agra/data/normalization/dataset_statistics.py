"""Exact statistics of rows and of images, with the names of LeRobot v3.0.

LeRobot approximates quantiles and, over a dataset, only bounds them. Here every statistic is computed over all values.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Statistics = Mapping[str, np.ndarray]
"""min, max, mean, std, count and five quantiles. count is (1,), the others have the shape of one value."""

Chunks = Callable[[], Iterable[np.ndarray]]
"""A function that yields all rows from the beginning, in arrays (n, D), at each call."""


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """Compute statistics over the first axis of `values` (N, D). Each is (D,) float64, count is (1,) int64.

    std divides by N. Raises ValueError for no rows and for a value that is not finite.
    """
    values = _finite(values)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def describe_stream(chunks: Chunks, *, block_rows: int = 2**20) -> dict[str, np.ndarray]:
    """Compute `describe` of all rows of `chunks()` together, with about `block_rows` of them in memory.

    Quantiles are exact. Their order statistics come from counts of 16 bits of the values in each pass, so `chunks` is
    called up to five times and must yield the same rows each time. Means and standard deviations of blocks are merged
    (Chan et al. 1979). Raises the errors of `describe`.
    """
    blocks = _blocks(chunks(), block_rows)
    first, second = next(blocks, None), next(blocks, None)
    if first is None:
        raise ValueError("statistics need rows: got none")
    if second is None:
        return describe(first)
    moments = _RunningMoments.of(first, 0).merge(_RunningMoments.of(second, len(first)))
    for block in blocks:
        moments = moments.merge(_RunningMoments.of(block, moments.count))
    quantiles = _quantiles(chunks, block_rows, moments.count, first.dtype)
    return {
        "min": moments.low,
        "max": moments.high,
        "mean": moments.mean,
        "std": np.sqrt(moments.squares / moments.count),
        "count": np.array([moments.count]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _RunningMoments:
    count: int
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    squares: np.ndarray  # sum of squared distances from the mean

    @classmethod
    def of(cls, rows: np.ndarray, before: int) -> "_RunningMoments":
        values = _finite(rows, before)
        mean = values.mean(0)
        return cls(
            count=len(values),
            low=values.min(0),
            high=values.max(0),
            mean=mean,
            squares=np.square(values - mean).sum(0),
        )

    def merge(self, other: "_RunningMoments") -> "_RunningMoments":
        count = self.count + other.count
        shift = other.mean - self.mean
        return _RunningMoments(
            count=count,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            mean=self.mean + shift * (other.count / count),
            squares=self.squares + other.squares + shift**2 * (self.count * other.count / count),
        )


def _finite(values: np.ndarray, before: int = 0) -> np.ndarray:
    """Return `values` as (N, D) float64. Raises ValueError for no rows and for a value that is not finite.

    `before` is the number of earlier rows, for the row number in the message.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"statistics need rows: expected (N, D) with N >= 1, got {values.shape}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"statistics need finite values: row {before + row}, dimension {column} is {values[row, column]}"
        )
    return values


def _blocks(chunks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Yield the rows of `chunks` in blocks of at least `rows`. The last block can be smaller."""
    pending: list[np.ndarray] = []
    for chunk in chunks:
        pending.append(chunk)
        if sum(map(len, pending)) >= rows:
            yield np.concatenate(pending)
            pending = []
    if pending:
        yield np.concatenate(pending)


def _quantiles(chunks: Chunks, block_rows: int, count: int, dtype: np.dtype) -> list[np.ndarray]:
    """Return the five quantiles, each (D,), interpolated between order statistics as in `numpy.quantile`."""
    places = np.array(list(QUANTILES.values())) * (count - 1)
    below = np.floor(places).astype(np.int64)
    ranks = np.unique(np.concatenate([below, np.minimum(below + 1, count - 1)]))
    values = _order_statistics(
        chunks, block_rows, ranks, np.dtype(np.float32) if dtype == np.float32 else np.dtype(float)
    )
    low, high = (values[np.searchsorted(ranks, np.minimum(below + more, count - 1))] for more in (0, 1))
    share = (places - below)[:, None]
    step = high - low
    return list(np.where(share < 0.5, low + step * share, high - step * (1 - share)))


def _order_statistics(chunks: Chunks, block_rows: int, ranks: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the values of `ranks` (0-based) in each dimension, (len(ranks), D) float64, by radix selection of 16
    bits a pass.
    """
    bits = dtype.itemsize * 8
    prefixes: np.ndarray | None = None  # (ranks, D): the leading bits so far
    for shift in range(bits - 16, -1, -16):
        histograms: dict[tuple[int, int], np.ndarray] = {}
        for block in _blocks(chunks(), block_rows):
            keys = _ordered_bits(block.astype(dtype))
            if prefixes is None:
                prefixes = np.zeros((len(ranks), keys.shape[1]), np.uint64)
                remaining = np.repeat(ranks[:, None], keys.shape[1], 1)
            for dimension in range(keys.shape[1]):
                column = keys[:, dimension]
                for prefix in np.unique(prefixes[:, dimension]):
                    inside = column if shift == bits - 16 else column[column >> np.uint64(shift + 16) == prefix]
                    digits = ((inside >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
                    place = dimension, int(prefix)
                    histograms[place] = histograms.get(place, 0) + np.bincount(digits, minlength=65536)
        assert prefixes is not None
        for (row, dimension), prefix in np.ndenumerate(prefixes.copy()):
            totals = histograms[dimension, int(prefix)].cumsum()
            digit = int(np.searchsorted(totals, remaining[row, dimension], side="right"))
            remaining[row, dimension] -= totals[digit - 1] if digit else 0
            prefixes[row, dimension] = (int(prefix) << 16) | digit
    assert prefixes is not None
    return _from_ordered_bits(prefixes, dtype)


def _ordered_bits(values: np.ndarray) -> np.ndarray:
    """Return uint64 bit patterns with the order of the floats: sign bit flipped, negative numbers inverted."""
    width = values.dtype.itemsize * 8
    raw = np.ascontiguousarray(values).view(f"u{width // 8}").astype(np.uint64)
    sign, full = np.uint64(1 << (width - 1)), np.uint64((1 << width) - 1)
    return np.where(raw & sign, raw ^ full, raw | sign)


def _from_ordered_bits(keys: np.ndarray, dtype: np.dtype) -> np.ndarray:
    width = dtype.itemsize * 8
    sign, full = np.uint64(1 << (width - 1)), np.uint64((1 << width) - 1)
    raw = np.where(keys & sign, keys ^ sign, keys ^ full)
    return raw.astype(f"u{width // 8}").view(dtype).astype(np.float64)


def picture_histogram(frames: np.ndarray) -> np.ndarray:
    """Count the values of each channel of `frames` (N, H, W, 3) uint8, as (3, 256) int64. Histograms can be added."""
    return np.stack([np.bincount(frames[..., channel].ravel(), minlength=256) for channel in range(3)])


def describe_pictures(histogram: np.ndarray, *, count: int) -> dict[str, np.ndarray]:
    """Compute statistics of each channel in [0, 1], (3, 1, 1) each, from a `picture_histogram` of `count` frames.

    A quantile q is the smallest value that at least a fraction q of the pixels does not exceed.
    """
    values = np.arange(256) / 255
    fraction = histogram / histogram.sum(1, keepdims=True)
    cumulative = fraction.cumsum(1)
    mean = fraction @ values
    present = histogram > 0

    def quantile(q: float) -> np.ndarray:
        return values[(cumulative < q - 1e-12).sum(1)]

    per_channel = {
        "min": values[present.argmax(1)],
        "max": values[255 - present[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(fraction @ values**2 - mean**2, 0)),
        **{name: quantile(q) for name, q in QUANTILES.items()},
    }
    return {**{k: v.reshape(3, 1, 1) for k, v in per_channel.items()}, "count": np.array([count])}
