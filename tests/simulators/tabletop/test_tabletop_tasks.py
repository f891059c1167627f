"""The trial lists are the protocol of C.2.2."""

import json
from collections import Counter
from itertools import product

import pytest

from agra.simulators.tabletop.models.colours import DEFAULT_TABLECLOTH
from agra.simulators.tabletop.models.furniture import NOVEL_PLATES
from agra.simulators.tabletop.models.items import NOVEL, SEEN
from agra.simulators.tabletop.models.steamer import NOVEL_BUNS, TRAINING_BUNS
from agra.simulators.tabletop.tabletop_tasks import training_trials, trials
from agra.types import REGIMES

SEEN_NAMES, NOVEL_NAMES = {item.name for item in SEEN}, {item.name for item in NOVEL}


def targets(regime):
    return Counter(trial.scene["target"]["name"] for trial in trials(regime))


def test_in_distribution_is_ten_seen_objects_at_five_places():
    assert targets("in_distribution") == dict.fromkeys(SEEN_NAMES, 5)
    assert len(SEEN_NAMES) == 10
    assert len({tuple(t.scene["target"]["position"]) for t in trials("in_distribution")}) == 5


def test_instance_is_ten_novel_objects_at_the_same_places():
    assert targets("instance") == dict.fromkeys(NOVEL_NAMES, 5)
    assert len(NOVEL_NAMES) == 10
    places = [{tuple(t.scene["target"]["position"]) for t in trials(r)} for r in ("in_distribution", "instance")]
    assert places[0] == places[1]


def test_semantic_asks_for_both_things_at_both_places():
    scenarios = {}
    for trial in trials("semantic"):
        scenarios.setdefault(trial.name.split("/")[1], []).append(trial)
    assert len(scenarios) == 10
    assert sum(name.startswith("pick") for name in scenarios) == 8
    for name, four in scenarios.items():
        assert len({(t.instruction, json.dumps([t.scene["distractors"], t.scene["containers"]])) for t in four}) == 4, (
            name
        )
        assert len({t.instruction for t in four}) == 2
        placed = [
            {
                p["name"]: tuple(p["position"])
                for p in (t.scene["target"], *t.scene["distractors"], *t.scene["containers"])
            }
            for t in four
        ]
        assert len({json.dumps(p, sort_keys=True) for p in placed}) == 2  # two layouts, and nothing new in either
        assert {frozenset(p) for p in placed} == {frozenset(placed[0])}


def test_attribute_is_eight_buns_on_five_settings():
    listed = trials("attribute")
    buns = {item.name for item in NOVEL_BUNS}
    plates = {
        (t.scene["target"]["name"], t.scene["goal"]) for t in listed if t.scene["tablecloth"] == DEFAULT_TABLECLOTH
    }
    assert plates == set(product(buns, [plate.name for plate in NOVEL_PLATES]))
    clothed = [t for t in listed if t.scene["tablecloth"] != DEFAULT_TABLECLOTH]
    assert {t.scene["target"]["name"] for t in clothed} == buns
    assert len(clothed) == 8
    assert len({t.scene["tablecloth"] for t in clothed}) == 3


def test_training_scenes_hold_nothing_novel():
    names = SEEN_NAMES | {bun.name for bun in TRAINING_BUNS}
    listed = training_trials(400, 3)
    for trial in listed:
        assert trial.scene["tablecloth"] == DEFAULT_TABLECLOTH
        assert {trial.scene["target"]["name"], *(d["name"] for d in trial.scene["distractors"])} <= names
    steamers = sum("steamer" in trial.scene for trial in listed)
    assert 70 < steamers < 130  # a quarter of 400, three sigma
    assert {trial.scene["target"]["name"] for trial in listed} == names


def test_training_trial_depends_on_seed_and_index_only():
    assert training_trials(5, 1) == training_trials(9, 1)[:5]
    assert training_trials(5, 1) != training_trials(5, 2)


def test_trials_are_plain_data():
    for regime in REGIMES:
        for trial in trials(regime):
            assert json.loads(json.dumps(trial.scene)) == trial.scene


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="unknown regime 'novel'; available: in_distribution"):
        trials("novel")
    with pytest.raises(ValueError, match="steamer_fraction"):
        training_trials(1, 0, steamer_fraction=2.0)
