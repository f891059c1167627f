import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agra.data.lerobot.checksums import dataset_files, seal
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.writer import write_dataset
from agra.types import Embodiment, Episode

REFERENCE = Path(__file__).parent / "written_by_lerobot_0_4_0"
CAMERA = "observation.images.ego_view"
DATA, VIDEO = "data/chunk-000/file-000.parquet", f"videos/{CAMERA}/chunk-000/file-000.mp4"
ROBOT = Embodiment(name="bot", state_names=("a",), action_names=("u", "v"))
LENGTHS = (7, 5, 9)


def make_episode(index: int, length: int) -> Episode:
    rng = np.random.default_rng(index)
    frames = np.full((length, 32, 48, 3), 40 + 20 * index, np.uint8)
    frames[np.arange(length), :, np.arange(length) * 4] = 220
    return Episode(
        frames=frames,
        states=rng.normal(size=(length, 1)).astype(np.float32),
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        instruction=("pick the apple", "nimm den Apfel — 苹果")[index % 2],
        embodiment="bot",
        fps=10,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    write_dataset(path, [make_episode(i, n) for i, n in enumerate(LENGTHS)], embodiment=ROBOT, fps=10)
    return path


@pytest.fixture
def sealed(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def copy(sealed) -> Path:
    """Without checksums: what the reader finds by itself."""
    (sealed / "meta/checksums.json").unlink()
    return sealed


def test_round_trip(original):
    dataset = LeRobotDataset(original)
    assert (dataset.num_episodes, dataset.fps, dataset.camera, dataset.embodiment) == (3, 10, CAMERA, "bot")
    assert dataset.lengths.tolist() == list(LENGTHS)
    assert (dataset.state_names, dataset.action_names) == (("a",), ("u", "v"))
    assert dataset.stats["action"]["mean"].shape == (2,)
    for index in (2, 0, 1):
        expected, episode = make_episode(index, LENGTHS[index]), dataset.episode(index)
        assert np.array_equal(episode.states, expected.states)
        assert np.array_equal(episode.actions, expected.actions)
        assert episode.instruction == dataset.instruction(index) == expected.instruction
        assert (episode.embodiment, episode.fps, episode.success) == ("bot", 10, False)
        assert np.abs(episode.frames.astype(int) - expected.frames).mean() < 3


def test_rows_need_no_video(copy):
    shutil.rmtree(copy / "videos")
    dataset = LeRobotDataset(copy)
    assert dataset.actions(1).shape == (5, 2)
    assert dataset.states(1).shape == (5, 1)
    assert dataset.instruction(1).startswith("nimm")
    with pytest.raises(FileNotFoundError, match=r"file-000\.mp4: video file is missing"):
        dataset.episode(1)


def test_reads_what_lerobot_wrote():
    """Four episodes of 12 to 15 steps, recorded by LeRobot 0.4.0 itself: AV1 video, an index without a name."""
    dataset = LeRobotDataset(REFERENCE)
    assert dataset.lengths.tolist() == [12, 13, 14, 15]
    assert (dataset.state_names, dataset.action_names) == (("a", "b", "c"), ("u", "v"))
    for index in range(4):
        episode = dataset.episode(index)
        steps = np.arange(12 + index)
        assert episode.instruction == f"task {index % 2}"
        assert np.array_equal(episode.states, np.stack([steps * 0 + index, steps, steps * 0 + 0.5], 1))
        assert np.array_equal(episode.actions, np.stack([steps, steps * 0 - index], 1))
        assert np.abs(episode.frames[:, 50, 80].mean(1) - (50 + 40 * index)).max() < 8
        left_edge = (episode.frames[:, 20, :, 0] > episode.frames[:, 20, :, 2].astype(int) + 60).argmax(1)
        assert np.abs(left_edge - (5 + 2 * steps)).max() <= 3


def test_fingerprint_follows_the_contents(original, copy):
    """And is the same whether it is read from the checksums or from the files."""
    fingerprint = LeRobotDataset(original).fingerprint
    assert LeRobotDataset(copy).fingerprint == fingerprint
    with (copy / VIDEO).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert LeRobotDataset(copy).fingerprint != fingerprint


def test_rows_are_counted_once(original):
    """Reading a data file asks for the number of rows, and a large dataset has many files."""
    layout, counted = LeRobotDataset(original).layout, []

    class Counted(tuple):
        def __iter__(self):
            counted.append(len(self))
            return super().__iter__()

    counting = replace(layout, entries=Counted(layout.entries))
    assert [counting.rows for _ in range(3)] == [layout.rows] * 3
    assert len(counted) == 1


def test_cameras_are_chosen_by_name(copy):
    with pytest.raises(ValueError, match=f"no camera 'wrist'; available: {CAMERA}"):
        LeRobotDataset(copy, camera="wrist")
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"] = info["features"][CAMERA]
    (copy / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"column 'videos/observation\.images\.wrist/chunk_index' is missing"):
        LeRobotDataset(copy, camera=CAMERA)


@pytest.mark.parametrize("kind", ["copy", "sealed"])
def test_missing_dataset_and_files(kind, request, tmp_path):
    copy = request.getfixturevalue(kind)
    with pytest.raises(FileNotFoundError, match=r"nowhere: not a LeRobot dataset.*agra collect"):
        LeRobotDataset(tmp_path / "nowhere")
    (copy / DATA).unlink()
    with pytest.raises(FileNotFoundError, match=r"data/chunk-000/file-000\.parquet: file is missing"):
        LeRobotDataset(copy).actions(0)
    (copy / "meta/tasks.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"tasks\.parquet: file is missing"):
        LeRobotDataset(copy)
    shutil.rmtree(copy / "meta/episodes")
    with pytest.raises(FileNotFoundError, match=r"meta/episodes.*: (the episode list|file) is missing"):
        LeRobotDataset(copy)


@pytest.mark.parametrize("name", [DATA, "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"])
def test_truncated_parquet(copy, name):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=f"{name}: damaged parquet file .*; copy or collect the dataset again"):
        LeRobotDataset(copy).actions(0)


def test_corrupt_video(copy):
    whole = (copy / VIDEO).read_bytes()
    (copy / VIDEO).write_bytes(whole[:100] + bytes(100) + whole[200 : len(whole) // 2])
    with pytest.raises(ValueError, match=r"file-000\.mp4: damaged video"):
        LeRobotDataset(copy).episode(0)


def test_other_version_and_broken_json(copy):
    path = copy / "meta/info.json"
    path.write_text(path.read_text().replace('"v3.0"', '"v1.6"'))
    with pytest.raises(
        ValueError, match=r"info\.json: codebase_version is 'v1\.6', expected one of v2\.0, v2\.1, v3\.0"
    ):
        LeRobotDataset(copy)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"info\.json: not valid JSON"):
        LeRobotDataset(copy)


def edit(path: Path, column: str, change) -> None:
    table = pq.read_table(path)
    values = table[column].to_pylist()
    change(values)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, table.schema.field(column).type)), path)


