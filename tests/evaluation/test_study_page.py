"""The arms of runs/study.py."""

from agra.evaluation.measured import MeasuredRow
from runs.study import _differences, interaction, references
from tests.evaluation.test_results import make_results


def test_an_arm_is_compared_with_what_it_differs_from_in_one_setting():
    listed = "wam agra wam_short agra_short wam_short_no_video_loss agra_short_no_video_loss wam_few agra_few agra_both"
    names = dict.fromkeys(f"{listed} wam_both agra_short_irepa freeze_short".split(), ())
    assert references("wam", names) == []
    assert references("agra", names) == ["wam"]
    assert references("agra_short_no_video_loss", names) == ["wam_short_no_video_loss", "agra_short"]
    assert references("agra_both", names) == ["wam_both", "agra_few"]
    assert references("agra_short_irepa", names) == ["agra_short"]
    assert references("freeze_short", names) == ["wam_short"]


def test_the_difference_of_differences_pairs_four_arms_by_seed_and_trial():
    """Human data win AGRA two of four trials, and WAM one. Seed 1 has no row of one arm and does not count."""
    solved = {"agra_few": "1000", "agra_both": "1110", "wam_few": "1000", "wam_both": "1001"}
    arms = {
        name: [
            MeasuredRow(name=name, seed=seed, info={}, results=dict.fromkeys(("random", "zero"), results))
            for seed in ((0, 1, 2) if name != "wam_few" else (0, 2))
        ]
        for name, results in ((name, make_results(name, {"semantic": trials})) for name, trials in solved.items())
    }
    names = ("agra_both", "agra_few", "wam_both", "wam_few")
    values = interaction(arms, names, "zero")
    assert {seed for seed, _ in values} == {0, 2}
    assert [values[0, f"semantic/{i}"] for i in range(4)] == [0, 1, 1, -1]
    lines = {tuple(line[:3]): line[3:] for line in _differences(arms)[2:]}
    shown = lines["(agra_both minus agra_few) minus (wam_both minus wam_few)", "0, 2", "zero"]
    assert shown[0].startswith("+25.0 [")
    assert shown[1:] == ["+25, +25", ""]
    assert lines["agra_both minus agra_few", "0, 1, 2", "zero"][0].startswith("+50.0 [")
    assert interaction({name: arms[name] for name in names[:3]}, names, "zero") == {}
