"""Joint PCA of patch features as colours (3.2, Figs. 3, 16): one basis for all samples of one source.

Because the fit is joint, equal colours mean equal features across samples and positions of one source. Colours of two
sources (a layer and the teacher, or two policies) cannot be compared, only their spatial layout.
"""

from collections.abc import Sequence

import numpy as np


def principal_components(features: np.ndarray, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Mean (P,) and the leading components (count, P) of rows (N, P), in float64.

    The entry of largest absolute value of each component is positive, so that the result is unique. Directions without
    variance are zeros.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"PCA needs at least two rows of features (N, P), got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("PCA: expected finite features, got NaN or infinity")
    mean = features.mean(axis=0)
    centred = features - mean
    variances, vectors = np.linalg.eigh(centred.T @ centred / len(features))
    leading = np.argsort(variances)[::-1][:count]
    components = np.zeros((count, features.shape[1]))
    for row, column in enumerate(leading):
        if variances[column] > 1e-12 * max(variances[leading[0]], np.finfo(float).tiny):
            vector = vectors[:, column]
            components[row] = vector * np.sign(vector[np.abs(vector).argmax()])
    return mean, components


def pca_rgb(features: Sequence[np.ndarray], *, percentiles: tuple[float, float] = (2, 98)) -> list[np.ndarray]:
    """Features (..., P) of several samples as images (..., 3), uint8: the first three components as red, green, blue.

    All samples are fitted jointly. Each channel is stretched so that the joint `percentiles` become 0 and 255. Values
    beyond them are clipped, so that a few outliers do not use up the contrast.
    """
    if not features:
        raise ValueError("PCA: expected the features of at least one sample, got none")
    widths = {array.shape[-1] for array in features}
    if len(widths) != 1:
        raise ValueError(f"PCA: expected features of one width, got {sorted(widths)}")
    rows = np.concatenate([np.asarray(array, dtype=np.float64).reshape(-1, array.shape[-1]) for array in features])
    mean, components = principal_components(rows)
    low, high = np.percentile((rows - mean) @ components.T, percentiles, axis=0)
    span = np.where(high > low, high - low, 1)

    def colour(array: np.ndarray) -> np.ndarray:
        scaled = ((array.astype(np.float64) - mean) @ components.T - low) / span
        return (scaled.clip(0, 1) * 255).round().astype(np.uint8)

    return [colour(np.asarray(array)) for array in features]