def test_rows_that_disagree(copy):
    """The metadata lists one frame more than episode 1 has. The video agrees with the metadata, the rows do not."""
    episodes = copy / "meta/episodes/chunk-000/file-000.parquet"
    edit(episodes, "length", lambda lengths: lengths.__setitem__(1, 6))
    with pytest.raises(ValueError, match="episode 1 has length 6, but its rows are 7 to 12"):
        LeRobotDataset(copy)
    edit(episodes, "dataset_to_index", lambda ends: ends.__setitem__(1, 13))
    with pytest.raises(ValueError, match=r"episode 1 lasts 0\.6 s, but its frames of .* are from 0\.7 to 1\.2 s"):
        LeRobotDataset(copy)
    edit(episodes, f"videos/{CAMERA}/to_timestamp", lambda ends: ends.__setitem__(1, 1.3))
    with pytest.raises(ValueError, match=r"file-000\.mp4: episodes 1 and 2 overlap from 1\.2 s on"):
        LeRobotDataset(copy)
    for name in ("from_timestamp", "to_timestamp"):
        edit(episodes, f"videos/{CAMERA}/{name}", lambda times: times.__setitem__(2, times[2] + 0.1))
    with pytest.raises(ValueError, match=r"info\.json: total_frames is 21, but the episodes have 22"):
        LeRobotDataset(copy)
    info = copy / "meta/info.json"
    info.write_text(info.read_text().replace('"total_frames": 21', '"total_frames": 22'))
    with pytest.raises(ValueError, match="rows 7 to 13 are not the 6 rows of episode 1"):
        LeRobotDataset(copy).actions(1)
    LeRobotDataset(copy).actions(0)


