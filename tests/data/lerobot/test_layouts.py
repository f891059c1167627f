"""Every layout, written by hand (`tests/support/layouts.py`), is read back with the same values."""

import json
import shutil

import numpy as np
import pytest

from agra.cli.arguments import recipe_arguments
from agra.config import RunConfig
from agra.data.config import SourceConfig
from agra.data.gr1 import KEYS, REPOSITORY, gr1_mixture, gr1_source, task_folder
from agra.data.gr1 import TASKS as GR1_TASKS
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.sampling.sampler import DataConfig
from agra.data.source import embodiment_stats, open_sources
from agra.recipes import compose
from agra.stages import Stage
from agra.training.plan import Machines
from tests.support.layouts import (
    CAMERAS,
    EPISODES,
    FPS,
    GR1_LENGTHS,
    LENGTHS,
    LEROBOT_WRITERS,
    TASKS,
    gr1_states,
    write_gr1,
)


@pytest.fixture(scope="module", params=LEROBOT_WRITERS)
def root(request, tmp_path_factory):
    return LEROBOT_WRITERS[request.param](tmp_path_factory.mktemp("layout") / "set")


def close(frames: np.ndarray, expected: np.ndarray) -> bool:
    return frames.shape == expected.shape and np.abs(frames.astype(int) - expected).mean() < 4


def test_values_are_read_back(root):
    for camera in CAMERAS:
        dataset = LeRobotDataset(root, camera=camera)
        assert (dataset.num_episodes, dataset.fps, dataset.embodiment) == (3, FPS, "bot")
        assert dataset.lengths.tolist() == list(LENGTHS)
        assert dataset.state_names == ("s0", "s1", "s2", "s3", "s4", "s5")
        assert dataset.action_names == ("0", "1", "2", "3", "4")
        for index in (2, 0, 1):
            episode, expected = dataset.episode(index), EPISODES[index]
            assert np.array_equal(episode.states, expected.states)
            assert np.array_equal(episode.actions, expected.actions)
            assert episode.instruction == TASKS[expected.task]
            assert close(episode.frames, expected.frames[camera])


def test_a_clip_is_what_the_episode_shows(root):
    dataset = LeRobotDataset(root, camera=CAMERAS[0])
    for index, length in enumerate(LENGTHS):
        steps = np.array([1, 3, length - 1, length - 1])
        assert np.array_equal(dataset.clip(index, steps, threads=1), dataset.frames(index)[steps])


def test_cameras_side_by_side_and_cropped(root):
    source = SourceConfig(camera=CAMERAS[0], extra_cameras=(CAMERAS[1],))
    tiled = LeRobotDataset(root, source=source).frames(2)
    assert tiled.shape == (9, 32, 96, 3)
    assert close(tiled[:, :, :48], EPISODES[2].frames[CAMERAS[0]])
    assert close(tiled[:, :, 48:], EPISODES[2].frames[CAMERAS[1]].repeat(2, 1).repeat(2, 2))
    source = SourceConfig(camera=CAMERAS[0], crop_rows=(4, 30), crop_columns=(10, 48))
    assert close(LeRobotDataset(root, source=source).frames(1), EPISODES[1].frames[CAMERAS[0]][:, 4:30, 10:48])
    source = SourceConfig(camera=CAMERAS[0], crop_rows=(4, 33))
    with pytest.raises(ValueError, match=r"front: data\.crop_rows is 4 to 33, but the frames have 32 rows"):
        LeRobotDataset(root, source=source).frames(1)


def test_sizes_of_cameras_are_those_before_the_crop(root):
    source = SourceConfig(camera=CAMERAS[0], extra_cameras=(CAMERAS[1],), crop_rows=(4, 16))
    cameras = LeRobotDataset(root, source=source).cameras
    assert cameras.sizes(cameras.layout.entries[1]) == {CAMERAS[0]: (32, 48), CAMERAS[1]: (16, 24)}


def test_a_camera_has_to_be_named(root):
    with pytest.raises(ValueError, match=f"choose one camera with data.camera; available: {CAMERAS[0]}, {CAMERAS[1]}"):
        LeRobotDataset(root)
    with pytest.raises(ValueError, match=f"no camera 'top'; available: {CAMERAS[0]}, {CAMERAS[1]}"):
        LeRobotDataset(root, camera="top")


def test_prefixes_come_off(root):
    dataset = LeRobotDataset(root, source=SourceConfig(camera=CAMERAS[0], strip_prefixes=("unlocked_waist: ",)))
    assert [dataset.instruction(i) for i in range(3)] == ["pick the apple", "nimm den Apfel — 苹果", "pick the apple"]


@pytest.fixture(scope="module")
def gr1(tmp_path_factory):
    return write_gr1(tmp_path_factory.mktemp("gr1") / "set")


