"""Low-rank adapters: nothing at first, alone in learning, whole in checkpoints, gone once merged."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Launcher

from agra import hub
from agra.config import RunConfig
from agra.draws import seed_everything
from agra.footprint import measure
from agra.training import checkpoint
from agra.training.loop import Trainer
from agra.training.lora import LoRAConfig, attach, is_adapter, merge, merged
from agra.training.objective import Objective
from agra.training.sharding import ParallelConfig, World, build
from agra.training.stages import Stage
from agra.training.start import initialize
from agra.wam.model import WAM

LORA = LoRAConfig(rank=3, scale=2.0)
EXTRA = {"norm_stats.json": lambda path: path.write_text("{}")}


@pytest.fixture
def config(small_config):
    return replace(small_config, stage=replace(small_config.stage, lora=LORA, ema_decay=0.5))


def make(config):
    def fresh():
        seed_everything(config.stage.seed)
        return Objective(WAM(config.model), config.stage.objective, config.alignment, 6)

    return fresh


def trainer(config, output, make_batch, *, start=None, on_step=lambda step: None):
    objective = build(make(config), config.stage, ParallelConfig(), World(), start)

    def batch(step):
        on_step(step)
        return make_batch(config, seed=step)

    return Trainer(config, objective, batch=batch, validation=None, output=output, extra_files=EXTRA)


def step_loss(objective, batch):
    seed_everything(7)
    return objective(batch).total


def files(folder):
    found = checkpoint.newest(folder)
    return {path.name: load_file(path) for path in found.glob("*.safetensors")}


def test_they_change_nothing_at_first_and_learn_alone(config, make_batch):
    batch = make_batch(config)
    plain, adapted = make(config)(), build(make(config), config.stage, ParallelConfig(), World(), None)
    assert torch.equal(step_loss(plain, batch), step_loss(adapted, batch))
    names = {name for name, p in adapted.wam.video_dit.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 4 * 8  # two tensors, four layers of two attentions in four blocks
    assert all(map(is_adapter, names))
    step_loss(adapted, batch).backward()
    for name, parameter in adapted.named_parameters():
        learns = is_adapter(name) or "video_dit" not in name
        assert (parameter.grad is not None and parameter.requires_grad) == learns, name


@pytest.mark.parametrize("stop_before", [3, 5])
def test_a_killed_run_is_the_whole_run(config, make_batch, tmp_path, stop_before):
    """And the base stays as it was, to the bit."""
    trainer(config, tmp_path / "whole", make_batch).run()

    class Killed(Exception):
        pass

    def kill(step):
        if step == stop_before:
            raise Killed

    with pytest.raises(Killed):
        trainer(config, tmp_path / "cut", make_batch, on_step=kill).run()
    trainer(config, tmp_path / "cut", make_batch).run()
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert whole.keys() == cut.keys() >= {"model.safetensors", "lora.safetensors"}
    for name, tensors in whole.items():
        assert all(torch.equal(value, cut[name][key]) for key, value in tensors.items())
    assert all(map(is_adapter, whole["lora.safetensors"]))
    base = make(config)().wam.state_dict()
    assert whole["model.safetensors"].keys() == base.keys()
    for name, value in whole["model.safetensors"].items():
        if name.startswith("video_dit."):
            assert torch.equal(value, base[name]), name
    assert any(value.any() for name, value in whole["lora.safetensors"].items() if name.endswith("lora_up"))


def test_merged_is_the_same_model(config, make_batch, tmp_path):
    """As a policy loads it, as a later stage starts from it, and as it is exported, averaged too."""
    run = trainer(config, tmp_path / "run", make_batch)
    run.run()
    batch = make_batch(config, seed=99)
    expected = step_loss(run.objective.eval(), batch)
    averaged = copy.deepcopy(run.objective)
    with torch.no_grad():
        for parameter, ours in zip(averaged.wam.parameters(), run.objective.wam.parameters(), strict=True):
            parameter.copy_(run.optimizer.state[ours].get("ema", ours))

    loaded = make(config)().eval()
    loaded.projectors.load_state_dict(run.objective.projectors.state_dict())
    with merged(loaded.wam, config.stage.lora):
        checkpoint.load_weights(loaded.wam, checkpoint.newest(tmp_path / "run"))
    assert not any(map(is_adapter, loaded.state_dict()))
    torch.testing.assert_close(step_loss(loaded, batch), expected, rtol=1e-5, atol=1e-6)
    base = make(config)().eval()
    assert (step_loss(base, batch) - expected).abs() > 1e-3

    following = make(config)()
    initialize(following, tmp_path / "run", config)
    assert all(torch.equal(a, b) for a, b in zip(following.wam.parameters(), loaded.wam.parameters(), strict=True))

    for ema, source in ((False, run.objective), (True, averaged)):
        folder = hub.export(tmp_path / "run", tmp_path / f"export_{ema}", ema=ema)
        assert "lora.safetensors" not in {path.name for path in folder.iterdir()}
        assert checkpoint.read_config(folder).stage.lora == LoRAConfig()
        assert "adapters of rank 3" in (folder / "README.md").read_text()
        checkpoint.load_weights(loaded.wam, folder)
        torch.testing.assert_close(step_loss(loaded, batch), step_loss(source.eval(), batch), rtol=1e-5, atol=1e-6)


def test_an_adapt_stage_hands_its_adapters_on(config, make_batch, tmp_path):
    objective = replace(config.stage.objective, action_weight=0.0, alignment_weight=0.0)
    adapt = replace(config, stage=replace(config.stage, name=Stage.ADAPT, objective=objective))
    run = trainer(adapt, tmp_path, make_batch)
    run.run()
    joint = trainer(config, tmp_path / "joint", make_batch, start=lambda o: initialize(o, tmp_path, config))
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    ours, theirs = (r.objective.wam.video_dit.get_submodule(layer) for r in (joint, run))
    update = 2.0 * theirs.lora_up @ theirs.lora_down
    assert update.abs().max() > 1e-5
    torch.testing.assert_close(ours.weight, theirs.weight + update)
    assert not ours.lora_up.any()


def test_what_cannot_be_is_said(config):
    wam = WAM(config.model)
    with pytest.raises(ValueError, match=r"no linear layer is called 'video_dit\.\*\.to_z'; there are video_dit\."):
        attach(wam, LoRAConfig(rank=2, layers=("video_dit.*.to_z",)))
    with pytest.raises(ValueError, match=r"stage\.lora\.rank: 12 is not low for .*attn2\.to_k, which takes 12 numbers"):
        attach(wam, LoRAConfig(rank=12))
    for wrong in ({"rank": 0}, {"scale": 0.0}, {"layers": ()}):
        with pytest.raises(ValueError, match=rf"stage\.lora\.{next(iter(wrong))}: expected"):
            LoRAConfig(**wrong)
    frozen = replace(config.stage, train_video_dit=False)
    with pytest.raises(ValueError, match=r"some are of the video_dit, which the joint stage does not train"):
        build(make(config), frozen, ParallelConfig(), World(), None)
    assert RunConfig.from_json(config.to_json()) == config


def test_other_parts_may_have_them(config):
    stage = replace(config.stage, lora=replace(LORA, layers=("action_dit.blocks.*.to_v", "bridge.*")))
    objective = build(make(config), stage, ParallelConfig(), World(), None)
    for part in (objective.wam.bridge, objective.wam.action_dit):
        assert all(p.requires_grad == is_adapter(name) for name, p in part.named_parameters())
    assert all(p.requires_grad for p in objective.wam.video_dit.parameters())
    before = {name: p.detach().clone() for name, p in objective.wam.named_parameters() if not is_adapter(name)}
    merge(objective.wam)
    assert all(torch.equal(p, before[name]) for name, p in objective.wam.named_parameters())


def test_the_planner_counts_them(config):
    with_them = measure(config)
    whole = measure(replace(config, stage=replace(config.stage, lora=LoRAConfig())))
    adapters = with_them.parameters["video_dit"] - whole.parameters["video_dit"]
    width, text = config.model.video_dit.width, config.model.video_dit.text_dim
    assert adapters == 4 * 3 * (6 * 2 * width + 2 * (width + text))
    assert with_them.trained == whole.trained - whole.parameters["video_dit"] + adapters
    assert with_them.flops_per_sample < whole.flops_per_sample


def test_two_processes_are_one(tmp_path):
    """Shards, checkpointing and a move to one process: the single process's losses within 2e-6, then the same policy."""
    launcher = Launcher(tmp_path / "errors")
    stage = {"steps": 3, "save_every": 100, "validate_every": 100, "lora": {"rank": 3}}
    try:
        assert launcher.run(1, tmp_path / "one", stage=stage) == [0], launcher.errors
        parallel = {"checkpoint_activations": 1}
        codes = launcher.run(2, tmp_path / "two", stage=stage, stop=[0, 1], parallel=parallel)
        assert codes == [0, 0], launcher.errors
        assert launcher.run(2, tmp_path / "two", stage=stage) == [0, 0], launcher.errors
    finally:
        launcher.close()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6, abs=2e-6)
    names = checkpoint.stored_names(checkpoint.newest(tmp_path / "two") / "sharded")
    assert "video_dit.transformer.transformer_blocks.1.attn2.to_k.lora_up" in names
    assert not any(name.startswith("exp_avg/wam.video_dit") and not is_adapter(name) for name in names)
    one, two = (
        load_file(hub.export(tmp_path / name, tmp_path / f"{name}_policy") / "model.safetensors")
        for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4, msg=name)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if "loss" in row for name in ("loss", "video_loss", "action_loss")]
