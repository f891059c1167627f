import numpy as np
import pytest

from agra.data.sampling.augment import AugmentConfig, augment, shift
from agra.data.sampling.sampler import DataConfig

NOTHING = AugmentConfig(crop=1.0, brightness=0, contrast=0, saturation=0, hue=0)


def clip(seed: int = 0) -> np.ndarray:
    """Three times the same picture, so that any difference between frames comes from the augmentation."""
    return np.repeat(np.random.default_rng(seed).integers(0, 255, (1, 40, 60, 3), dtype=np.uint8), 3, axis=0)


def test_consistent_over_the_clip_and_decided_by_the_draw():
    one = augment(clip(), AugmentConfig(), np.random.default_rng(5))
    assert one.shape == clip().shape
    assert one.dtype == np.uint8
    assert (one == one[0]).all()
    assert np.array_equal(one, augment(clip(), AugmentConfig(), np.random.default_rng(5)))
    assert not np.array_equal(one, augment(clip(), AugmentConfig(), np.random.default_rng(6)))
    assert not np.array_equal(one, clip())


def test_nothing_changes_nothing():
    assert np.array_equal(augment(clip(), NOTHING, np.random.default_rng(0)), clip())


def test_each_change_does_what_it_says():
    def only(seed=0, **change):
        settings = {"crop": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | change
        return augment(clip(), AugmentConfig(**settings), np.random.default_rng(seed)).astype(float)

    before = clip().astype(float)
    ratio = (only(brightness=0.3) / np.maximum(before, 1))[(before > 50) & (before < 150)]
    assert ratio.std() < 0.02
    assert 0.7 <= ratio.mean() <= 1.3
    contrast = only(contrast=0.4)
    slope = np.polyfit(before[(before > 60) & (before < 190)], contrast[(before > 60) & (before < 190)], 1)[0]
    assert 0.6 <= slope <= 1.4
    assert abs(slope - 1) > 0.01
    grey = np.repeat(clip()[..., :1], 3, axis=-1)
    settings = AugmentConfig(crop=1.0, brightness=0, contrast=0)  # saturation and hue leave grey as it is
    assert np.abs(augment(grey, settings, np.random.default_rng(1)).astype(int) - grey).max() <= 1
    red = np.zeros((1, 4, 4, 3), np.uint8) + np.array([120, 60, 60], np.uint8)
    turned = augment(
        red, AugmentConfig(crop=1.0, brightness=0, contrast=0, saturation=0, hue=0.5), np.random.default_rng(3)
    )
    luma = np.array([0.299, 0.587, 0.114])
    assert abs(turned[0, 0, 0] @ luma - red[0, 0, 0] @ luma) < 3
    assert np.abs(turned[0, 0, 0].astype(int) - red[0, 0, 0]).max() > 10


def test_a_crop_is_a_smaller_part_made_larger():
    ramp = np.repeat(np.linspace(0, 250, 100).astype(np.uint8)[None, None, :, None], 50, axis=1).repeat(3, axis=3)
    cropped = augment(
        ramp, AugmentConfig(crop=0.8, brightness=0, contrast=0, saturation=0, hue=0), np.random.default_rng(0)
    )
    assert cropped.shape == ramp.shape
    slope = np.polyfit(np.arange(100), cropped[0, 25, :, 0], 1)[0] / np.polyfit(np.arange(100), ramp[0, 25, :, 0], 1)[0]
    assert abs(slope - 0.8) < 0.02


def test_settings_are_checked_and_caches_are_not_augmented():
    with pytest.raises(ValueError, match=r"data\.augment\.crop: expected a number in \(0, 1\], got 0"):
        AugmentConfig(crop=0)
    with pytest.raises(ValueError, match=r"data\.augment\.hue: expected 0 to 0\.5, got 0\.6"):
        AugmentConfig(hue=0.6)
    with pytest.raises(
        ValueError,
        match=r"data\.augment: cached features are not augmented; set data\.cached to an empty list, got \('targets',\)",
    ):
        DataConfig(cached=("targets",), augment=AugmentConfig())
    assert DataConfig(cached=(), augment=AugmentConfig()).augment == AugmentConfig()


def shifted(clip, down, right):
    """Loops: a pixel comes from `down` rows above and `right` columns to the left, or from the edge."""
    result = np.empty_like(clip)
    for index in np.ndindex(clip.shape[:3]):
        t, y, x = index
        result[index] = clip[t, min(max(y - down, 0), clip.shape[1] - 1), min(max(x - right, 0), clip.shape[2] - 1)]
    return result


def test_a_shift_moves_all_frames_by_one_offset_and_repeats_the_edge():
    clip = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    seen = set()
    for seed in range(60):
        down, right = np.random.default_rng(seed).integers(-1, 2, size=2).tolist()
        seen.add((down, right))
        ours = shift(clip, 1, (6, 8), np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, shifted(clip, down, right))
        # The offset counts at the method's size: frames of twice its height and four times its width move further.
        larger = shift(clip, 1, (3, 2), np.random.default_rng(seed))
        np.testing.assert_array_equal(larger, shifted(clip, 2 * down, 4 * right))
    assert len(seen) == 9


def test_what_a_shift_changes_is_not_cached():
    with pytest.raises(ValueError, match=r"data\.shift: cached latents are not shifted; set data\.cached to frames"):
        DataConfig(shift=4)
    with pytest.raises(ValueError, match=r"data\.shift: cached targets are not shifted"):
        DataConfig(shift=4, cached=("frames", "targets"))
    with pytest.raises(ValueError, match=r"data\.shift: expected at least 0, got -1"):
        DataConfig(shift=-1)
    assert DataConfig(shift=4, cached=("frames",)).shift == 4
    assert DataConfig().shift == 0