def test_gr1_numbers(gr1):
    """29 of 44 dimensions in the order of docs/paper.md #30, sines before cosines key by key, actions from min to max."""
    config = DataConfig(
        path=str(gr1.parent), mixture=(gr1_source(gr1.name),), embodiments=("gr1",), validation_fraction=0
    )
    (source,) = open_sources(config)
    dataset, stats = source.dataset, embodiment_stats([source])["gr1"]
    order = [*range(7), *range(22, 29), *range(7, 13), *range(29, 35), *range(41, 44)]
    assert len(order) == 29
    for index, length in enumerate(GR1_LENGTHS):
        states = gr1_states(index, length)[:, order]
        np.testing.assert_allclose(dataset.states(index), states, atol=1e-6)
        encoded = stats.normalize("state", dataset.states(index))
        blocks, start = [], 0
        for size in (7, 7, 6, 6, 3):
            angles = states[:, start : start + size]
            blocks += [np.sin(angles), np.cos(angles)]
            start += size
        np.testing.assert_allclose(encoded, np.concatenate(blocks, 1), atol=1e-6)
        # Over the set, a dimension goes from its .01 d + .5 to .01 d + .5 + 2.4: episode 2 ends at step 4.
        actions = stats.normalize("action", dataset.actions(index))
        expected = (0.1 * np.arange(length) + index) / 2.4 * 2 - 1
        np.testing.assert_allclose(actions, np.repeat(expected[:, None], 29, 1), atol=1e-5)
        np.testing.assert_allclose(stats.unnormalize("action", actions), dataset.actions(index), atol=1e-6)
        assert dataset.instruction(index) == "pick the can"
    assert (stats.width("state"), stats.width("action"), dataset.fps, dataset.embodiment) == (58, 29, 20, "gr1")
    assert dataset.action_names[:8] == tuple(f"motor_{i}" for i in (*range(7), 22))


def test_gr1_frames_have_no_padding(gr1):
    frames = LeRobotDataset(gr1, source=gr1_source("")).frames(1)
    assert frames.shape == (8, 170, 256, 3)
    shades = frames.reshape(8, -1).astype(float)
    assert np.abs(shades.mean(1) - (80 + 12 * np.arange(8))).max() < 3
    assert shades.min() > 40  # the bars are black; what compression bleeds over their edge is not


def test_gr1_mixture():
    assert len(GR1_TASKS) == len(set(GR1_TASKS)) == 24
    few, full = gr1_mixture(few_shot=True), gr1_mixture()
    assert sum(source.training_episodes or 0 for source in few) == 2400
    assert {source.training_episodes for source in full} == {None}
    assert full[0].path == "gr1_unified.PnPBottleToCabinetClose_GR1ArmsAndWaistFourierHands_1000"
    assert few[0].keys("action") == tuple((key, "min_max") for key in KEYS)


@pytest.mark.parametrize(("preset", "steps"), [("gr1", 80_000), ("gr1_few_shot", 40_000)])
def test_a_gr1_run_is_named_by_its_preset(gr1, tmp_path, monkeypatch, preset, steps):
    """From the command line to windows' statistics, on a stand-in for each of the 24 folders."""
    for task in GR1_TASKS:
        (tmp_path / task_folder(task)).symlink_to(gr1)
    monkeypatch.setattr("agra.data.gr1.FEW_SHOT", 1)
    flags = ["agra_dino_l8", "--with", preset, "--data.path", str(tmp_path), "--gpus", "8"]
    _, config = recipe_arguments("plan", flags, Machines)
    assert RunConfig.from_json(config.to_json()) == config
    assert config.stage.steps == steps
    sources = open_sources(config.data)
    assert [source.dataset.path.name for source in sources] == [task_folder(task) for task in GR1_TASKS]
    trained = {"gr1": range(len(GR1_LENGTHS) - 1), "gr1_few_shot": range(1)}[preset]
    assert {source.training for source in sources} == {trained}
    stats, head = embodiment_stats(sources)["gr1"], config.method.model.action_dit
    assert (stats.width("state"), stats.width("action")) == (58, 29)
    assert (head.state_dim, head.action_dim, head.horizon) == (64, 32, 16)
    assert compose("agra_dino_l8", Stage.JOINT, [preset]).data.path == REPOSITORY


def test_annotations_and_modality_names(gr1):
    described = SourceConfig(
        camera="ego_view", instruction_key="human.action.task_description", state=("waist", "neck")
    )
    dataset = LeRobotDataset(gr1, source=described)
    assert dataset.instruction(0) == "pick the can from the plate and place it in the pan"
    assert dataset.states(0).shape == (6, 6)
    with pytest.raises(
        ValueError, match=r"no column 'human\.colour' of task numbers; available: task_index, annotation"
    ):
        LeRobotDataset(gr1, source=SourceConfig(instruction_key="human.colour"))
    with pytest.raises(ValueError, match="no action key or column 'tail'; available keys: left_arm, left_hand"):
        LeRobotDataset(gr1, source=SourceConfig(action=("tail",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"arm": {"start": 40, "end": 45}}}, "'arm' spans 40 to 45 of 'observation.state', which has 44"),
        (
            {"state": {"arm": {"start": 0, "end": 4, "rotation_type": "axis_angle"}}},
            "'arm': rotation_type axis_angle has 3 dimensions, got 4",
        ),
        ({"state": {"arm": {"start": 0, "end": 3, "rotation_type": "spin"}}}, "'arm': rotation type: expected one of"),
        ({"video": {"ego": {"original_key": "observation.images.none"}}}, "'ego': the feature"),
        ({"state": []}, "'state': expected an object of objects"),
    ],
)
def test_a_wrong_modality_is_named(gr1, tmp_path, change, message):
    shutil.copytree(gr1, tmp_path / "set")
    path = tmp_path / "set/meta/modality.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as raised:
        LeRobotDataset(tmp_path / "set", camera="observation.images.ego_view")
    assert "modality.json" in str(raised.value)
