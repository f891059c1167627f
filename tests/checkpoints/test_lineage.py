"""A run records its start, and a resumed run keeps it."""

import json
from pathlib import Path

import pytest

from agra import api
from agra.checkpoints.lineage import check_origin, record_origin
from agra.recipes import tiny

HUB = "nvidia/Cosmos-Predict2.5-2B"


@pytest.fixture
def folder(tmp_path):
    """Two runs of an earlier stage with two checkpoints each, and an empty one that starts from the first."""
    for path in (tmp_path / stage / f"step_{step:06d}" for stage in ("adapt", "other") for step in (5, 10)):
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    (tmp_path / "run").mkdir()
    record_origin(tmp_path / "run", tmp_path / "adapt", HUB)
    return tmp_path


def test_the_recorded_places(folder):
    assert json.loads((folder / "run" / "origin.json").read_text()) == {"init": "../adapt", "head": HUB}


def test_every_spelling_of_the_same_start_is_accepted(folder, monkeypatch):
    (folder / "link").symlink_to(folder / "adapt")
    monkeypatch.chdir(folder)
    for init in (None, "adapt", folder / "adapt", "run/../adapt", "adapt/step_000010", "link"):
        for run in (Path("run"), folder / "run"):
            check_origin(run, init, HUB)


def test_another_start_is_refused(folder):
    run = folder / "run"
    for init in (folder / "other", folder / "adapt" / "step_000005", HUB):
        with pytest.raises(
            ValueError, match=r"--init-from .*: .*run is resumed, and it started from \.\./adapt; leave"
        ):
            check_origin(run, init, None)
    with pytest.raises(ValueError, match=f"--head nvidia/other: .*run is resumed, and it started from {HUB}"):
        check_origin(run, folder / "adapt", "nvidia/other")


def test_a_start_of_a_run_through_a_symbolic_link(folder):
    """The folder of the run is on another disk."""
    (folder / "disk" / "a" / "run").mkdir(parents=True)
    (folder / "linked").symlink_to(folder / "disk" / "a" / "run")
    record_origin(folder / "linked", folder / "adapt")
    for run in (folder / "linked", folder / "disk" / "a" / "run"):
        check_origin(run, folder / "adapt", None)
    (folder / "linked" / "origin.json").write_text('{"init": "../adapt"}')  # as earlier versions recorded it
    check_origin(folder / "linked", folder / "adapt", None)


def test_a_run_that_moved_alone_resumes(folder):
    moved = folder / "elsewhere" / "run"
    moved.parent.mkdir()
    (folder / "run").rename(moved)
    check_origin(moved, folder / "adapt", HUB)
    with pytest.raises(ValueError, match=r"--init-from .*other: .* it started from \.\./adapt"):
        check_origin(moved, folder / "other", HUB)


def test_runs_without_a_record_resume(folder):
    run = folder / "run"
    (run / "origin.json").write_text('{"init": null}')
    check_origin(run, None, "any/head")
    with pytest.raises(ValueError, match="it started from fresh weights"):
        check_origin(run, HUB, None)
    (run / "origin.json").unlink()
    check_origin(run, HUB, "any/head")


def test_training_resumes_with_the_same_start_alone(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(api, "_train", lambda config, output, initialize, *_: trained.append(initialize) or True)
    (folder / "run" / "step_000001").mkdir()
    for init in (None, folder / "adapt"):
        assert api.train(tiny(), output=folder / "run", init_from=init, head=HUB)
    with pytest.raises(ValueError, match="--init-from"):
        api.train(tiny(), output=folder / "run", init_from=folder / "other")
    assert trained == [None, None]
    assert api.train(tiny(), output=folder / "new", init_from=folder / "other", head=HUB)
    assert json.loads((folder / "new" / "origin.json").read_text()) == {"init": "../other", "head": HUB}
