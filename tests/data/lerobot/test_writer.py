"""The written layout, looked at without our reader; names and types are those that LeRobot 0.4.0 itself writes."""

import errno
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.writer import EncodedVideo, GrowingVideo, LeRobotWriter, encode_episode, write_dataset
from agra.types import Embodiment, Episode
from tests.support.full_disk import file_size_limit

REFERENCE = Path(__file__).parent / "written_by_lerobot_0_4_0"
CAMERA = "observation.images.ego_view"
ROBOT = Embodiment(name="bot", state_names=("a", "b", "c"), action_names=("u", "v"))
STATISTICS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")


def make_episode(index: int, length: int, *, height: int = 32) -> Episode:
    rng = np.random.default_rng(index)
    return Episode(
        frames=np.full((length, height, 48, 3), 40 + 20 * index, np.uint8),
        states=rng.normal(size=(length, 3)).astype(np.float32),
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        instruction=f"task {index % 2}",
        embodiment="bot",
        fps=10,
    )


LENGTHS = (7, 5, 9)
EPISODES = [make_episode(i, n) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    with LeRobotWriter(path, embodiment=ROBOT, fps=10) as writer:
        for episode in EPISODES:
            last = np.arange(len(episode)) == len(episode) - 1
            writer.add(encode_episode(episode, extra={"next.done": last}))
    return path


def test_files(written):
    files = {p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()}
    assert files == {
        "meta/info.json",
        "meta/stats.json",
        "meta/checksums.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        f"videos/{CAMERA}/chunk-000/file-000.mp4",
    }
    files.remove("meta/checksums.json")
    assert files == {p.relative_to(REFERENCE).as_posix() for p in REFERENCE.rglob("*") if p.is_file()}


def test_info(written):
    info = json.loads((written / "meta/info.json").read_text())
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "bot",
        "total_episodes": 3,
        "total_frames": 21,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 10,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    reference = json.loads((REFERENCE / "meta/info.json").read_text())
    assert set(info) | {"features"} == set(reference)
    assert features["observation.state"] == {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]}
    assert features["action"] == {"dtype": "float32", "shape": [2], "names": ["u", "v"]}
    assert features["next.done"] == {"dtype": "bool", "shape": [1], "names": None}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        assert features[name] == reference["features"][name]
    video = features[CAMERA]
    assert (video["dtype"], video["shape"], video["names"]) == ("video", [32, 48, 3], ["height", "width", "channels"])
    assert set(video["info"]) >= set(reference["features"][CAMERA]["info"])
    assert video["info"]["video.codec"] == "h264"


def test_rows(written):
    file = pq.ParquetFile(written / "data/chunk-000/file-000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == list(LENGTHS)
    assert {file.metadata.row_group(0).column(i).compression for i in range(8)} == {"SNAPPY"}
    reference = pq.read_schema(REFERENCE / "data/chunk-000/file-000.parquet")
    assert [(f.name, f.type) for f in file.schema_arrow if f.name != "next.done"] == [
        (f.name, f.type) for f in reference
    ]
    assert file.schema_arrow.field("next.done").type == pa.bool_()
    rows = file.read().to_pydict()
    assert rows["index"] == list(range(21))
    assert rows["episode_index"] == [0] * 7 + [1] * 5 + [2] * 9
    assert rows["frame_index"] == [*range(7), *range(5), *range(9)]
    assert rows["task_index"] == [0] * 7 + [1] * 5 + [0] * 9
    assert np.allclose(rows["timestamp"], np.array(rows["frame_index"]) / 10)
    assert np.array_equal(np.float32(rows["observation.state"]), np.concatenate([e.states for e in EPISODES]))
    assert np.array_equal(np.float32(rows["action"]), np.concatenate([e.actions for e in EPISODES]))
    assert [i for i, done in enumerate(rows["next.done"]) if done] == [6, 11, 20]


def test_tasks_are_a_pandas_frame_indexed_by_text(written):
    table = pq.read_table(written / "meta/tasks.parquet")
    assert table.to_pydict() == {"task_index": [0, 1], "task": ["task 0", "task 1"]}
    pandas = table.schema.pandas_metadata
    reference = pq.read_schema(REFERENCE / "meta/tasks.parquet").pandas_metadata
    assert pandas["index_columns"] == ["task"]
    assert set(pandas) <= set(reference)
    assert [set(column) for column in pandas["columns"]] == [set(column) for column in reference["columns"]]


def test_episode_list(written):
    table = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet")
    reference = pq.read_schema(REFERENCE / "meta/episodes/chunk-000/file-000.parquet")
    ours = {f.name: f.type for f in table.schema if "next.done" not in f.name}
    assert set(ours) == set(reference.names)
    for field in reference:
        statistic = field.name.startswith("stats/") and field.name.split("/")[1] in ("frame_index", "episode_index")
        if not (statistic or field.name.startswith(("stats/index/", "stats/task_index/"))):
            assert ours[field.name] == field.type, field.name  # of integer columns newer LeRobot writes doubles, too
    rows = table.to_pylist()
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [row["tasks"] for row in rows] == [["task 0"], ["task 1"], ["task 0"]]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 7), (7, 12), (12, 21)]
    spans = [(row[f"videos/{CAMERA}/from_timestamp"], row[f"videos/{CAMERA}/to_timestamp"]) for row in rows]
    assert np.allclose(spans, [(0, 0.7), (0.7, 1.2), (1.2, 2.1)])
    for prefix in ("data", "meta/episodes", f"videos/{CAMERA}"):
        assert {(row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]) for row in rows} == {(0, 0)}


