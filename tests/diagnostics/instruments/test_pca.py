import numpy as np
import pytest

from agra.diagnostics.instruments.pca import pca_rgb, principal_components


def test_components_match_the_singular_vectors():
    rows = np.random.default_rng(0).normal(size=(200, 12)) * np.arange(12, 0, -1)
    mean, components = principal_components(rows)
    _, _, vectors = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.diag(components @ vectors[:3].T)), 1, atol=1e-9)
    np.testing.assert_allclose(mean, rows.mean(axis=0))
    assert (components[np.arange(3), np.abs(components).argmax(axis=1)] > 0).all()


def test_the_basis_is_joint():
    random = np.random.default_rng(1)
    patterns = random.normal(size=(4, 16)) * 3
    labels = [random.integers(0, 4, (3, 5, 6)), random.integers(0, 4, (2, 7, 6))]
    images = pca_rgb([patterns[label] + random.normal(size=(*label.shape, 16)) * 0.01 for label in labels])
    assert [i.shape for i in images] == [(3, 5, 6, 3), (2, 7, 6, 3)]
    assert images[0].dtype == np.uint8
    for value in range(4):  # the same feature has the same colour in both samples
        colours = np.concatenate([image[label == value] for image, label in zip(images, labels, strict=True)])
        assert np.ptp(colours.astype(int), axis=0).max() <= 6


def test_outliers_do_not_take_the_contrast():
    rows = np.random.default_rng(2).normal(size=(500, 8))
    rows[0] *= 1000
    image = pca_rgb([rows.reshape(20, 25, 8)])[0]
    assert image[1:].std(axis=(0, 1)).max() > 40


def test_flat_features_and_bad_input():
    assert pca_rgb([np.ones((2, 3, 4))])[0].shape == (2, 3, 3)
    with pytest.raises(ValueError, match="one width"):
        pca_rgb([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(ValueError, match="expected finite features"):
        pca_rgb([np.full((3, 4), np.nan)])
