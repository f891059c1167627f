"""Measures of a layer's hidden states (3.3, 4.2.2 a, D.2): similarity to a teacher, alignment, the object's position.

numpy in, numpy out. Measure the hidden states that the action head reads, for a WAM those of the conditioning pass.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict

FOLDS = 10
PENALTIES = tuple(10.0**exponent for exponent in range(-3, 5))


def teacher_similarity(hidden: np.ndarray, teacher: np.ndarray) -> float:
    """Debiased linear CKA of `hidden` (N, D) and `teacher` (N, P), at most 1: agreement on which tokens are similar.

    No map is fitted, so layers without a projector can be compared. Unrelated features of any width score 0 on average.
    The plain CKA of few wide tokens is near 1 for any features. NaN where all tokens are equal. References: Kornblith
    et al. 2019 (CKA), Song et al. 2012 (unbiased HSIC). Raises ValueError for fewer than 4 tokens.
    """
    if hidden.ndim != 2 or teacher.ndim != 2 or len(hidden) != len(teacher) or len(hidden) < 4:
        raise ValueError(f"expected (N, D) and (N, P) with N of at least 4, got {hidden.shape} and {teacher.shape}")
    first, second = (_similarities(x) for x in (hidden, teacher))
    scale = _hsic(first, first) * _hsic(second, second)
    return float(_hsic(first, second) / np.sqrt(scale)) if scale > 0 else float("nan")


def _similarities(tokens: np.ndarray) -> np.ndarray:
    """Inner products of the centred tokens, with a zero diagonal."""
    centred = np.asarray(tokens, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    products = centred @ centred.T
    np.fill_diagonal(products, 0)
    return products


def _hsic(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased HSIC of two similarity matrices with zero diagonals (Song et al. 2012)."""
    count = len(first)
    paired = (first * second).sum()
    whole = first.sum() * second.sum() / ((count - 1) * (count - 2))
    mixed = 2 * (first.sum(axis=0) @ second.sum(axis=0)) / (count - 2)
    return float((paired + whole - mixed) / (count * (count - 3)))


def mean_cosine(projected: np.ndarray, targets: np.ndarray, epsilon: float = 1e-8) -> float:
    """Mean over tokens of the cosine between `projected` and `targets` (..., P): the negative of Eq. 6 for one
    layer.
    """
    projected, targets = (np.asarray(x, dtype=np.float64) for x in (projected, targets))
    if projected.shape != targets.shape:
        raise ValueError(f"expected two arrays of one shape, got {projected.shape} and {targets.shape}")
    norms = np.linalg.norm(projected, axis=-1) * np.linalg.norm(targets, axis=-1)
    return float(((projected * targets).sum(axis=-1) / (norms + epsilon)).mean())


def probed_positions(features: np.ndarray, positions: np.ndarray, groups: Sequence[object]) -> np.ndarray:
    """Positions (n, 2) predicted from `features` (n, P) by a linear map that is fitted on the samples of other groups.

    Ridge regression on features divided by their overall standard deviation. The penalty is chosen by leave-one-out
    within the fitted samples. Whole groups (trials) are held out. Raises ValueError for fewer than two groups.
    """
    distinct = len(set(groups))
    if distinct < 2:
        raise ValueError(f"a linear probe needs samples from at least two trials, got {distinct}")
    flat = np.asarray(features, dtype=np.float64).reshape(len(features), -1)
    flat = (flat - flat.mean(axis=0)) / (flat.std() * np.sqrt(flat.shape[1]) or 1)
    labels = np.unique([str(group) for group in groups], return_inverse=True)[1]
    model = RidgeCV(alphas=PENALTIES)
    return np.asarray(cross_val_predict(model, flat, positions, groups=labels, cv=GroupKFold(min(FOLDS, distinct))))


def held_out_mean(positions: np.ndarray, groups: Sequence[object]) -> np.ndarray:
    """The baseline of a probe without features: the mean position (n, 2) over the samples of other groups."""
    names = np.array([str(group) for group in groups])
    return np.stack([positions[names != name].mean(axis=0) for name in names])
