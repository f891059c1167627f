"""Policies of which it is known whether they look, and the measures that must tell."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agra.diagnostics.visual_reliance import (
    InitialObservation,
    VisualReliance,
    Swaps,
    VisualRelianceConfig,
    groups_by_instruction,
    look,
    observations,
    rivals,
)
from agra.diagnostics.monitors.visual_reliance import VisualRelianceMonitor
from agra.types import ActionChunk, Observation
from agra.wam.model import WAM

NAMES = ("hand_x", "hand_y", "grip")
COLOURS = {"red": 0, "green": 1}


def scene(places):
    """Each colour's dot at its place (x, y) in pixels, on grey."""
    frame = np.full((40, 60, 3), 90, np.uint8)
    for colour, (x, y) in places.items():
        frame[y, x] = 0
        frame[y, x, COLOURS[colour]] = 255
    return frame


def first_look(places, colour, trial):
    observation = Observation(
        frame=scene(places), state=np.zeros(3, np.float32), instruction=f"take the {colour} one", embodiment="dot"
    )
    actions = np.zeros((12, 3), np.float32)
    actions[:, :2] = np.array(places[colour]) / 100
    return InitialObservation(trial=trial, group="take", observation=observation, actions=actions)


@pytest.fixture
def looks():
    rng = np.random.default_rng(0)
    found = []
    for i in range(20):
        places = {c: (int(rng.integers(60)), int(rng.integers(20) + 20 * k)) for k, c in enumerate(COLOURS)}
        found += [first_look(places, colour, f"{i}/{colour}") for colour in COLOURS]
    return found


class Dotter:
    """Goes to a dot: the one that it is told, or always the red one; or, blind, to the same place ever."""

    def __init__(self, *, sees=True, listens=True):
        self.sees, self.listens = sees, listens

    def reset(self, seed):
        pass

    def act(self, observation):
        colour = "green" if self.listens and "green" in observation.instruction else "red"
        bright = observation.frame[..., COLOURS[colour]] == 255
        place = np.argwhere(bright)[0, ::-1] / 100 if self.sees and bright.any() else np.array([0.3, 0.2])
        return ActionChunk(actions=np.tile(np.append(place, 0), (8, 1)).astype(np.float32))


def test_a_policy_that_sees_and_listens(looks):
    means = look(Dotter(), looks, NAMES, VisualRelianceConfig()).means()
    assert means["error"] == pytest.approx(0, abs=1e-6)
    assert means["constant_error"] > 0.1
    assert means["image_swap_shift"] > 0.1
    assert means["image_mask_shift"] > 0.1
    assert means["instruction_swap_shift"] > 0.1
    assert means["follows_instruction"] == 1


def test_a_blind_policy_is_no_better_than_a_constant(looks):
    means = look(Dotter(sees=False), looks, NAMES, VisualRelianceConfig()).means()
    assert means["image_swap_shift"] == means["image_mask_shift"] == means["instruction_swap_shift"] == 0
    assert means["error"] > 0.9 * means["constant_error"]


def test_a_deaf_policy_moves_with_the_image_only(looks):
    means = look(Dotter(listens=False), looks, NAMES, VisualRelianceConfig()).means()
    assert means["instruction_swap_shift"] == 0
    assert means["follows_instruction"] == 0.5  # right for the scenes in which the rival is the red one
    assert means["image_swap_shift"] > 0.1


def test_constant_is_the_mean_of_the_others_in_the_group():
    wanted = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    swaps = Swaps.of(["a", "a", "b"], ["x", "y", "z"], {})
    nothing = dict.fromkeys(("seen", "image_swapped", "image_masked", "instruction_swapped"), wanted)
    found = VisualReliance.of(nothing, wanted, swaps, trials=["0", "1", "2"], groups=["a", "a", "b"]).values
    np.testing.assert_allclose(found["constant_error"], [1, 1, np.nan])
    np.testing.assert_allclose(found["image_swap_shift"], [0, 0, np.nan])  # the third is alone: nothing to swap with


