import numpy as np
import pytest

from agra.diagnostics.instruments.imagination import compare_videos, static_video


def test_scores_follow_the_noise():
    random = np.random.default_rng(0)
    real = random.integers(40, 200, (4, 24, 24, 3)).astype(np.uint8)
    noise = random.integers(-3, 4, real.shape)
    near, far = (compare_videos((real + factor * noise).astype(np.uint8), real) for factor in (1, 8))
    assert near.psnr == pytest.approx(10 * np.log10(255**2 / np.square(noise[1:], dtype=float).mean()))
    assert near.psnr > far.psnr
    assert 1 > near.ssim > far.ssim


def test_only_the_future_counts():
    real = np.zeros((3, 8, 8, 3), np.uint8)
    other = real.copy()
    other[0] = 255
    assert compare_videos(other, real).psnr == np.inf
    moved = real.copy()
    moved[2] = 100
    still = compare_videos(static_video(moved), moved)
    assert still.psnr == pytest.approx(10 * np.log10(255**2 / (100**2 / 2)))
    assert still.ssim < 1
    with pytest.raises(ValueError, match="after the first"):
        compare_videos(real[:1], real[:1])
    with pytest.raises(ValueError, match="one shape"):
        compare_videos(real, real[:2])
