import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

from agra.alignment.teacher import TeacherConfig, load_teacher
from agra.pretrained import loading, package_folder, weights_digest
from agra.wam.codec import CodecConfig, load_codec


def test_digest_follows_every_weight():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = weights_digest(module)
    assert before == weights_digest(module)
    seen = {before}
    for tensor in module.state_dict().values():
        tensor.view(-1)[-1:].add_(1)
        seen.add(weights_digest(module))
    assert len(seen) == 1 + len(module.state_dict())
    assert weights_digest(nn.Linear(2, 2).bfloat16()) != before


def test_unreachable_hub_names_the_remedy(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        load_codec(CodecConfig())
    assert "https://huggingface.co/nvidia/Cosmos-Predict2.5-2B and run `hf auth login`" in str(error.value)
    assert "(revision diffusers/base/post-trained)" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="dinov2 teacher: cannot load facebook/dinov2-base: "):
        load_teacher(TeacherConfig())


@pytest.mark.parametrize(
    "problem", [OSError("You are trying to access a gated repo.\nMake sure.."), HFValidationError("bad id")]
)
def test_errors_become_one_line(problem):
    with (
        pytest.raises(FileNotFoundError, match="model: cannot load owner/name/vae") as error,
        loading("model", source="owner/name", revision=None, subfolder="vae"),
    ):
        raise problem
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is problem


def test_a_path_that_is_no_folder_is_called_that():
    with (
        pytest.raises(FileNotFoundError, match=r"\./no/such is neither a folder nor a hub id"),
        loading("model", source="./no/such", revision=None),
    ):
        raise OSError("nothing there")


def test_damaged_weights_are_called_that():
    with (
        pytest.raises(ValueError, match="weights of owner/name are damaged"),
        loading("model", source="owner/name", revision=None),
    ):
        raise SafetensorError("header too small")


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r'the thing needs the package "no-such-thing": pip install "agra\[demo\]"'):
        package_folder("no_such_thing", "the thing")
