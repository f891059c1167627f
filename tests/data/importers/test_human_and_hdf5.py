"""EgoDex, robomimic and LIBERO, from files written by hand to datasets that train."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from agra.data.config import SourceConfig
from agra.data.importers.egodex import (
    KEYS,
    choose_instruction,
    convert_egodex,
    egodex_source,
    read_trajectory,
    wrist_pose,
)
from agra.data.importers.robomimic import convert_hdf5
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.sampling.sampler import DataConfig
from agra.data.source import embodiment_stats, open_sources
from tests.support.layouts import demonstration, write_egodex, write_hdf5

SIZE = (54, 96)


@pytest.fixture(scope="module")
def egodex(tmp_path_factory):
    return write_egodex(tmp_path_factory.mktemp("egodex"))


def test_a_trajectory_s_numbers(egodex):
    """Positions: y up becomes z up, z back becomes y forward. Rotations: columns by hand, for either side."""
    for index, length in ((0, 6), (1, 9)):
        episode = read_trajectory(egodex / f"basic_pick_place/{index}.hdf5", size=SIZE)
        assert episode.states.shape == (length - 1, 18)
        steps = np.arange(length - 1)
        for start, side, offset in ((0, "left", -0.2), (9, "right", 0.2)):
            own, angle = episode.states[:, start : start + 9], 0.1 * steps + 0.3 * index
            expected = np.stack([steps * 0 + offset, steps * 0 + 0.5 + 0.02 * index, 1 + 0.01 * steps], 1)
            np.testing.assert_allclose(own[:, :3], expected, atol=1e-6)
            # In x right, y up, z back the hand's first axis is (cos, 0, -sin), its second (0, 1, 0).
            first, second = (1, -1) if side == "left" else (-1, -1)
            x = first * np.stack([np.cos(angle), np.sin(angle), steps * 0], 1)
            np.testing.assert_allclose(own[:, 3:6], x, atol=1e-6)
            np.testing.assert_allclose(own[:, 6:9], np.tile([0, 0, second], (length - 1, 1)), atol=1e-6)
        np.testing.assert_array_equal(episode.actions[:-1], episode.states[1:])
        assert episode.frames.shape == (length - 1, *SIZE, 3)
        bar = (episode.frames[:, -3, :, 0] > 200).argmax(1)
        assert np.abs(bar - 2 * steps).max() <= 1  # the bar moves 4 pixels a step in a frame twice as wide


def test_which_instruction(egodex):
    instructions = [read_trajectory(egodex / f"basic_pick_place/{i}.hdf5", size=SIZE).instruction for i in (0, 1)]
    assert instructions == ["put the cup on the plate", "take the cup off the plate"]
    path = egodex / "x.hdf5"
    assert choose_instruction({"llm_description": "Fold.", "llm_description2": "Unfold."}, path) == "fold"
    with pytest.raises(ValueError, match=r"x\.hdf5: which_llm_description: expected '1' or '2', got '3'"):
        choose_instruction({"llm_type": "reversible", "which_llm_description": "3"}, path)
    with pytest.raises(ValueError, match=r"x\.hdf5: attribute 'llm_description': expected text"):
        choose_instruction({}, path)


def test_two_columns_make_dial_s_local_frames():
    """diag(1, -1, 1) and diag(-1, -1, -1) change the first two columns of the rotation, and those only."""
    turned = np.tile(np.eye(4), (1, 1, 1))
    world = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    for side, local in (("left", np.diag([1, -1, 1])), ("right", np.diag([-1, -1, -1]))):
        expected = (world @ local)[:, :2].T.ravel()
        np.testing.assert_array_equal(wrist_pose(turned, side)[0, 3:], expected)


def test_converted_and_normalised(egodex, tmp_path):
    convert_egodex(egodex, tmp_path / "human", size=SIZE)
    settings = egodex_source("human", crop_rows=(16, 54))
    config = DataConfig(path=str(tmp_path), mixture=(settings,), embodiments=("human_egodex",), validation_fraction=0)
    (source,) = open_sources(config)
    assert source.dataset.frames(0).shape == (5, 38, 96, 3)
    assert source.dataset.instruction(1) == "take the cup off the plate"
    stats = embodiment_stats([source])["human_egodex"]
    assert (stats.width("state"), stats.width("action")) == (18, 18)
    values = source.dataset.actions(1)
    encoded = stats.normalize("action", values)
    np.testing.assert_array_equal(encoded[:, 3:9], values[:, 3:9])  # rotations as they are
    everything = np.concatenate([source.dataset.actions(i) for i in (0, 1)]).astype(float)[:, 2]
    np.testing.assert_allclose(encoded[:, 2], (values[:, 2] - everything.mean()) / everything.std(), rtol=1e-5)
    np.testing.assert_allclose(stats.unnormalize("action", encoded), values, atol=1e-6)


def test_missing_keys_are_masked(egodex, tmp_path):
    """One embodiment for robot and human. The human dataset has no joints: zeros, masked, in no statistics."""
    convert_egodex(egodex, tmp_path / "human", size=SIZE)
    shutil.copytree(tmp_path / "human", tmp_path / "robot")
    (tmp_path / "robot/meta/checksums.json").unlink()
    keys = (KEYS[0] + ":mean_std", "joints")
    robot = SourceConfig(path="robot", embodiment="shared", state=(KEYS[0],), action=keys)
    # The fixture's "robot" calls the right wrist's position its joints.
    path = tmp_path / "robot/meta/modality.json"
    path.write_text(path.read_text().replace("right_wrist_position", "joints"))
    human = SourceConfig(path="human", embodiment="shared", state=(KEYS[0],), action=keys, missing_keys=("joints",))
    config = DataConfig(path=str(tmp_path), mixture=(human, robot), embodiments=("shared",), validation_fraction=0)
    sources = open_sources(config)
    assert sources[0].dataset.actions(0).shape == sources[1].dataset.actions(0).shape == (5, 6)
    assert (sources[0].dataset.actions(0)[:, 3:] == 0).all()
    stats = embodiment_stats(sources)["shared"]
    assert stats.mask("action", human.missing_keys).tolist() == [True] * 3 + [False] * 3
    joints = np.concatenate([sources[1].dataset.actions(i)[:, 3:] for i in (0, 1)]).astype(float)
    np.testing.assert_allclose(stats.action["max"][3:], joints.max(0))
    np.testing.assert_allclose(stats.action["min"][3:], joints.min(0))
    lonely = DataConfig(path=str(tmp_path), mixture=(human,), embodiments=("shared",), validation_fraction=0)
    with pytest.raises(
        ValueError, match="human: the size of the missing key 'joints' is unknown, since no other dataset"
    ):
        open_sources(lonely)


def test_damaged_trajectories_are_named(egodex, tmp_path):
    path = tmp_path / "0.hdf5"
    whole = (egodex / "basic_pick_place/0.hdf5").read_bytes()
    path.write_bytes(whole)
    with pytest.raises(FileNotFoundError, match=r"0\.mp4: video file is missing"):
        read_trajectory(path)
    shutil.copy(egodex / "basic_pick_place/1.mp4", tmp_path / "0.mp4")
    with pytest.raises(ValueError, match=r"0\.mp4: has 9 frames, expected 6 for the poses in 0\.hdf5"):
        read_trajectory(path)
    with h5py.File(path, "a") as file:
        del file["transforms/rightHand"]
    with pytest.raises(ValueError, match=r"0\.hdf5: no array 'rightHand' in /transforms; available: camera, hip"):
        read_trajectory(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0\.hdf5: damaged HDF5 file"):
        read_trajectory(path)
    with pytest.raises(FileNotFoundError, match="no EgoDex trajectories; expected"):
        convert_egodex(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("kind", ["libero", "robomimic"])
def test_demonstrations(kind, tmp_path):
    path = write_hdf5(tmp_path / "task_demo.hdf5", kind)
    instruction = None if kind == "libero" else "lift the cube"
    convert_hdf5([path], tmp_path / "set", kind=kind, instruction=instruction)
    dataset = LeRobotDataset(tmp_path / "set", camera="observation.images.agentview")
    assert (dataset.fps, dataset.embodiment, dataset.lengths.tolist()) == (20, kind, [5, 7])
    for index, length in ((0, 5), (1, 7)):
        values, episode = demonstration(index, length), dataset.episode(index)
        states = np.concatenate([values["position"], values["axis_angle"], values["fingers"]], 1)
        np.testing.assert_allclose(episode.states, states, atol=1e-6)
        np.testing.assert_allclose(episode.actions, values["actions"], atol=1e-6)
        assert np.abs(episode.frames.astype(int) - values["picture"]).mean() < 3
        assert episode.instruction == ("pick up the bowl" if kind == "libero" else "lift the cube")
        assert episode.success
    parts = SourceConfig(camera=dataset.camera, action=("position", "rotation", "gripper"))
    assert LeRobotDataset(tmp_path / "set", source=parts).relative.tolist() == [True] * 6 + [False]
    assert dataset.relative.tolist() == [True] * 6 + [False]  # the whole column too
    for source in (parts, dataset.source):
        with pytest.raises(ValueError, match=r"expected data\.row_stride 1, got 2: .* holds movements"):
            LeRobotDataset(tmp_path / "set", source=replace(source, row_stride=2))


def test_missing_attributes_are_named(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", "robomimic")
    with pytest.raises(
        ValueError, match=r"a\.hdf5: no instruction \(attribute problem_info\); set it with --instruction"
    ):
        convert_hdf5([path], tmp_path / "set", kind="robomimic")
    with h5py.File(path, "a") as file:
        del file["data"].attrs["env_args"]
    with pytest.raises(ValueError, match=r"a\.hdf5: env_args has no control_freq; .* --fps"):
        convert_hdf5([path], tmp_path / "set", kind="robomimic", instruction="lift")
    with pytest.raises(ValueError, match=r"a\.hdf5: no array 'ee_pos' in /data/demo_2/obs"):
        convert_hdf5([path], tmp_path / "set", kind="libero", instruction="lift", fps=20)
    assert not (tmp_path / "set").exists()
