"""Checkpoint folders: names, checksums, and weights of another shape."""

import pytest
import torch

from agra.checkpoints import folder as folders
from agra.checkpoints import write as checkpoint
from agra.checkpoints.folder import artifact_dir, resolve, verify
from agra.checkpoints.read import load_parts
from agra.weights import read_tensors, write_tensors


def _files(text="x"):
    return {
        "config.json": lambda path: path.write_text(text),
        "head.safetensors": lambda path: write_tensors(path, {"head.w": torch.arange(4.0)}),
    }


def test_bundled_policies_have_names(tmp_path, monkeypatch):
    """A folder of the user comes first. Results are written outside the package."""
    bundled = tmp_path / "package"
    (bundled / "tabletop").mkdir(parents=True)
    (bundled / "tabletop" / "manifest.json").write_text("{}")
    monkeypatch.setattr(folders, "BUNDLED", bundled)
    monkeypatch.chdir(tmp_path)
    assert resolve("tabletop") == bundled / "tabletop"
    assert str(artifact_dir("tabletop")) == "outputs/tabletop"
    with pytest.raises(FileNotFoundError, match=r"tabletp: no checkpoint here; .*, or a bundled policy \(tabletop\)"):
        resolve("tabletp")
    (tmp_path / "tabletop" / "step_000010").mkdir(parents=True)
    assert str(resolve("tabletop")) == "tabletop/step_000010"
    assert str(artifact_dir("tabletop")) == "tabletop"
    assert str(artifact_dir("tabletop/step_000010")) == "tabletop"


def test_a_flipped_bit_names_the_file(tmp_path):
    folder = checkpoint.save(tmp_path, 5, _files(), keep=2)
    path = folder / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"head\.safetensors: checksum differs from manifest\.json"):
        verify(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors: missing, though manifest\.json lists it"):
        verify(folder)


def test_a_missing_checkpoint_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint here; expected a folder with"):
        resolve(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        resolve(tmp_path / "absent")


def test_weights_of_another_shape_name_the_first_tensor(tmp_path):
    path = tmp_path / "head.safetensors"
    tensors = {f"head.{name}": value for name, value in torch.nn.Linear(3, 2).state_dict().items()}
    write_tensors(path, tensors)
    load_parts({"head": torch.nn.Linear(3, 2)}, tmp_path)
    with pytest.raises(ValueError, match=r"another architecture; 1 entries do not fit, the first is 'head\.weight'"):
        load_parts({"head": torch.nn.Linear(4, 2)}, tmp_path)
    with pytest.raises(ValueError, match=r"another architecture; 1 entries do not fit, the first is 'head\.bias'"):
        load_parts({"head": torch.nn.Linear(3, 2, bias=False)}, tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_tensors(path)
