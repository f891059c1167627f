"""A healthy dataset has no findings. Each inserted fault is a finding with its check and place."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agra.cli.main import main
from agra.data.doctor.array_checks import content_rows, disagreement, jumps, lag
from agra.data.doctor.doctor import check_dataset
from agra.data.lerobot.checksums import seal
from agra.data.lerobot.writer import write_dataset
from agra.data.normalization.dataset_statistics import describe_stream
from agra.types import Embodiment, Episode
from tests.support.layouts import write_gr1, write_v2

ROBOT = Embodiment(name="bot", state_names=("a", "b"), action_names=("a", "b"))


def smooth(seed: int, length: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = np.arange(length + 3)[:, None]
    return np.sin(0.1 * steps + rng.uniform(0, 6, 2)) * [1, 2] + 0.001 * rng.normal(size=(length + 3, 2))


def healthy(path, change=lambda index, states, actions: None, *, ahead: int = 2):
    episodes = []
    for index in range(4):
        walk = smooth(index)
        states, actions = walk[:60].copy(), walk[ahead : ahead + 60].copy()
        change(index, states, actions)
        frames = np.random.default_rng(index).integers(0, 255, (60, 32, 56, 3), dtype=np.uint8)
        episodes.append(
            Episode(
                frames=frames,
                states=states,
                actions=actions,
                instruction=f"task {index % 2}",
                embodiment="bot",
                fps=10,
            )
        )
    write_dataset(path, episodes, embodiment=ROBOT, fps=10)
    return path


def findings(path, **options) -> dict[tuple[str, str], str]:
    return {(f.level, f.check): f"{f.where}: {f.message}" for f in check_dataset(path, **options).findings}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return healthy(tmp_path_factory.mktemp("doctor") / "set")


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "set")
    (tmp_path / "set/meta/checksums.json").unlink()
    return tmp_path / "set"


def test_a_healthy_dataset_has_no_findings(original):
    assert findings(original, every_frame=True) == {}


def test_files(copy):
    assert set(findings(copy)) == {("note", "checksum")}
    seal(copy)
    video = next(copy.rglob("*.mp4"))
    content = bytearray(video.read_bytes())
    content[-40] ^= 1
    video.write_bytes(content)
    assert "file-000.mp4: " in findings(copy)["error", "checksum"]
    (copy / "meta/checksums.json").unlink()
    video.write_bytes(b"")
    assert findings(copy)["error", "files"].endswith("file-000.mp4: is empty; copy the file again")
    video.unlink()
    assert "video file is missing" in findings(copy)["error", "video"]
    next(copy.rglob("data/*/*.parquet")).unlink()
    assert "file is missing" in findings(copy)["error", "rows"]
    (copy / "meta/info.json").write_text("{}")
    assert "codebase_version is None" in findings(copy)["error", "metadata"]


def test_numbers(tmp_path):
    def spoil(index, states, actions):
        states[:, 0] = 0.5
        if index == 2:
            actions[30:, 1] += 2 * np.pi

    report = findings(healthy(tmp_path / "set", spoil))
    assert report["warning", "constant"] == (
        "observation.state: constant: a (1 of 2); leave them out with data.state or data.action"
    )
    assert report["warning", "jump"].startswith("action b, episode 2, step 30: jumps by 6.")
    assert "sin_cos" in report["warning", "jump"]


def test_outliers(tmp_path):
    def spoil(index, states, actions):
        if index == 1:
            states[30:32, 0] = 80

    assert (
        "observation.state a: 98 % of the values are in"
        in findings(healthy(tmp_path / "set", spoil))["warning", "outliers"]
    )


def test_rare_events(tmp_path):
    def spoil(index, states, actions):
        actions[:, 1] = -1
        if index == 2:
            actions[30:32, 1] = 1  # 2 of 240 rows

    found = findings(healthy(tmp_path / "set", spoil))
    assert "action b: 98 % of the values are -1, all are in [-1, 1]; do not normalise" in found["note", "rare"]


def test_not_a_number(copy):
    path = next(copy.rglob("data/*/*.parquet"))
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    rows[7][1] = float("nan")
    place = table.column_names.index("action")
    pq.write_table(table.set_column(place, "action", pa.array(rows, table["action"].type)), path)
    assert "'action' is nan in row 7, dimension 1" in findings(copy)["error", "rows"]


@pytest.mark.parametrize(("ahead", "expected"), [(0, "equal the states of their step"), (2, None)])
def test_alignment(tmp_path, ahead, expected):
    report = findings(healthy(tmp_path / "set", ahead=ahead))
    assert (expected in report["warning", "alignment"]) if expected else ("warning", "alignment") not in report


def test_lag_is_measured():
    walks = [smooth(i, 80) for i in range(3)]
    for ahead in (-3, 0, 1, 4):
        start = max(0, -ahead)
        states = [w[start : start + 60] for w in walks]
        actions = [w[start + ahead : start + ahead + 60] for w in walks]
        assert lag(states, actions)[0] == ahead
    noise = np.random.default_rng(0)
    assert lag([noise.normal(size=(50, 2))], [noise.normal(size=(50, 2))]) is None
    assert lag([walks[0]], [walks[0][:, :1]]) is None


def test_statistics(copy):
    path = copy / "meta/stats.json"
    stats = json.loads(path.read_text())
    stats["action"]["max"][1] += 0.1
    path.write_text(json.dumps(stats))
    assert findings(copy)["warning", "statistics"].startswith("meta/stats.json, action: max of dimension 1 is ")


def test_the_rounding_of_a_variance_in_float32_is_tolerated():
    """As LeRobot computes it: mean of squares minus square of the mean."""
    rows = (np.random.default_rng(0).normal(size=(400, 2)) * 1e-4 + (0.2, 0)).astype(np.float32)
    exact = describe_stream(lambda: iter([rows]))
    squares = np.mean(rows**2, axis=0) - np.mean(rows, axis=0) ** 2
    stored = {name: exact[name] for name in ("min", "max", "mean")} | {"std": np.sqrt(np.maximum(0, squares))}
    assert abs(stored["std"][0] - exact["std"][0]) > 1e-3 * (exact["max"] - exact["min"])[0]
    assert disagreement(stored, exact) is None
    for dimension, factor in ((0, 10), (1, 1.02)):  # far beyond the rounding, and without a mean nothing is forgiven
        wrong = exact["std"] * np.where(np.arange(2) == dimension, factor, 1)
        assert disagreement({"std": wrong}, exact)[:2] == ("std", dimension)


def test_instructions(tmp_path):
    root = write_v2(tmp_path / "set")
    assert "begin with 'unlocked_waist: '" in findings(root)["warning", "instruction"]
    path = root / "meta/tasks.jsonl"
    path.write_text('{"task_index": 0, "task": "go"}\n{"task_index": 1, "task": "go"}\n')
    assert (
        "the task of episode 2 is 'go', expected 'unlocked_waist: pick the apple'"
        in findings(root)["error", "instruction"]
    )
    episodes = root / "meta/episodes.jsonl"
    rows = [json.loads(line) | {"tasks": ["go"]} for line in episodes.read_text().splitlines()]
    episodes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "all are 'go'" in findings(root)["warning", "instruction"]


def test_timestamps(copy):
    path = next(copy.rglob("data/*/*.parquet"))
    table = pq.read_table(path)
    times = table["timestamp"].to_numpy().copy()
    times[130:180] += 0.3
    place = table.column_names.index("timestamp")
    pq.write_table(table.set_column(place, "timestamp", pa.array(times)), path)
    assert findings(copy)["warning", "timestamps"].startswith("episode 2: differ by 0.300 s from 10 rows/s")


def test_frames_and_rows(tmp_path):
    root = write_v2(tmp_path / "set")
    videos = sorted((root / "videos/chunk-000/observation.images.front").iterdir())
    shutil.copy(videos[1], videos[2])
    report = findings(root)
    assert report["error", "video"].endswith("episode_000002.mp4: has 5 frames, expected 9")
    assert "has 5 frames, expected 9 for the rows of its episode" in report["error", "frames"]


def test_gr1_padding_and_length(tmp_path):
    report = findings(write_gr1(tmp_path / "set"))
    assert report["warning", "padding"] == (
        "observation.images.ego_view: rows above 43 and from 213 on are padding; crop them with data.crop-rows 43 213"
    )
    assert "shorter than a window" in report["note", "length"]


def test_padding_and_jumps_of_arrays():
    frames = np.zeros((3, 40, 20, 3), np.uint8)
    assert content_rows(frames) == (0, 40)
    frames[1, 7:31, 4] = 90
    assert content_rows(frames) == (7, 31)
    assert jumps([smooth(0, 200)]) == []


def test_command(original, copy, capsys, tmp_path):
    main(["doctor", str(original)])
    assert "no findings" in capsys.readouterr().out
    next(copy.rglob("*.mp4")).unlink()
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(copy), "--json", str(tmp_path / "report.json")])
    assert stop.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["healthy"]
    assert {"level", "check", "where", "message"} == set(report["findings"][0])
    assert "video file is missing" in " ".join(capsys.readouterr().out.split())
