"""The arithmetic of runs/study.py: pairs by seed and trial, and a bootstrap over seeds and trials."""

import numpy as np
import pytest

from runs.study import clustered_interval, references


def test_the_interval_draws_seeds_and_trials():
    rng = np.random.default_rng(0)
    one = {(0, f"t{i}"): float(rng.random() < 0.5) for i in range(200)}
    mean, low, high = clustered_interval(one)
    assert mean == pytest.approx(np.mean(list(one.values())))
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(mean * (1 - mean) / 200), rel=0.1)
    apart = {(seed, f"t{i}"): float(seed) for seed in (0, 1) for i in range(200)}  # all variation is between seeds
    assert clustered_interval(apart) == (0.5, 0.0, 1.0)


def test_an_arm_is_compared_with_what_it_differs_from_in_one_setting():
    listed = "wam agra wam_short agra_short wam_short_no_video_loss agra_short_no_video_loss wam_few agra_few agra_both"
    names = dict.fromkeys(f"{listed} wam_both agra_short_irepa freeze_short".split(), ())
    assert references("wam", names) == []
    assert references("agra", names) == ["wam"]
    assert references("agra_short_no_video_loss", names) == ["wam_short_no_video_loss", "agra_short"]
    assert references("agra_both", names) == ["wam_both", "agra_few"]
    assert references("agra_short_irepa", names) == ["agra_short"]
    assert references("freeze_short", names) == ["wam_short"]
