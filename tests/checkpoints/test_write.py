"""Checkpoints are written whole or not at all."""

import errno
import json
import os

import pytest
import torch

from agra import api, files
from agra.checkpoints import write as checkpoint
from agra.checkpoints.folder import newest, resolve, verify
from agra.recipes import tiny
from agra.weights import write_tensors


def _files(text="x"):
    return {
        "config.json": lambda path: path.write_text(text),
        "model.safetensors": lambda path: write_tensors(path, {"w": torch.arange(4.0)}),
    }


def test_save_keeps_the_newest_and_lists_checksums(tmp_path):
    for step in (5, 10, 1000005):
        checkpoint.save(tmp_path, step, _files(), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000010", "step_1000005"]
    assert newest(tmp_path).name == "step_1000005"
    assert resolve(tmp_path) == resolve(tmp_path / "step_1000005")
    verify(newest(tmp_path))


def test_an_old_checkpoint_that_cannot_be_removed_stays_until_the_next_save(tmp_path, monkeypatch, caplog):
    """NFS refuses to remove a folder from which another process reads."""
    remove = checkpoint.shutil.rmtree

    def refuse(path, ignore_errors=False):
        if path.name == "step_000001":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, ignore_errors=ignore_errors)

    checkpoint.save(tmp_path, 1, _files(), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", refuse)
        assert checkpoint.save(tmp_path, 2, _files(), keep=1) == tmp_path / "step_000002"
    assert "step_000001: the old checkpoint could not be removed" in caplog.text
    verify(newest(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    checkpoint.save(tmp_path, 3, _files(), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


def test_an_unfinished_write_does_not_count(tmp_path):
    checkpoint.save(tmp_path, 5, _files(), keep=2)

    def fail(path):
        path.write_text("half")
        raise OSError("No space left on device")

    problem = r"checkpoint of step 10 could not be written \(No space left on device\); .*step_000005 is intact"
    with pytest.raises(OSError, match=problem):
        checkpoint.save(tmp_path, 10, _files() | {"optimizer.safetensors": fail}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]
    verify(newest(tmp_path))
    checkpoint.save(tmp_path, 10, _files(), keep=2)
    assert newest(tmp_path).name == "step_000010"


def test_what_killed_saves_left_is_removed(tmp_path):
    """Leftovers of any step go, of one process or of several."""
    for name in (".step_000003.0a1b2c3d.writing", ".step_000004.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("half")
    checkpoint.save(tmp_path, 5, _files(), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]


def test_optimizer_state_survives(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    names = {p: n for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    write_tensors(tmp_path / "o.safetensors", checkpoint.optimizer_tensors(optimizer, names))
    fresh = torch.optim.AdamW(model.parameters())
    checkpoint.load_optimizer(fresh, tmp_path / "o.safetensors", names)
    for parameter in model.parameters():
        assert fresh.state[parameter].keys() == optimizer.state[parameter].keys()
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[parameter][key], value)
    with pytest.raises(ValueError, match="which this stage does not train"):
        checkpoint.load_optimizer(fresh, tmp_path / "o.safetensors", {p: "other." + n for p, n in names.items()})


def test_manifest_is_json(tmp_path):
    folder = checkpoint.save(tmp_path, 5, _files("y"), keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest) == ["config.json", "model.safetensors"]
    assert all(len(digest) == 64 for digest in manifest.values())


def test_a_second_writer_never_mixes_its_files_in(tmp_path):
    """The second writer writes between two files of the first and fails."""

    def other(path):
        second = {"model.safetensors": lambda p: p.write_text("B"), "optimizer.safetensors": lambda p: 1 / 0}
        with pytest.raises(ZeroDivisionError):
            checkpoint.save(tmp_path, 1, second, keep=2)
        path.write_text("A")

    first = {"model.safetensors": lambda path: path.write_text("A"), "optimizer.safetensors": other}
    with pytest.raises(OSError, match="the checkpoint of step 1 could not be written"):
        checkpoint.save(tmp_path, 1, first, keep=2)
    assert newest(tmp_path) is None


def test_a_second_training_into_the_same_folder_is_refused(tmp_path):
    with files.lock(tmp_path / "run"):
        with pytest.raises(ValueError, match=rf"run: another process \(pid {os.getpid()}\) writes here"):
            api.train(tiny(), output=tmp_path / "run")