def test_swaps_stay_within_the_group_and_rivals_share_the_scene(looks):
    groups = ["left"] * 10 + ["right"] * 30
    found = Swaps.of(groups, [x.observation.instruction for x in looks], rivals(looks))
    assert all(groups[row] == groups[other] and row != other for row, other in enumerate(found.image))
    assert len(found.rival) == 40
    for row, other in found.rival.items():
        assert looks[row].trial.split("/")[0] == looks[other].trial.split("/")[0]
    shown = observations(looks, found)
    assert shown["image_masked"][0].frame.std() == 0
    assert shown["instruction_swapped"][0].instruction == "take the green one"
    np.testing.assert_array_equal(shown["instruction_swapped"][0].frame, looks[0].observation.frame)
    same = Swaps.of(["a"] * 4, ["x"] * 4, {})
    np.testing.assert_array_equal(same.instruction, np.arange(4))


def test_groups_by_instruction():
    assert groups_by_instruction(["a"] * 8 + ["b", "c"]) == ["a"] * 8 + ["other", "other"]


def test_what_is_not_there_is_named(looks):
    with pytest.raises(ValueError, match=r"name none of the actions \('hand_x', 'hand_y', 'grip'\)"):
        look(Dotter(), looks, NAMES, VisualRelianceConfig(dimensions=("arm_*",)))
    with pytest.raises(ValueError, match="no first looks"):
        look(Dotter(), [], NAMES, VisualRelianceConfig())
    with pytest.raises(ValueError, match="looking"):
        VisualRelianceConfig(step=-1)


def test_a_short_episode_ends_at_its_last_action(looks):
    short = [replace(x, actions=x.actions[:3]) for x in looks]
    assert look(Dotter(), short, NAMES, VisualRelianceConfig()).means()["error"] == pytest.approx(0, abs=1e-6)


def test_looking_survives_the_round_trip(looks, tmp_path):
    found = look(Dotter(), looks[:1] + looks[2:], NAMES, VisualRelianceConfig())
    found.save(tmp_path / "visual_reliance.json")
    again = VisualReliance.load(tmp_path / "visual_reliance.json")
    assert (again.trials, again.groups) == (found.trials, found.groups)
    for name, values in found.values.items():
        np.testing.assert_array_equal(again.values[name], values)
    (tmp_path / "visual_reliance.json").write_text('{"trials": ["a"], "groups": ["b"], "values": {}}')
    with pytest.raises(ValueError, match="expected a value of each of error"):
        VisualReliance.load(tmp_path / "visual_reliance.json")


def test_the_monitor_tells_the_same_and_leaves_the_model_as_it_was(small_config, make_batch):
    torch.manual_seed(0)
    wam, batch = WAM(small_config.model).train(), make_batch(small_config, 12)
    monitor = VisualRelianceMonitor(batch, ["go"] * 12, lambda actions: actions[:, 1, :2].numpy())
    before = torch.get_rng_state()
    first, second = monitor(wam), monitor(wam)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())
    assert wam.training
    assert first["image_swap_shift"] > 0
    assert first["error_ratio"] == pytest.approx(first["error"] / first["constant_error"])
    assert "instruction_swap_shift" not in first  # all have the same
    with torch.no_grad():
        wam.video_dit.transformer.patch_embed.proj.weight.zero_()
    blind = monitor(wam)
    assert blind["image_swap_shift"] == pytest.approx(0, abs=1e-6)


def test_the_target_is_planar_where_it_can_be_and_else_the_whole_action():
    assert VisualRelianceConfig().select(("left_x", "left_y", "left_z", "grip")) == [0, 1]
    assert VisualRelianceConfig().select(("dx", "dy", "grip")) == [0, 1, 2]
    assert VisualRelianceConfig(dimensions=("d?",)).select(("dx", "dy", "grip")) == [0, 1]
