"""The arms of runs/study.py."""

from runs.study import references


def test_an_arm_is_compared_with_what_it_differs_from_in_one_setting():
    listed = "wam agra wam_short agra_short wam_short_no_video_loss agra_short_no_video_loss wam_few agra_few agra_both"
    names = dict.fromkeys(f"{listed} wam_both agra_short_irepa freeze_short".split(), ())
    assert references("wam", names) == []
    assert references("agra", names) == ["wam"]
    assert references("agra_short_no_video_loss", names) == ["wam_short_no_video_loss", "agra_short"]
    assert references("agra_both", names) == ["wam_both", "agra_few"]
    assert references("agra_short_irepa", names) == ["agra_short"]
    assert references("freeze_short", names) == ["wam_short"]
