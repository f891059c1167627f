"""Malicious datasets: more rows than the metadata allows, files outside the folder, numbers that no machine holds."""

import json
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agra.data.config import SourceConfig
from agra.data.doctor.doctor import check_dataset
from agra.data.lerobot.dataset import LeRobotDataset
from tests.support.layouts import CAMERAS, write_v2, write_v3

CAMERA = CAMERAS[0]


def change(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def open_all(root):
    dataset = LeRobotDataset(root, source=SourceConfig(camera=CAMERA))
    return [dataset.episode(index) for index in range(dataset.num_episodes)]


@pytest.mark.parametrize("name", ["data", "pictures"])
def test_rows_are_counted_before_they_are_read(tmp_path, name):
    root = tmp_path / "bomb"
    write_v3(root, "video" if name == "data" else "image")
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table] * 40).combine_chunks(), path)
    with pytest.raises(ValueError, match=r"\.parquet: holds \d+ rows, the dataset's metadata allows at most \d+"):
        open_all(root)
    if name == "data":
        assert "the dataset's metadata allows at most" in " ".join(f.message for f in check_dataset(root).findings)
    else:
        dataset = LeRobotDataset(root, source=SourceConfig(camera=CAMERA))
        with pytest.raises(ValueError, match="the dataset's metadata allows at most"):
            dataset.frames(0)


def test_a_small_file_of_millions_of_rows_costs_nothing(tmp_path):
    root = tmp_path / "bomb"
    write_v3(root)
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    columns = {name: pa.repeat(table[name][0], 3_000_000) for name in ("index", "episode_index")}
    pq.write_table(pa.table(columns), path)
    assert path.stat().st_size < 100_000
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"column .* is missing|holds 3000000 rows"):
        open_all(root)
    episodes = next((root / "meta/episodes").rglob("*.parquet"))
    rows = pq.read_table(episodes)
    pq.write_table(pa.table({n: pa.repeat(rows[n][0], 1_000_000) for n in ("episode_index", "length")}), episodes)
    with pytest.raises(ValueError, match=r"holds 1000000 rows, .* at most"):
        LeRobotDataset(root, source=SourceConfig(camera=CAMERA))
    assert time.monotonic() - start < 10


OUTSIDE = {
    "absolute": "/etc/{chunk_index:03d}/{file_index:03d}.parquet",
    "above": "data/../../other/{chunk_index:03d}/{file_index:03d}.parquet",
    "wide": "data/{chunk_index:01000000000d}/{file_index:03d}.parquet",
    "aligned": "data/{chunk_index:x>999999999}/{file_index:03d}.parquet",
    "converted": "data/{chunk_index!r}/{file_index:03d}.parquet",
    "nul": "data/\0{chunk_index:03d}/{file_index:03d}.parquet",
}


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_the_dataset_are_not_read(tmp_path, name, key):
    root = tmp_path / "dataset"
    write_v3(root)
    template = OUTSIDE[name]
    if key == "video_path":
        template = template.replace(".parquet", "/{video_key}.mp4")
    change(root, **{key: template})
    with pytest.raises(ValueError, match=r"info\.json: (the file .* outside the dataset|data_path|video_path)"):
        open_all(root)
    assert not check_dataset(root).healthy


def test_a_camera_with_dots_in_its_name_stays_inside(tmp_path):
    root = tmp_path / "dataset"
    write_v2(root, "v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] = {name.replace(CAMERA, "../../../cam"): value for name, value in info["features"].items()}
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="outside the dataset"):
        LeRobotDataset(root, source=SourceConfig(camera="../../../cam"))


def test_pictures_outside_the_dataset_are_not_read(tmp_path):
    root = tmp_path / "dataset"
    write_v3(root, "image")
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    shutil.copy(path, tmp_path / "secret.png")
    cells = pa.array([{"bytes": None, "path": "../secret.png"}] * table.num_rows, table[CAMERA].type)
    pq.write_table(table.set_column(table.column_names.index(CAMERA), CAMERA, cells), path)
    with pytest.raises(ValueError, match=r"'\.\./secret\.png' is outside the dataset"):
        open_all(root)


NUMBERS = {
    "fps": {"fps": 10**400},
    "infinite fps": {"fps": float("inf")},
    "chunks": {"chunks_size": 10**400},
    "frames": {"total_frames": 10**400},
    "shape": {"features": {"action": {"dtype": "float32", "shape": [10**400]}}},
    "product": {"features": {"action": {"dtype": "float32", "shape": [10**9, 10**9]}}},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_beyond_every_machine_are_one_line(tmp_path, name):
    root = tmp_path / "dataset"
    write_v3(root)
    change(root, **NUMBERS[name])
    with pytest.raises(ValueError, match=r"info\.json") as raised:
        LeRobotDataset(root, source=SourceConfig(camera=CAMERA))
    assert len(str(raised.value)) < 500
    assert [f.level for f in check_dataset(root).findings] == ["error"]


def test_lengths_beyond_every_machine_are_one_line(tmp_path):
    root = tmp_path / "dataset"
    write_v2(root, "v2.1")
    path = root / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["length"] = 10**30
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"episodes\.jsonl: 'length': expected a whole number"):
        LeRobotDataset(root, source=SourceConfig(camera=CAMERA))


def test_deep_nesting_is_one_line(tmp_path):
    root = tmp_path / "dataset"
    write_v3(root)
    (root / "meta/info.json").write_text('{"a":' * 200_000)
    with pytest.raises(ValueError, match=r"info\.json: not valid JSON"):
        LeRobotDataset(root, source=SourceConfig(camera=CAMERA))
    assert not check_dataset(root).healthy
