"""A dataset as a recording: what is in the file, read back by the Rerun SDK."""

import sys

import numpy as np
import pytest

from agra.cli.main import main
from agra.data.view import write_recording
from agra.evaluation.collect import collect
from tests.support.point_world import demonstrator


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "set"
    collect("point", path, episodes=2, seed=0, demonstrator=demonstrator, progress=False)
    return path


def test_cameras_curves_and_instruction(dataset, tmp_path, capsys):
    pytest.importorskip("rerun")
    output = tmp_path / "set.rrd"
    main(["view", str(dataset), "--output", str(output), "--episodes", "1"])
    assert f"rerun {output}" in capsys.readouterr().out
    content = output.read_bytes()
    assert content[:4] == b"RRF2"
    for entity in ("cameras/ego_view", "state", "action", "instruction"):
        assert f"/episode_1/{entity}".encode() in content
    assert b"/episode_0/" not in content
    assert b"a_x" in content  # names of the action's dimensions


def test_by_default_the_first_three_episodes_that_exist(dataset, tmp_path, capsys):
    pytest.importorskip("rerun")
    output = tmp_path / "set.rrd"
    main(["view", str(dataset), "--output", str(output)])
    content = output.read_bytes()
    assert [index for index in range(4) if f"/episode_{index}/".encode() in content] == [0, 1]


def test_invalid_requests(dataset, tmp_path, monkeypatch):
    pytest.importorskip("rerun")
    with pytest.raises(ValueError, match="no episode 7; choose among 0 to 1"):
        write_recording(dataset, tmp_path / "set.rrd", episodes=[0, np.int64(7)])
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ImportError, match=r"pip install .\.\[rerun\]. in a checkout"):
        write_recording(dataset, tmp_path / "set.rrd")
    assert not list(tmp_path.iterdir())
