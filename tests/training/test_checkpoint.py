"""Checkpoints: whole or not at all, checked on reading, self-describing."""

import json

import pytest
import torch

from agra.training import checkpoint


def _files(text="x"):
    return {
        "config.json": lambda path: path.write_text(text),
        "model.safetensors": lambda path: checkpoint.write_tensors(path, {"w": torch.arange(4.0)}),
    }


def test_policies_that_come_with_agra_have_names(tmp_path, monkeypatch):
    """A folder of the user's goes first; what is found out about them is not kept in the package."""
    shipped = tmp_path / "package"
    (shipped / "tabletop").mkdir(parents=True)
    (shipped / "tabletop" / "manifest.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.resolve("tabletop") == shipped / "tabletop"
    assert str(checkpoint.home("tabletop")) == "outputs/tabletop"
    with pytest.raises(FileNotFoundError, match=r"tabletp: no checkpoint here; .* comes with agra \(tabletop\)"):
        checkpoint.resolve("tabletp")
    (tmp_path / "tabletop" / "step_000010").mkdir(parents=True)
    assert str(checkpoint.resolve("tabletop")) == "tabletop/step_000010"
    assert str(checkpoint.home("tabletop")) == "tabletop"
    assert str(checkpoint.home("tabletop/step_000010")) == "tabletop"


def test_save_keeps_the_newest_and_lists_checksums(tmp_path):
    for step in (5, 10, 1000005):
        checkpoint.save(tmp_path, step, _files(), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000010", "step_1000005"]
    assert checkpoint.newest(tmp_path).name == "step_1000005"
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(tmp_path / "step_1000005")
    checkpoint.verify(checkpoint.newest(tmp_path))


def test_an_unfinished_write_does_not_count(tmp_path):
    checkpoint.save(tmp_path, 5, _files(), keep=2)

    def fail(path):
        path.write_text("half")
        raise OSError("No space left on device")

    problem = r"checkpoint of step 10 could not be written \(No space left on device\); .*step_000005 is intact"
    with pytest.raises(OSError, match=problem):
        checkpoint.save(tmp_path, 10, _files() | {"optimizer.safetensors": fail}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]
    checkpoint.verify(checkpoint.newest(tmp_path))
    checkpoint.save(tmp_path, 10, _files(), keep=2)
    assert checkpoint.newest(tmp_path).name == "step_000010"


def test_a_flipped_bit_is_named(tmp_path):
    folder = checkpoint.save(tmp_path, 5, _files(), keep=2)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: checksum differs from manifest\.json"):
        checkpoint.verify(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing, though manifest\.json lists it"):
        checkpoint.verify(folder)


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint here; expected a folder with"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        checkpoint.resolve(tmp_path / "absent")


def test_weights_of_another_shape_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.write_tensors(path, torch.nn.Linear(3, 2).state_dict())
    checkpoint.load_weights(torch.nn.Linear(3, 2), tmp_path)
    with pytest.raises(ValueError, match="another architecture; 1 entries do not fit, the first is 'weight'"):
        checkpoint.load_weights(torch.nn.Linear(4, 2), tmp_path)
    with pytest.raises(ValueError, match="another architecture; 1 entries do not fit, the first is 'bias'"):
        checkpoint.load_weights(torch.nn.Linear(3, 2, bias=False), tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        checkpoint.read_tensors(path)


def test_optimizer_state_survives(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    names = {p: n for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    checkpoint.write_tensors(tmp_path / "o.safetensors", checkpoint.optimizer_tensors(optimizer, names))
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
