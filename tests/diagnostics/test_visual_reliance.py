"""Measures of visual reliance, on policies that are known to use the image and the instruction, or not."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from agra.diagnostics.visual_reliance import (
    EarlierInstrument,
    InitialObservation,
    Swaps,
    VisualReliance,
    VisualRelianceConfig,
    geometric_median,
    groups_by_instruction,
    measure_visual_reliance,
    observations,
    rivals,
)
from agra.types import ActionChunk, Episode, Observation

NAMES = ("hand_x", "hand_y", "grip")
COLOURS = {"red": 0, "green": 1}


def scene(places):
    """Each colour's dot at its place (x, y) in pixels, on grey."""
    frame = np.full((40, 60, 3), 90, np.uint8)
    for colour, (x, y) in places.items():
        frame[y, x] = 0
        frame[y, x, COLOURS[colour]] = 255
    return frame


def initial_observation(places, colour, trial):
    observation = Observation(
        frame=scene(places), state=np.zeros(3, np.float32), instruction=f"take the {colour} one", embodiment="dot"
    )
    actions = np.zeros((12, 3), np.float32)
    actions[:, :2] = np.array(places[colour]) / 100
    return InitialObservation(trial=trial, group="take", observation=observation, actions=actions)


@pytest.fixture
def initial():
    rng = np.random.default_rng(0)
    observations = []
    for i in range(20):
        places = {c: (int(rng.integers(60)), int(rng.integers(20) + 20 * k)) for k, c in enumerate(COLOURS)}
        observations += [initial_observation(places, colour, f"{i}/{colour}") for colour in COLOURS]
    return observations


class Dotter:
    """Goes to the dot of the instruction, or always to the red dot. Without the image it goes to a fixed place."""

    def __init__(self, *, uses_image=True, uses_instruction=True):
        self.uses_image, self.uses_instruction = uses_image, uses_instruction

    def reset(self, seed):
        pass

    def act(self, observation):
        colour = "green" if self.uses_instruction and "green" in observation.instruction else "red"
        bright = observation.frame[..., COLOURS[colour]] == 255
        place = np.argwhere(bright)[0, ::-1] / 100 if self.uses_image and bright.any() else np.array([0.3, 0.2])
        return ActionChunk(actions=np.tile(np.append(place, 0), (8, 1)).astype(np.float32))


def test_a_policy_that_uses_image_and_instruction(initial):
    means = measure_visual_reliance(Dotter(), initial, NAMES, VisualRelianceConfig()).means()
    assert means["error"] == pytest.approx(0, abs=1e-6)
    assert means["constant_error"] > 0.1
    assert means["image_swap_shift"] > 0.1
    assert means["image_mask_shift"] > 0.1
    assert means["instruction_swap_shift"] > 0.1
    assert means["follows_instruction"] == 1


def test_a_policy_without_the_image_is_no_better_than_a_constant(initial):
    means = measure_visual_reliance(Dotter(uses_image=False), initial, NAMES, VisualRelianceConfig()).means()
    assert means["image_swap_shift"] == means["image_mask_shift"] == means["instruction_swap_shift"] == 0
    assert means["error"] > 0.9 * means["constant_error"]


def test_a_policy_without_the_instruction_moves_with_the_image_alone(initial):
    means = measure_visual_reliance(Dotter(uses_instruction=False), initial, NAMES, VisualRelianceConfig()).means()
    assert means["instruction_swap_shift"] == 0
    assert means["follows_instruction"] == 0.5  # right for the scenes in which the rival is the red one
    assert means["image_swap_shift"] > 0.1


def test_a_policy_that_reads_no_instruction_has_no_measure_of_it(initial):
    """Not applicable, and not a shift of zero."""
    policy = Dotter(uses_instruction=False)
    reliance = measure_visual_reliance(policy, initial, NAMES, VisualRelianceConfig(), reads_instruction=False)
    for name in ("instruction_swap_shift", "follows_instruction"):
        assert np.isnan(reliance.values[name]).all()
        assert name not in reliance.means()
    assert reliance.means()["image_swap_shift"] > 0.1


