import json

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from agra.alignment import dinov2_onnx
from agra.alignment.teacher import TeacherConfig, load_teacher
from agra.hub import dataset_folder, download_model, loading, package_folder, upload_model, weight_files
from agra.wam import text
from agra.wam.codec import CodecConfig, load_codec
from agra.weights import read_into, weights_digest


def test_digest_follows_every_weight():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = weights_digest(module)
    assert before == weights_digest(module)
    digests = {before}
    for tensor in module.state_dict().values():
        tensor.view(-1)[-1:].add_(1)
        digests.add(weights_digest(module))
    assert len(digests) == 1 + len(module.state_dict())
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


class NetworkLost(HfHubHTTPError.__bases__[0]):
    """An error of the hub's HTTP library during a transfer, such as httpx.ConnectError, which is no OSError."""


def test_a_broken_network_is_one_line(tmp_path, monkeypatch):
    def lost(*args, **options):
        raise NetworkLost("connection reset\nby peer")

    monkeypatch.setattr("agra.hub.snapshot_download", lost)
    monkeypatch.setattr("agra.hub.HfApi.create_repo", lost)
    with pytest.raises(FileNotFoundError, match=r"no dataset of that id on the hub \(connection reset\);"):
        dataset_folder("owner/name")
    with pytest.raises(FileNotFoundError, match="policy: cannot load owner/name: connection reset;"):
        download_model("owner/name", tmp_path / "model")
    with pytest.raises(OSError, match=r"owner/name: upload failed \(connection reset by peer\); run"):
        upload_model(tmp_path, "owner/name", private=True)


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
    with pytest.raises(
        ImportError, match=r"the thing needs the package \"no-such-thing\": pip install no-such-thing, or all of"
    ):
        package_folder("no_such_thing", "the thing")


@pytest.fixture
def published(tmp_path):
    """A model in two shards with their index, in the hub's layout."""
    torch.manual_seed(0)
    parts = {"first": nn.Linear(3, 4).state_dict(), "second": nn.Linear(4, 5).state_dict()}
    index = {}
    for number, (name, tensors) in enumerate(parts.items(), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({f"{name}.{key}": value for key, value in tensors.items()}, tmp_path / file)
        index |= {f"{name}.{key}": file for key in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path


def test_weights_are_read_in_place_and_cast(published):
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 5)}).to(torch.bfloat16)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    read_into(model.state_dict(), weight_files(published), what="model")
    stored = load_file(published / "model-00002-of-00002.safetensors")["second.weight"]
    assert torch.equal(model["second"].weight, stored.bfloat16())
    assert before == {name: value.data_ptr() for name, value in model.state_dict().items()}


def test_an_interrupted_download_is_called_that_and_changes_nothing(published):
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 5)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    last = published / "model-00002-of-00002.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"model: not a readable safetensors file .*download or copy it again"):
        read_into(model.state_dict(), weight_files(published), what="model")
    last.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"00002\.safetensors: missing, though .*index\.json lists it.*download it again"
    ):
        weight_files(published)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_packaged_weights_are_compared_with_their_digest(monkeypatch):
    """Another file of the same name, as after an attack on a package, is not read."""
    monkeypatch.setattr(dinov2_onnx, "DIGEST", "0" * 64)
    with pytest.raises(ValueError, match=r"packaged DINOv2 teacher: .*vit_s_focus\.onnx is not the expected file"):
        dinov2_onnx.read_packaged_dinov2()
    monkeypatch.setattr(text, "MINILM_DIGEST", "0" * 64)
    with pytest.raises(ValueError, match=r"MiniLM text encoder: .*model\.safetensors is not the expected file"):
        text.MiniLMEncoder.from_package()
