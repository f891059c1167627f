"""Checkpoints with invalid content and a valid manifest: one line that names the file, and no oversized model."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from agra import files
from agra.checkpoints.folder import BUNDLED, verify
from agra.checkpoints.read import reading
from agra.policies.load import load_policy

BUNDLED_POLICY = BUNDLED / "tabletop-agra"


def seal(folder):
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = {name: files.sha256(folder / name) for name in names if name != "manifest.json"}
    files.write_text(folder / "manifest.json", json.dumps(manifest))


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(BUNDLED_POLICY, tmp_path / "odd")


def change_config(copy, name, value):
    path = copy / "config.json"
    content = json.loads(path.read_text())
    *parents, last = name.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[last] = value
    path.write_text(json.dumps(content))
    seal(copy)


CONFIGS = {
    "list": ("[]", r"config\.json: expected a JSON object, got \[\]"),
    "null": ("null", r"config\.json: expected a JSON object, got None"),
    "deep": ('{"a":' * 100_000, r"config\.json: not JSON"),
    "cut": ('{"model"', r"config\.json: not JSON"),
    "latin": (b"\xe9", r"config\.json: not JSON"),
    "empty": ("{}", r"config\.json: required field missing @ config\.data"),
    "model": ('{"model": [1], "data": {}}', r"config\.json: "),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_invalid_config_names_the_file(copy, name):
    content, complaint = CONFIGS[name]
    (copy / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    seal(copy)
    with pytest.raises(ValueError, match=complaint):
        load_policy(copy)


@pytest.mark.parametrize("sizes", ['{"tabletop": [64, 112]}', '{"tabletop": {}}', '{"tabletop": {"a": [64]}}', "[]"])
def test_invalid_recorded_sizes_name_the_file(copy, sizes):
    (copy / "recorded_sizes.json").write_text(sizes)
    seal(copy)
    with pytest.raises(ValueError, match=r"recorded_sizes\.json: .*expected"):
        load_policy(copy)


NUMBERS = {
    "method.model.video_dit.num_layers": 3000,
    "method.model.action_dit.num_blocks": 10**6,
    "method.model.video_dit.num_heads": 0,
    "method.model.video_dit.head_dim": -64,
    "method.model.action_dit.hidden_dim": 2**62,
    "method.model.action_dit.num_embodiments": 10**9,
    "method.model.action_dit.max_horizon": 10**10,
    "method.model.action_dit.state_dim": 0,
    "method.model.video_dit.latent_channels": 10**30,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_sizes_beyond_the_weights_build_no_model(copy, name):
    change_config(copy, name, NUMBERS[name])
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"odd[/:]"):
        load_policy(copy)
    assert time.monotonic() - begun < 10


def test_an_invalid_value_gives_its_reason(copy):
    change_config(copy, "method.model.action_dit.horizon", 1025)
    with pytest.raises(ValueError, match=r"config\.json: ActionDiTConfig\.horizon: expected 1\.\.1024, got 1025"):
        load_policy(copy)


def statistics():
    return json.loads((BUNDLED_POLICY / "norm_stats.json").read_text())


def changed(name, values):
    content = statistics()
    content["tabletop"]["state"][name] = values
    return content


STATISTICS = {
    "none": ({}, "at least one embodiment"),
    "texts": (changed("mean", ["a"] * 10), "not normalisation statistics"),
    "scalar": (changed("mean", 3.0), "expected lists of one length"),
    "short": (changed("mean", [0.0] * 9), "expected lists of one length"),
    "nan": (changed("std", [float("nan")] * 10), "std is not finite in dimension 0"),
    "list": ([1], "not normalisation statistics"),
    "wide": (
        {
            "tabletop": {
                **statistics()["tabletop"],
                "state": {k: v * 2 for k, v in statistics()["tabletop"]["state"].items()},
            }
        },
        "its state is wider than the method's 16",
    ),
    "unknown": ({"other": statistics()["tabletop"]}, "'other': the checkpoint does not know it"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_invalid_statistics_name_the_file(copy, name):
    content, complaint = STATISTICS[name]
    (copy / "norm_stats.json").write_text(json.dumps(content))
    seal(copy)
    with pytest.raises(ValueError, match=rf"norm_stats\.json: .*{complaint}"):
        load_policy(copy)


def test_files_that_are_read_must_be_in_the_manifest(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    weights = load_file(copy / "video_dit.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, copy / "video_dit.safetensors")
    for listed in ({}, {k: v for k, v in manifest.items() if k != "video_dit.safetensors"}):
        (copy / "manifest.json").write_text(json.dumps(listed))
        with pytest.raises(ValueError, match=r"manifest\.json: does not list (action_dit|video_dit)\.safetensors"):
            load_policy(copy)


@pytest.mark.parametrize("manifest", ["[]", "null", '{"a": 1}', '{"../secret": "x"}', '{"/etc/passwd": "x"}', "{"])
def test_a_manifest_with_paths_outside_the_checkpoint_is_refused(copy, manifest):
    (copy / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest\.json: (expected|not JSON)"):
        verify(copy)


def test_an_error_of_torch_names_the_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: cannot be loaded \(RuntimeError: no such size\)"):
        with reading(tmp_path):
            raise RuntimeError("no such size")


def test_the_weights_of_bundled_policies_are_finite():
    assert torch.isfinite(next(load_policy("tabletop-wam").method.parameters())).all()