def test_constant_is_the_best_of_the_others_in_the_group():
    demonstrated = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    swaps = Swaps.of(["a", "a", "b"], ["x", "y", "z"], demonstrated, {})
    same = dict.fromkeys(("unchanged", "image_swapped", "image_masked", "instruction_swapped"), demonstrated)
    values = VisualReliance.of(same, demonstrated, swaps, trials=["0", "1", "2"], groups=["a", "a", "b"]).values
    np.testing.assert_allclose(values["constant_error"], [1, 1, np.nan])
    np.testing.assert_allclose(values["image_swap_shift"], [0, 0, np.nan])  # the third is alone: nothing to swap with
    np.testing.assert_allclose(values["demonstrated_swap_shift"], [1, 1, np.nan])


def test_no_point_is_nearer_than_the_geometric_median():
    points = np.concatenate([np.random.default_rng(0).normal(size=(40, 2)), [[30, 0], [30, 1]]])
    median = geometric_median(points)
    mean_distance = lambda point: np.linalg.norm(points - point, axis=-1).mean()  # noqa: E731
    assert mean_distance(median) < mean_distance(points.mean(axis=0)) - 0.1
    for direction in np.eye(2):
        assert mean_distance(median) < min(
            mean_distance(median + 0.01 * direction), mean_distance(median - 0.01 * direction)
        )
    assert geometric_median(np.ones((3, 2))) == pytest.approx(1)


def test_image_donors_have_other_targets_and_not_another_object_at_the_same_place():
    """Trials are listed object by object, each at the same five places."""
    places = np.random.default_rng(0).uniform(size=(5, 2))
    demonstrated = np.tile(places, (10, 1))
    swaps = Swaps.of(["a"] * 50, ["take it"] * 50, demonstrated, {})
    assert sorted(swaps.image) == list(range(50))
    moved = np.linalg.norm(demonstrated[swaps.image] - demonstrated, axis=-1)
    pairs = np.linalg.norm(places[:, None] - places, axis=-1)
    assert moved.mean() > pairs.sum() / 20  # the mean over pairs of different places
    assert moved.min() > 0


def test_rows_with_one_target_exchange_images_too():
    for demonstrated in (np.ones((4, 2)), np.full((4, 2), np.nan)):
        swaps = Swaps.of(["a"] * 4, ["take it"] * 4, demonstrated, {})
        assert (swaps.image != np.arange(4)).all()


def test_constants_of_a_large_group_are_its_median():
    demonstrated = np.random.default_rng(0).normal(size=(300, 2))
    groups = ["a"] * 300
    swaps = Swaps.of(groups, groups, demonstrated, {})
    reliance = VisualReliance.of({"unchanged": demonstrated}, demonstrated, swaps, trials=groups, groups=groups)
    distance = np.linalg.norm(demonstrated - geometric_median(demonstrated), axis=-1)
    np.testing.assert_allclose(reliance.values["constant_error"], distance)


def test_the_noise_is_the_trials_own_and_that_of_all_its_variants(initial):
    class Noise:
        seeds: ClassVar[set[int]] = set()

        def reset(self, seed):
            self.seeds.add(seed)
            self.draw = np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32)

        def act(self, observation):
            return ActionChunk(actions=self.draw)

    reliance = measure_visual_reliance(Noise(), initial, NAMES, VisualRelianceConfig())
    for name in ("image_swap_shift", "image_mask_shift", "instruction_swap_shift"):
        assert (reliance.values[name] == 0).all()
    assert len(Noise.seeds) == len(initial)


def test_swaps_stay_within_the_group_and_rivals_share_the_scene(initial):
    groups = ["left"] * 10 + ["right"] * 30
    demonstrated = np.stack([VisualRelianceConfig().target(x.actions, NAMES) for x in initial])
    swaps = Swaps.of(groups, [x.observation.instruction for x in initial], demonstrated, rivals(initial))
    assert all(groups[row] == groups[other] and row != other for row, other in enumerate(swaps.image))
    assert len(swaps.rival) == 40
    for row, other in swaps.rival.items():
        assert initial[row].trial.split("/")[0] == initial[other].trial.split("/")[0]
    shown = observations(initial, swaps)
    assert shown["image_masked"][0].frame.std() == 0
    assert shown["instruction_swapped"][0].instruction == "take the green one"
    np.testing.assert_array_equal(shown["instruction_swapped"][0].frame, initial[0].observation.frame)
    assert all(swaps.rival[row] != other for row, other in enumerate(swaps.image))
    same = Swaps.of(["a"] * 4, ["x"] * 4, demonstrated[:4], {})
    np.testing.assert_array_equal(same.instruction, np.arange(4))


