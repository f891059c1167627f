"""The flavour that GR00T's fine-tuning reads: its files by the published description, and read back by our own reader."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from agra.cli.main import main
from agra.data.config import SourceConfig
from agra.data.importers.groot_flavour import convert_to_groot
from agra.data.lerobot.checksums import Seal
from agra.data.lerobot.dataset import LeRobotDataset
from agra.evaluation.collect import collect
from agra.serving.remote_policies import read_key_mapping
from tests.support.layouts import write_gr1, write_v2
from tests.support.point_world import demonstrator

PAGE = (Path(__file__).parents[3] / "docs" / "groot.md").read_text()
COLUMN = "annotation.human.task_description"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A collected dataset, and the same in GR00T's flavour by the command."""
    root = tmp_path_factory.mktemp("groot")
    collect("point", root / "ours", episodes=3, seed=0, demonstrator=demonstrator, progress=False)
    main(["convert", str(root / "ours"), "--version", "groot", "--output", str(root / "groot")])
    return root / "ours", root / "groot"


def test_files_are_as_published(folders):
    """Read without our reader, against the description in GR00T's repository."""
    _, root = folders
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    meta = {f"meta/{name}" for name in ("info.json", "episodes.jsonl", "tasks.jsonl", "modality.json", "stats.json")}
    episode = "chunk-000/{}episode_000002.{}"
    assert names >= meta | {f"data/{episode.format('', 'parquet')}"}
    assert f"videos/{episode.format('observation.images.ego_view/', 'mp4')}" in names
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v2.1"
    modality = json.loads((root / "meta/modality.json").read_text())
    assert modality == {
        "state": {"state": {"start": 0, "end": 2}},
        "action": {"action": {"start": 0, "end": 2}},
        "video": {"ego_view": {"original_key": "observation.images.ego_view"}},
        "annotation": {"human.task_description": {"original_key": COLUMN}},
    }
    table = pq.read_table(root / "data" / episode.format("", "parquet"))
    texts = {row["task_index"]: row["task"] for row in map(json.loads, (root / "meta/tasks.jsonl").open())}
    assert {texts[number] for number in table[COLUMN].to_pylist()} <= {"go 0", "go 1"}
    assert [name for name in table.column_names if name.startswith("annotation.")] == [COLUMN]
    assert info["features"][COLUMN] == {"dtype": "int64", "shape": [1], "names": None}


def test_our_reader_reads_it_back(folders):
    ours, groot = folders
    before = LeRobotDataset(ours)
    source = SourceConfig(
        state=("state",), action=("action",), camera="ego_view", instruction_key="human.task_description"
    )
    after = LeRobotDataset(groot, source=source)
    assert len(after.lengths) == 3
    for episode in range(3):
        np.testing.assert_array_equal(after.frames(episode), before.frames(episode))
        np.testing.assert_array_equal(after.states(episode), before.states(episode))
        np.testing.assert_array_equal(after.actions(episode), before.actions(episode))
        assert after.instruction(episode) == before.instruction(episode)
    seal = Seal(groot)
    for name in ("meta/info.json", "meta/stats.json", "meta/modality.json", "data/chunk-000/episode_000000.parquet"):
        seal.verify(groot / name)
    stats = [json.loads(line)["stats"] for line in (groot / "meta/episodes_stats.jsonl").open()]
    assert all(row[COLUMN] == row["task_index"] for row in stats)


def test_names_of_the_source_stay(tmp_path):
    source = write_gr1(tmp_path / "gr1")
    root = convert_to_groot(source, tmp_path / "out")
    assert (root / "meta/modality.json").read_text() != ""
    assert json.loads((root / "meta/modality.json").read_text()) == json.loads(
        (source / "meta/modality.json").read_text()
    )
    before, after = (pq.read_table(p / "data/chunk-000/episode_000000.parquet") for p in (source, root))
    assert after.column_names == before.column_names


def test_cameras_must_be_videos(tmp_path):
    source = write_v2(tmp_path / "pictures", kind="image")
    with pytest.raises(ValueError, match="GR00T's loader needs a feature video; available: "):
        convert_to_groot(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_names_the_parts_that_the_command_writes(folders, tmp_path):
    """The modality configuration and the key mapping of docs/groot.md, for a dataset of one part of state and action."""
    modality = json.loads((folders[1] / "meta/modality.json").read_text())
    (mapping,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mapping.json").write_text(mapping)
    mapping = read_key_mapping(str(tmp_path / "mapping.json"))
    assert mapping.wire == "groot_n16"
    assert (set(mapping.state), set(mapping.actions)) == (set(modality["state"]), set(modality["action"]))
    assert set(mapping.images) == set(modality["video"])
    assert mapping.instruction == COLUMN
    python = re.search(r"modality\.py <<'END'\n(.*?)END", PAGE, re.DOTALL)[1]
    compile(python, "modality.py", "exec")
    keys = re.findall(r'modality_keys=\["([^"]+)"\]', python)
    assert keys == ["ego_view", "state", "action", COLUMN]
