"""Checkpoints of the layout before version 0.1: their config, weights, moments, averages and shards load.

That version wrote `earlier_layout/config.json`. The tests write the weights under its names.
"""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agra import files
from agra.checkpoints.folder import newest
from agra.checkpoints.lineage import lineage
from agra.checkpoints.migration import current_config, current_name
from agra.checkpoints.read import load_averages, load_parts, part_tensors, read_config, stored_parts
from agra.policies.load import load_method
from agra.training.trainer import Trainer

CONFIG = Path(__file__).parent / "earlier_layout" / "config.json"
NAMES = {
    "video_dit.transformer.patch_embed.proj.weight": "video_dit.transformer.patch_embed.proj.weight",
    "1.layers.0.weight": "projectors.1.layers.0.weight",
    "exp_avg/wam.action_dit.blocks.0.norm.weight": "exp_avg/action_dit.blocks.0.norm.weight",
    "ema/projectors.1.layers.0.weight": "ema/projectors.1.layers.0.weight",
    "step/wam.bridge.norm.weight": "step/bridge.norm.weight",
}
"""Names in the files of that version, and in the present layout."""


def earlier_name(name):
    """Inverse of `current_name`."""
    moment, slash, name = name.rpartition("/")
    if slash:
        return f"{moment}/{name}" if name.startswith("projectors.") else f"{moment}/wam.{name}"
    return name.removeprefix("projectors.")


def seal(folder):
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files.write_text(folder / "manifest.json", json.dumps({name: files.sha256(folder / name) for name in names}))


def rewrite(folder, tensors, *, sharded):
    """Replace a checkpoint's weights and config by the same ones in the earlier layout."""
    for path in [*folder.glob("*.safetensors"), folder / "manifest.json"]:
        path.unlink()
    shutil.copy(CONFIG, folder / "config.json")
    named = {earlier_name(name): value.detach().contiguous() for name, value in tensors.items()}
    if sharded:
        (folder / "sharded").mkdir()
        save_file(named, folder / "sharded" / "shard-00001-model-00001-of-00001.safetensors")
    else:
        moments = {name: value for name, value in named.items() if "/" in name}
        projectors = {name: value for name, value in named.items() if name[0].isdigit()}
        networks = {name: value for name, value in named.items() if name not in {*moments, *projectors}}
        for name, content in (("model", networks), ("projectors", projectors), ("optimizer", moments)):
            save_file(content, folder / f"{name}.safetensors")
    seal(folder)


def make_trainer(config, output, make_batch, *, stop_at=None):
    """A trainer of fresh weights. SIGTERM comes during step `stop_at`."""
    torch.manual_seed(0)

    def batch(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(config, seed=step)

    return Trainer(config, config.method.build(), batch=batch, validation=None, output=output, extra_files={})


@pytest.fixture
def config(small_config):
    """The settings of `earlier_layout/config.json` in the present layout."""
    stage = replace(small_config.stage, ema_decay=0.5)
    return replace(small_config, stage=stage, action_noise="random")


@pytest.mark.parametrize("stored", NAMES)
def test_names_of_tensors(stored):
    assert current_name(stored) == NAMES[stored]
    assert current_name(NAMES[stored]) == NAMES[stored]
    assert earlier_name(NAMES[stored]) == stored


def test_the_config_of_the_earlier_version(config, tmp_path):
    values = json.loads(CONFIG.read_text())
    assert values["model"]
    shutil.copy(CONFIG, tmp_path / "config.json")
    assert read_config(tmp_path) == config
    assert current_config(json.loads(config.to_json())) == json.loads(config.to_json())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"video_lr": 1e-5, "action_lr": 1e-4}, {"learning_rate": 1e-4, "learning_rate_by_part": {"video_dit": 1e-5}}),
        ({"train_video_dit": False}, {"frozen": ["video_dit"]}),
        ({"name": "adapt"}, {"frozen": ["bridge", "action_dit"]}),
        ({"warmup_share": 0.1}, {"warmup_ratio": 0.1}),
    ],
)
def test_renamed_fields_of_the_stage(change, expected):
    values = json.loads(CONFIG.read_text())
    stage = current_config({**values, "stage": {**values["stage"], **change}})["stage"]
    assert expected.items() <= stage.items()
    assert not change.keys() - {"name"} & stage.keys()


def test_renamed_fields_of_the_data():
    values = json.loads(CONFIG.read_text())
    source = {"path": "x", "embodiment": "dot", "lacks": ["a"], "every": 2, "tile": ["b"]}
    data = {**values["data"], "mixture": [source], "cached": ["latents"]}
    current = current_config({**values, "data": data})["data"]
    assert current["mixture"] == [
        {"path": "x", "embodiment": "dot", "missing_keys": ["a"], "row_stride": 2, "extra_cameras": ["b"]}
    ]
    assert current["cached"] == ["latents"]


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "several processes"])
def test_a_run_of_the_earlier_layout_resumes_to_the_same_bits(config, make_batch, tmp_path, sharded):
    """Weights, moments, averages and the step are read. The rest of the run equals that of an uninterrupted one."""
    whole = make_trainer(config, tmp_path / "whole", make_batch)
    assert whole.run()
    first = make_trainer(config, tmp_path / "cut", make_batch, stop_at=3)
    assert not first.run()
    folder = newest(tmp_path / "cut")
    rewrite(folder, first._tensors(), sharded=sharded)
    assert stored_parts(folder) == {"video_dit", "bridge", "action_dit", "projectors"}
    second = make_trainer(config, tmp_path / "cut", make_batch)
    assert second.run()
    ours, theirs = second._tensors(), whole._tensors()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert [stage.config for stage in lineage(folder)] == [config]


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "several processes"])
def test_a_policy_of_the_earlier_layout_loads(config, make_batch, tmp_path, sharded):
    trainer = make_trainer(replace(config, stage=replace(config.stage, steps=2)), tmp_path, make_batch)
    trainer.run()
    folder, tensors = newest(tmp_path), trainer._tensors()
    rewrite(folder, tensors, sharded=sharded)
    for averaged in (False, True):
        method = load_method(folder, read_config(folder), averaged=averaged)
        for name, value in part_tensors(method.parts()).items():
            assert torch.equal(value, tensors[f"ema/{name}" if averaged and f"ema/{name}" in tensors else name]), name
    parts = config.method.build().parts()
    load_parts(parts, folder)
    load_averages(parts, folder)
    for name, value in part_tensors({"projectors": parts["projectors"]}).items():
        assert torch.equal(value, tensors[f"ema/{name}"]), name