def test_frames_that_disagree(copy):
    """In the metadata the last episode's video starts too late, so its last frame does not exist."""
    episodes = copy / "meta/episodes/chunk-000/file-000.parquet"
    for name in ("from_timestamp", "to_timestamp"):
        edit(episodes, f"videos/{CAMERA}/{name}", lambda times: times.__setitem__(2, times[2] + 0.1))
    with pytest.raises(ValueError, match=r"file-000\.mp4: no frame at 2\.100 s"):
        LeRobotDataset(copy).episode(2)


def test_missing_episodes(copy):
    path = copy / "meta/info.json"
    path.write_text(path.read_text().replace('"total_episodes": 3', '"total_episodes": 4'))
    with pytest.raises(ValueError, match=r"expected the episodes 0 to 3 .* got 3 rows"):
        LeRobotDataset(copy)


def test_columns_and_episodes_that_do_not_exist(copy):
    with pytest.raises(ValueError, match="episode 3 does not exist; the dataset has 3 episodes"):
        LeRobotDataset(copy).actions(3)
    pq.write_table(pq.read_table(copy / DATA).drop_columns(["action"]), copy / DATA)
    with pytest.raises(
        ValueError, match=r"file-000\.parquet: column 'action' is missing; available: observation.state"
    ):
        LeRobotDataset(copy).actions(0)


def test_a_sealed_dataset_takes_files_beside_it_and_folders_on_another_disk(sealed, tmp_path):
    fingerprint = LeRobotDataset(sealed).fingerprint
    for name in (".DS_Store", "._info.json", "notes.txt"):
        (sealed / "meta" / name).write_text("x")
    for chunk in ("meta/episodes/chunk-000", "data/chunk-000"):
        (tmp_path / "disk" / chunk).parent.mkdir(parents=True)
        (sealed / chunk).rename(tmp_path / "disk" / chunk)
        (sealed / chunk).symlink_to(tmp_path / "disk" / chunk)
    dataset = LeRobotDataset(sealed)
    assert dataset.actions(0).shape == (7, 2)
    assert {DATA, "meta/episodes/chunk-000/file-000.parquet"} <= set(dataset_files(sealed))
    assert ".DS_Store" not in " ".join(dataset_files(sealed))
    assert dataset.fingerprint == fingerprint
    (sealed / "meta/modality.json").write_text("{}")
    with pytest.raises(ValueError, match=r"modality\.json: contents differ from the checksum"):
        LeRobotDataset(sealed)
    (sealed / "meta/modality.json").unlink()
    (sealed / "meta/stats.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"stats\.json: file is missing"):
        LeRobotDataset(sealed)


def test_a_sealed_file_that_changed_is_named(sealed):
    """One bit in the middle of the video, which may well decode, and one row of the table."""
    content = bytearray((sealed / VIDEO).read_bytes())
    content[len(content) // 2] ^= 1
    (sealed / VIDEO).write_bytes(content)
    dataset = LeRobotDataset(sealed)
    assert dataset.actions(0).shape == (7, 2)
    with pytest.raises(ValueError, match=r"file-000\.mp4: contents differ from the checksum .* agra doctor .* --seal"):
        dataset.frames(0)
    edit(sealed / DATA, "action", lambda rows: rows.__setitem__(3, [9.0, 9.0]))
    with pytest.raises(ValueError, match=r"file-000\.parquet: contents differ"):
        LeRobotDataset(sealed).actions(0)
    (sealed / "meta/stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"stats\.json: contents differ"):
        LeRobotDataset(sealed)
    seal(sealed)
    assert LeRobotDataset(sealed).actions(0)[3].tolist() == [9, 9]