def test_an_initial_observation_holds_all_cameras_of_the_dataset():
    frames, rows = np.zeros((2, 40, 60, 3), np.uint8), np.zeros((2, 3), np.float32)
    episode = Episode(frames=frames, states=rows, actions=rows, instruction="go", embodiment="dot", fps=10)
    assert InitialObservation.of(episode, trial="0", group="go").observation.joined


def test_groups_by_instruction():
    assert groups_by_instruction(["a"] * 8 + ["b", "c"]) == ["a"] * 8 + ["other", "other"]


def test_bad_settings_are_named(initial):
    with pytest.raises(ValueError, match=r"match none of the actions; choose among \('hand_x', 'hand_y', 'grip'\)"):
        measure_visual_reliance(Dotter(), initial, NAMES, VisualRelianceConfig(dimensions=("arm_*",)))
    with pytest.raises(ValueError, match="no initial observations"):
        measure_visual_reliance(Dotter(), [], NAMES, VisualRelianceConfig())
    with pytest.raises(ValueError, match=r"visual_reliance\.step"):
        VisualRelianceConfig(step=-1)


def test_a_short_episode_ends_at_its_last_action(initial):
    short = [replace(x, actions=x.actions[:3]) for x in initial]
    assert measure_visual_reliance(Dotter(), short, NAMES, VisualRelianceConfig()).means()["error"] == pytest.approx(
        0, abs=1e-6
    )


def test_visual_reliance_survives_the_round_trip(initial, tmp_path):
    reliance = measure_visual_reliance(Dotter(), initial[:1] + initial[2:], NAMES, VisualRelianceConfig())
    reliance.save(tmp_path / "visual_reliance.json")
    again = VisualReliance.load(tmp_path / "visual_reliance.json")
    assert (again.trials, again.groups) == (reliance.trials, reliance.groups)
    for name, values in reliance.values.items():
        np.testing.assert_array_equal(again.values[name], values)
    (tmp_path / "visual_reliance.json").write_text('{"trials": ["a"], "groups": ["b"], "values": {"error": [1]}}')
    with pytest.raises(EarlierInstrument, match="was measured by an earlier version; diagnose the policy again"):
        VisualReliance.load(tmp_path / "visual_reliance.json")
    values = '{"demonstrated_swap_shift": [1]}'
    (tmp_path / "visual_reliance.json").write_text(f'{{"trials": ["a"], "groups": ["b"], "values": {values}}}')
    with pytest.raises(ValueError, match="expected a value of each of error"):
        VisualReliance.load(tmp_path / "visual_reliance.json")


def test_the_target_is_planar_where_it_can_be_and_else_the_whole_action():
    assert VisualRelianceConfig().select(("left_x", "left_y", "left_z", "grip")) == [0, 1]
    assert VisualRelianceConfig().select(("dx", "dy", "grip")) == [0, 1, 2]
    assert VisualRelianceConfig(dimensions=("d?",)).select(("dx", "dy", "grip")) == [0, 1]


def test_targets_of_displacements_are_their_sums():
    names = ("dx_0", "dy_0", "grip_0", "dx_1", "dy_1", "grip_1")
    actions = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    config = VisualRelianceConfig(dimensions=("dx_*", "dy_*"), displacement_unit=0.01, step=2)
    ours = config.target(actions, names)
    assert ours.shape == (2, 2)
    for row in range(2):
        for axis in range(2):
            asked = sum(float(actions[row, step, axis + 3 * part]) for step in range(3) for part in range(2))
            assert ours[row, axis] == pytest.approx(asked / 100, abs=1e-9)
    short = config.target(actions[0, :2], names)  # an episode that ends before the step
    assert short[0] == pytest.approx(float(actions[0, :2, [0, 3]].sum()) / 100, abs=1e-6)
    assert VisualRelianceConfig(step=2).target(actions, names) == pytest.approx(actions[:, 2])
    assert VisualRelianceConfig(dimensions=("dx_*",), step=9).target(actions, names) == pytest.approx(
        actions[:, 4, [0, 3]]
    )
    with pytest.raises(ValueError, match="displacement_unit: expected a positive number and patterns in dimensions"):
        VisualRelianceConfig(displacement_unit=0.01)
