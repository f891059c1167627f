"""Conversion from every version to every other gives the same values. Our own files come back byte for byte."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from agra import files
from agra.data.importers.lerobot_versions import convert
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.writer import LeRobotWriter, encode_episode
from agra.types import Embodiment, Episode
from tests.support.full_disk import file_size_limit
from tests.support.layouts import CAMERAS, EPISODES, LENGTHS, LEROBOT_WRITERS, TASKS, write_gr1


@pytest.fixture(scope="module", params=LEROBOT_WRITERS)
def root(request, tmp_path_factory):
    return LEROBOT_WRITERS[request.param](tmp_path_factory.mktemp("convert") / "set")


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_the_same_values_in_every_version(root, tmp_path, version):
    convert(root, tmp_path / "out", version)
    assert json.loads((tmp_path / "out/meta/info.json").read_text())["codebase_version"] == version
    for camera in CAMERAS:
        before, after = LeRobotDataset(root, camera=camera), LeRobotDataset(tmp_path / "out", camera=camera)
        for index, expected in enumerate(EPISODES):
            assert np.array_equal(after.frames(index), before.frames(index))
            assert np.array_equal(after.states(index), expected.states)
            assert np.array_equal(after.actions(index), expected.actions)
            assert after.instruction(index) == TASKS[expected.task]
        shades = np.concatenate([expected.frames[camera] for expected in EPISODES]) / 255
        assert np.abs(after.stats[camera]["mean"].ravel() - shades.mean((0, 1, 2))).max() < 0.01
    actions = np.concatenate([expected.actions for expected in EPISODES]).astype(float)
    np.testing.assert_allclose(after.stats["action"]["q99"], np.quantile(actions, 0.99, axis=0))


def test_v21_as_lerobot_lays_it_out(root, tmp_path):
    """Read without our reader, against the layout's own words."""
    convert(root, tmp_path / "out", "v2.1")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["data_path"] == "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    assert (info["total_chunks"], info["total_episodes"], info["total_frames"]) == (1, 3, sum(LENGTHS))
    rows = [json.loads(line) for line in (tmp_path / "out/meta/episodes.jsonl").read_text().splitlines()]
    assert rows == [
        {"episode_index": i, "tasks": [TASKS[expected.task]], "length": len(expected.states)}
        for i, expected in enumerate(EPISODES)
    ]
    tasks = [json.loads(line) for line in (tmp_path / "out/meta/tasks.jsonl").read_text().splitlines()]
    assert tasks == [{"task_index": 0, "task": TASKS[0]}, {"task_index": 1, "task": TASKS[1]}]
    stats = [json.loads(line) for line in (tmp_path / "out/meta/episodes_stats.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(stats[2]["stats"]["action"]["max"], EPISODES[2].actions.max(0))
    assert set(stats[0]["stats"]) == set(info["features"])
    table = pq.read_table(tmp_path / "out/data/chunk-000/episode_000001.parquet")
    assert table["frame_index"].to_pylist() == list(range(LENGTHS[1]))
    assert table["index"].to_pylist() == list(range(LENGTHS[0], LENGTHS[0] + LENGTHS[1]))


def test_our_own_files_come_back_byte_for_byte(tmp_path):
    robot = Embodiment(name="bot", state_names=("a", "b"), action_names=("u",))
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        tmp_path / "set", embodiment=robot, fps=10, modality={"state": {"a": {"start": 0, "end": 1}}}
    ) as w:
        for index, length in enumerate((9, 17, 4)):
            episode = Episode(
                frames=rng.integers(0, 255, (length, 32, 48, 3), dtype=np.uint8),
                states=rng.normal(size=(length, 2)),
                actions=rng.normal(size=(length, 1)),
                instruction=f"task {index % 2} — 苹果",
                embodiment="bot",
                fps=10,
            )
            w.add(encode_episode(episode, extra={"next.done": np.arange(length) == length - 1}))
    convert(tmp_path / "set", tmp_path / "v21", "v2.1")
    convert(tmp_path / "v21", tmp_path / "again", "v3.0")
    files = {p.relative_to(tmp_path / "set"): p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert {name.as_posix() for name in files} >= {"meta/modality.json", "meta/checksums.json", "meta/stats.json"}
    assert files.keys() == again.keys()
    assert [name for name in files if files[name] != again[name]] == []


def test_modality_and_annotations_are_copied(tmp_path):
    write_gr1(tmp_path / "set")
    convert(tmp_path / "set", tmp_path / "out", "v3.0")
    assert (tmp_path / "out/meta/modality.json").read_bytes() == (tmp_path / "set/meta/modality.json").read_bytes()
    assert pq.read_schema(tmp_path / "out/data/chunk-000/file-000.parquet").field("action").type.value_type == "double"


@pytest.mark.parametrize("size", [0, 200, 2000])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_full_disk_is_one_error_and_leaves_no_file(tmp_path, version, size):
    """The limits stop the rows, the videos or the metadata."""
    source = LEROBOT_WRITERS["v2.0"](tmp_path / "set")
    with file_size_limit(size), pytest.raises(OSError, match=r"File too large.*out"):
        convert(source, tmp_path / "out", version)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    convert(source, tmp_path / "out", version)
    assert LeRobotDataset(tmp_path / "out", camera=CAMERAS[0]).num_episodes == 3


def test_an_output_that_another_process_writes_is_left_to_it(root, tmp_path):
    with files.building(tmp_path / "out") as partial:
        partial.mkdir()
        with pytest.raises(ValueError, match=r"out: another process \(pid \d+\) writes here"):
            convert(root, tmp_path / "out", "v3.0")
        assert partial.is_dir()


def test_refusals(root, tmp_path):
    with pytest.raises(ValueError, match=r"version: expected one of v2.0, v2.1, v3.0, got 'v1.6'"):
        convert(root, tmp_path / "out", "v1.6")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out: already exists"):
        convert(root, tmp_path / "out", "v3.0")
    with pytest.raises(FileNotFoundError, match="not a LeRobot dataset"):
        convert(tmp_path / "out", tmp_path / "other", "v3.0")
    assert not (tmp_path / "other").exists()
