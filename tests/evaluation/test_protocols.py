from dataclasses import replace

import pytest

from agra.evaluation.protocols import Protocol, default_protocol, regime_trials
from agra.types import REGIMES
from tests.support.point_world import COUNTS, PointWorld


def test_full_lists_are_the_paper_s():
    """C.2.2."""
    trials = regime_trials(PointWorld())
    counts = {regime: sum(trial.regime == regime for trial in trials) for regime in REGIMES}
    assert counts == COUNTS == dict(zip(REGIMES, (50, 40, 50, 40), strict=True))


def test_a_limit_is_spread_evenly_and_always_the_same():
    trials = regime_trials(PointWorld(), ["attribute", "in_distribution"], limit=5)
    assert [trial.name[-2:] for trial in trials] == ["00", "08", "16", "24", "32", "00", "10", "20", "30", "40"]
    assert [trial.regime for trial in trials] == ["attribute"] * 5 + ["in_distribution"] * 5
    assert trials == regime_trials(PointWorld(), ["attribute", "in_distribution"], limit=5)
    assert len(regime_trials(PointWorld(), ["semantic"], limit=1000)) == 40


class TwoTasks(PointWorld):
    """Every third trial is of the task `odd`."""

    def trials(self, regime):
        return [replace(t, task="odd" if i % 3 == 2 else "even") for i, t in enumerate(super().trials(regime))]


def test_tasks_are_chosen_before_the_limit():
    trials = regime_trials(TwoTasks(), ["in_distribution"], tasks=["odd"])
    assert [trial.name[-2:] for trial in trials] == [f"{number:02d}" for number in range(2, 50, 3)]
    limited = regime_trials(TwoTasks(), ["in_distribution"], tasks=["odd"], limit=4)
    assert limited == trials[::4]
    both = regime_trials(TwoTasks(), ["in_distribution"], tasks=["odd", "even"])
    assert both == regime_trials(TwoTasks(), ["in_distribution"])
    with pytest.raises(ValueError, match="unknown task 'add' of regime 'in_distribution'; available: even, odd"):
        regime_trials(TwoTasks(), ["in_distribution"], tasks=["add"])


def test_errors():
    with pytest.raises(ValueError, match="unknown regime 'unseen'; available: in_distribution, semantic"):
        regime_trials(PointWorld(), ["unseen"])
    with pytest.raises(ValueError, match="limit: expected at least 1"):
        regime_trials(PointWorld(), limit=0)

    class Twice(PointWorld):
        def trials(self, regime):
            return [replace(trial, name="same") for trial in super().trials(regime)]

    with pytest.raises(ValueError, match="'same' occurs more than once"):
        regime_trials(Twice())


def test_robocasas_protocol_is_its_communitys():
    robocasa, tabletop = default_protocol("robocasa_gr1"), default_protocol("tabletop")
    assert (robocasa.execute_steps, robocasa.termination) == (16, "chunk")
    assert (tabletop.execute_steps, tabletop.termination) == (8, "step")


@pytest.mark.parametrize("change", [{"execute_steps": 0}, {"max_steps": 0}, {"termination": "end"}])
def test_protocol_is_checked(change):
    with pytest.raises(ValueError, match=f"Protocol.{next(iter(change))}"):
        Protocol(**change)