def test_statistics(written):
    stats = json.loads((written / "meta/stats.json").read_text())
    assert set(stats) == set(json.loads((written / "meta/info.json").read_text())["features"])
    actions = np.concatenate([e.actions for e in EPISODES])
    for name, expected in {"min": actions.min(0), "mean": actions.mean(0, dtype=float), "std": actions.std(0)}.items():
        assert np.allclose(stats["action"][name], expected)
    assert np.allclose(stats["action"]["q90"], np.quantile(actions.astype(float), 0.9, axis=0))
    assert stats["action"]["count"] == [21]
    assert set(stats["action"]) == set(STATISTICS)
    for name in STATISTICS:
        assert np.shape(stats[CAMERA][name]) == ((1,) if name == "count" else (3, 1, 1))
    shades = np.repeat([40 / 255, 60 / 255, 80 / 255], LENGTHS)
    assert np.allclose(stats[CAMERA]["mean"], shades.mean())
    assert np.allclose(stats[CAMERA]["std"], shades.std())
    assert np.allclose(stats[CAMERA]["q50"], 60 / 255)
    row = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert np.allclose(row["stats/action/q10"], np.quantile(EPISODES[1].actions.astype(float), 0.1, axis=0))
    assert np.allclose(row[f"stats/{CAMERA}/max"], np.full((3, 1, 1), 60 / 255))


def test_video_holds_all_frames(written):
    with av.open(str(written / f"videos/{CAMERA}/chunk-000/file-000.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert np.allclose([f.mean() for f in frames], np.repeat([40, 60, 80], LENGTHS), atol=2)


def test_size_limits_and_chunks(tmp_path):
    with LeRobotWriter(
        tmp_path / "set", embodiment=ROBOT, fps=10, data_file_mib=1e-6, video_file_mib=1e-6, files_per_chunk=2
    ) as writer:
        for episode in EPISODES:
            writer.add(encode_episode(episode))
    places = ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000"]
    for folder, end in (("data", "parquet"), (f"videos/{CAMERA}", "mp4"), ("meta/episodes", "parquet")):
        root = tmp_path / "set" / folder
        names = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob(f"*.{end}"))
        assert names == places, folder
    rows = [
        row
        for path in sorted((tmp_path / "set/meta/episodes").rglob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert [(r["data/chunk_index"], r["data/file_index"]) for r in rows] == [(0, 0), (0, 1), (1, 0)]
    assert [r[f"videos/{CAMERA}/from_timestamp"] for r in rows] == [0, 0, 0]
    assert [r["dataset_from_index"] for r in rows] == [0, 7, 12]


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_is_one_error_and_leaves_no_file(tmp_path, size):
    """The limits stop the video's header, the rows and the video."""
    encoded = [encode_episode(make_episode(i, 30)) for i in range(3)]

    def write() -> None:
        with LeRobotWriter(tmp_path / "set", embodiment=ROBOT, fps=10) as writer:
            for episode in encoded:
                writer.add(episode)

    with file_size_limit(size), pytest.raises(OSError, match=r"File too large.*set"):
        write()
    assert list(tmp_path.iterdir()) == []
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_second_writer_is_refused_and_the_first_one_goes_on(tmp_path):
    with LeRobotWriter(tmp_path / "set", embodiment=ROBOT, fps=10) as writer:
        writer.add(encode_episode(EPISODES[0]))
        with pytest.raises(ValueError, match=r"set: another process \(pid \d+\) writes here"):
            LeRobotWriter(tmp_path / "set", embodiment=ROBOT, fps=10)
        writer.add(encode_episode(EPISODES[1]))
    assert LeRobotDataset(tmp_path / "set").num_episodes == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_in_the_metadata_leaves_no_file(tmp_path, monkeypatch):
    def write_json(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("agra.data.lerobot.writer.write_json", write_json)
    with pytest.raises(OSError, match=r"No space left on device: '.*stats\.json'"):
        write_dataset(tmp_path / "set", EPISODES, embodiment=ROBOT, fps=10)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="expected at least one episode, got none"):
        write_dataset(tmp_path / "none", [], embodiment=ROBOT, fps=10)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there: already exists"):
        LeRobotWriter(tmp_path / "there", embodiment=ROBOT, fps=10)
    mixed = [EPISODES[0], make_episode(1, 5, height=64)]
    with pytest.raises(
        ValueError, match=r"feature 'observation.images.ego_view' of episode 1 differs from that of episode 0"
    ):
        write_dataset(tmp_path / "mixed", mixed, embodiment=ROBOT, fps=10)
    with pytest.raises(ValueError, match=r"observation.state: expected \(N, 1\)"):
        write_dataset(
            tmp_path / "narrow",
            EPISODES,
            embodiment=Embodiment(name="bot", state_names=("a",), action_names=("u", "v")),
            fps=10,
        )
    with pytest.raises(ValueError, match=r"extra column 'next.reward'"):
        encode_episode(EPISODES[0], extra={"next.reward": np.zeros(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


def test_a_video_that_grows_is_the_video_of_all_its_frames():
    frames = EPISODES[0].frames
    growing = GrowingVideo(*frames.shape[1:3], fps=10)
    for frame in frames:
        growing.add(frame)
    grown, whole = growing.finish(), EncodedVideo.of(frames, fps=10)
    assert (grown.video, grown.size) == (whole.video, whole.size)
    assert np.array_equal(grown.histogram, whole.histogram)
