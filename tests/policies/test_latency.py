"""`agra bench-latency`: the stages of every path."""

import json

import numpy as np
import pytest

from agra.cli.main import main
from agra.policies.latency import measure, paths, random_policy
from agra.policies.load import load_policy
from agra.recipes import compose
from agra.stages import Stage
from agra.types import Observation


def test_a_checkpoint_by_stage(tmp_path, capsys):
    output = tmp_path / "latency.json"
    main(["bench-latency", "tabletop-agra", "--rounds", "1", "--pool-future", "2", "--output", str(output)])
    found = json.loads(output.read_text())
    assert list(found["ms"]) == ["plain", "fast", "pooled"]
    for stages in found["ms"].values():
        assert list(stages) == ["text", "codec", "video", "bridge", "action", "total"]
        assert all(0 <= p50 <= p95 for p50, p95 in stages.values())
    assert "pooled p50" in capsys.readouterr().out


def test_a_recipe_answers_with_random_weights(tmp_path):
    output = tmp_path / "latency.json"
    main(["bench-latency", "tiny", "--rounds", "1", "--batch", "2", "--output", str(output)])
    found = json.loads(output.read_text())
    assert list(found["ms"]) == ["plain", "fast"]
    assert list(found["ms"]["fast"]) == ["text", "codec", "video", "bridge", "action", "total"]


@pytest.mark.parametrize("recipe", ["tiny_vla", "tiny_flare", "tiny_lda_scratch"])
def test_recipes_that_read_a_vision_encoder_are_timed(recipe):
    policy = random_policy(compose(recipe, Stage.JOINT))
    chunk = policy.act(policy.blank_observation())
    assert np.isfinite(chunk.actions).all()


def test_calls_are_counted_after_two_that_are_not():
    calls = []

    def way(name):
        return lambda: calls.append(name) or {"stage": float(len(calls))}

    found = measure({"a": way("a"), "b": way("b")}, rounds=3)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    np.testing.assert_array_equal(found["a"].calls["stage"], [5, 8, 9])
    np.testing.assert_array_equal(found["a"].calls["total"], found["a"].calls["stage"])
    assert found["a"].milliseconds("stage", 50) == 8000
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure({}, rounds=0)


def test_compared_paths():
    assert list(paths()) == ["plain", "fast"]
    assert list(paths(compiled=True)) == ["plain", "fast", "compiled"]
    assert paths(pool_future=2, compiled=True)["pooled"] == {"pool_future": 2, "compiled": True}


def test_pooling_belongs_to_the_fast_path_and_moves_an_answer_little():
    with pytest.raises(ValueError, match="need the fast path"):
        load_policy("tabletop-agra", fast=False, pool_future=2)
    answers = []
    for pool_future in (1, 2):
        policy = load_policy("tabletop-agra", pool_future=pool_future, action_noise="random")
        embodiment = next(iter(policy.stats))
        policy.reset(0)
        observation = Observation(
            frame=np.random.default_rng(0).integers(0, 256, (128, 224, 3), dtype=np.uint8),
            state=np.asarray(policy.stats[embodiment].state["mean"], np.float32),
            instruction="put the banana on the plate",
            embodiment=embodiment,
        )
        answers.append(policy.normalize(policy.act(observation).actions, embodiment))
    moved = np.abs(answers[1] - answers[0]).max()
    assert 0 < moved < 0.5
