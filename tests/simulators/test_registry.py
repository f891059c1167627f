import sys

import pytest

from agra.simulators import registry
from agra.types import Simulator


@pytest.mark.parametrize("name", ["tabletop", "tabletop_human"])
def test_every_registered_simulator_keeps_the_contract(name):
    """One conformance test over all that need no environment of their own: trials, shapes, ranges, masks, limits."""
    env = registry.make(name, frame_size=(32, 56))
    assert isinstance(env, Simulator)
    try:
        for regime, count in {"in_distribution": 50, "semantic": 40, "instance": 50, "attribute": 40}.items():
            trials = env.trials(regime)
            assert len(trials) == count
            assert len({trial.name for trial in trials}) == count
            assert {(trial.regime, trial.simulator) for trial in trials} == {(regime, name)}
            first = env.reset(trials[0])
            assert first.frame.shape == (32, 56, 3)
            assert first.state.shape == (len(env.embodiment.state_names),)
            assert (first.instruction, first.embodiment) == (trials[0].instruction, env.embodiment.name)
            step = env.step(registry.expert(env).act(first).actions[0])
            assert not step.success
            assert set(step.progress.values()) == {False}
            mask = env.interaction_mask()
            assert mask.shape == (32, 56)
            assert 0.002 < mask.mean() < 0.3
    finally:
        env.close()


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown simulator 'tabeltop'; did you mean 'tabletop'\?"):
        registry.make("tabeltop")


def test_no_expert():
    class Other:
        name = "robocasa_gr1"

    with pytest.raises(ValueError, match="robocasa_gr1: this simulator has no scripted expert"):
        registry.expert(Other())


@pytest.mark.parametrize("name", ["metaworld", "metaworld_20hz"])
def test_a_suite_s_own_environment_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    monkeypatch.delitem(sys.modules, "agra.simulators.metaworld.metaworld_env", raising=False)
    with pytest.raises(ImportError, match=rf"{name}: .*; install it with: make env-metaworld"):
        registry.make(name)


@pytest.mark.parametrize(
    ("name", "tasks"), [("tabletop", 2), ("tabletop_human", 2), ("metaworld", 50), ("metaworld_20hz", 50)]
)
def test_every_task_is_demonstrated(name, tasks):
    demonstrations = registry.suite(name).demonstrations
    assert len(set(demonstrations.tasks())) == tasks
    assert {trial.task for trial in demonstrations.trials(100, 0)} == set(demonstrations.tasks())
    assert demonstrations.trials(100, 3)[:20] == demonstrations.trials(20, 3)
