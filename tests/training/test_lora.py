"""Low-rank adapters: initial state, training, checkpoints and merging."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from agra.checkpoints.folder import newest
from agra.checkpoints.read import load_parts, read_config, stored_names
from agra.config import RunConfig
from agra.lora import LoRAConfig, attach, is_adapter, merge, merged
from agra.policies.export import export
from agra.policies.load import load_method
from agra.recipes import at_stage
from agra.rng import seed_everything
from agra.stages import Stage
from agra.training.distributed import DistributedContext
from agra.training.initialization import load_initial_weights
from agra.training.memory_estimate import measure
from agra.training.parallelize import ParallelConfig, build
from agra.training.trainer import Trainer
from tests.support.ranks import Launcher

LORA = LoRAConfig(rank=3, scale=2.0)
EXTRA = {"norm_stats.json": lambda path: path.write_text("{}")}


@pytest.fixture
def config(small_config):
    return replace(small_config, stage=replace(small_config.stage, lora=LORA, ema_decay=0.5))


def make(config):
    def fresh():
        seed_everything(config.stage.seed)
        return config.method.build()

    return fresh


def trainer(config, output, make_batch, *, start=None, on_step=lambda step: None):
    method = build(make(config), config.stage, ParallelConfig(), DistributedContext(), start)

    def batch(step):
        on_step(step)
        return make_batch(config, seed=step)

    return Trainer(config, method, batch=batch, validation=None, output=output, extra_files=EXTRA)


def step_loss(method, batch):
    seed_everything(7)
    return method(batch).total


def files(folder):
    return {path.name: load_file(path) for path in newest(folder).glob("*.safetensors")}


def test_they_change_nothing_at_first_and_learn_alone(config, make_batch):
    batch = make_batch(config)
    plain, adapted = make(config)(), build(make(config), config.stage, ParallelConfig(), DistributedContext(), None)
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
    """The base weights stay the same bits."""
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
    assert whole.keys() == cut.keys() >= {"video_dit.safetensors", "lora.safetensors"}
    for name, tensors in whole.items():
        assert all(torch.equal(value, cut[name][key]) for key, value in tensors.items())
    assert all(map(is_adapter, whole["lora.safetensors"]))
    base = make(config)().wam.state_dict()
    assert whole["video_dit.safetensors"].keys() == {name for name in base if name.startswith("video_dit.")}
    for name, value in whole["video_dit.safetensors"].items():
        assert torch.equal(value, base[name]), name
    assert any(value.any() for name, value in whole["lora.safetensors"].items() if name.endswith("lora_up"))


def test_merged_is_the_same_model(config, make_batch, tmp_path):
    """Merged by a policy, by a later stage and by an export, with averages too."""
    run = trainer(config, tmp_path / "run", make_batch)
    run.run()
    batch = make_batch(config, seed=99)
    expected = step_loss(run.method.eval(), batch)
    averaged = copy.deepcopy(run.method)
    with torch.no_grad():
        for parameter, ours in zip(averaged.wam.parameters(), run.method.wam.parameters(), strict=True):
            parameter.copy_(run.optimizer.state[ours].get("ema", ours))

    loaded = make(config)().eval()
    loaded.projectors.load_state_dict(run.method.projectors.state_dict())
    parts = {name: part for name, part in loaded.parts().items() if name != "projectors"}
    with merged(parts, config.stage.lora):
        load_parts(parts, newest(tmp_path / "run"))
    assert not any(map(is_adapter, loaded.state_dict()))
    torch.testing.assert_close(step_loss(loaded, batch), expected, rtol=1e-5, atol=1e-6)
    base = make(config)().eval()
    assert (step_loss(base, batch) - expected).abs() > 1e-3

    following = make(config)()
    load_initial_weights(following, tmp_path / "run", config)
    assert all(torch.equal(a, b) for a, b in zip(following.wam.parameters(), loaded.wam.parameters(), strict=True))

    for ema, source in ((False, run.method), (True, averaged)):
        folder = export(tmp_path / "run", tmp_path / f"export_{ema}", ema=ema)
        assert "lora.safetensors" not in {path.name for path in folder.iterdir()}
        assert read_config(folder).stage.lora == LoRAConfig()
        assert "adapters of rank 3" in (folder / "README.md").read_text()
        load_parts(parts, folder)
        torch.testing.assert_close(step_loss(loaded, batch), step_loss(source.eval(), batch), rtol=1e-5, atol=1e-6)


def test_adapters_on_a_part_of_training_alone_leave_the_policy_loadable(config, make_batch, tmp_path):
    layers = ("video_dit.*.to_q", "projectors.*")
    config = replace(config, stage=replace(config.stage, lora=replace(LORA, layers=layers)))
    run = trainer(config, tmp_path / "run", make_batch)
    run.run()
    assert any(name.startswith("projectors.") for name in files(tmp_path / "run")["lora.safetensors"])
    method = load_method(newest(tmp_path / "run"), config)
    assert "projectors" not in method.parts()
    merge(run.method.parts())
    for name, value in method.wam.state_dict().items():
        torch.testing.assert_close(value, run.method.wam.state_dict()[name], msg=name)
    plain = replace(config, method=replace(config.method, alignment=None))
    load_initial_weights(plain.method.build(), tmp_path / "run", plain)


def test_an_adapt_stage_hands_its_adapters_on(config, make_batch, tmp_path):
    adapt = at_stage(config, Stage.ADAPT)
    run = trainer(adapt, tmp_path, make_batch)
    run.run()
    joint = trainer(
        config, tmp_path / "joint", make_batch, start=lambda method: load_initial_weights(method, tmp_path, config)
    )
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    ours, theirs = (r.method.wam.video_dit.get_submodule(layer) for r in (joint, run))
    update = 2.0 * theirs.lora_up @ theirs.lora_down
    assert update.abs().max() > 1e-5
    torch.testing.assert_close(ours.weight, theirs.weight + update)
    assert not ours.lora_up.any()


def test_invalid_settings_are_named(config):
    parts = config.method.build().parts()
    with pytest.raises(ValueError, match=r"'video_dit\.\*\.to_z' matches no linear layer; there are video_dit\."):
        attach(parts, LoRAConfig(rank=2, layers=("video_dit.*.to_z",)))
    with pytest.raises(
        ValueError, match=r"stage\.lora\.rank: expected less than 12, the smaller width of .*attn2\.to_k, got 12"
    ):
        attach(parts, LoRAConfig(rank=12))
    for wrong in ({"rank": 0}, {"scale": 0.0}, {"layers": ()}):
        with pytest.raises(ValueError, match=rf"stage\.lora\.{next(iter(wrong))}: expected"):
            LoRAConfig(**wrong)
    frozen = replace(config.stage, frozen=("video_dit",))
    with pytest.raises(ValueError, match=r"some are in video_dit, which this stage keeps frozen"):
        build(make(config), frozen, ParallelConfig(), DistributedContext(), None)
    assert RunConfig.from_json(config.to_json()) == config


def test_other_parts_may_have_them(config):
    stage = replace(config.stage, lora=replace(LORA, layers=("action_dit.blocks.*.to_v", "bridge.*")))
    method = build(make(config), stage, ParallelConfig(), DistributedContext(), None)
    for part in (method.wam.bridge, method.wam.action_dit):
        assert all(p.requires_grad == is_adapter(name) for name, p in part.named_parameters())
    assert all(p.requires_grad for p in method.wam.video_dit.parameters())
    before = {name: p.detach().clone() for name, p in method.wam.named_parameters() if not is_adapter(name)}
    merge(method.parts())
    assert all(torch.equal(p, before[name]) for name, p in method.wam.named_parameters())


def test_the_planner_counts_them(config):
    with_them = measure(config)
    whole = measure(replace(config, stage=replace(config.stage, lora=LoRAConfig())))
    adapters = with_them.parameters["video_dit"] - whole.parameters["video_dit"]
    width, text = config.method.model.video_dit.width, config.method.model.video_dit.text_dim
    assert adapters == 4 * 3 * (6 * 2 * width + 2 * (width + text))
    assert with_them.trained == whole.trained - whole.parameters["video_dit"] + adapters
    assert with_them.flops_per_sample < whole.flops_per_sample


def test_two_processes_are_one(tmp_path):
    """Shards, checkpointing and a move to one process: the single process's losses within 2e-6, then the same policy."""
    launcher = Launcher(tmp_path / "errors")
    stage = {"steps": 3, "save_every": 100, "validate_every": 100, "lora": {"rank": 3}}
    try:
        assert launcher.run(1, tmp_path / "one", stage=stage) == [0], launcher.errors
        parallel = {"activation_checkpointing": 1}
        codes = launcher.run(2, tmp_path / "two", stage=stage, stop=[0, 1], parallel=parallel)
        assert codes == [0, 0], launcher.errors
        assert launcher.run(2, tmp_path / "two", stage=stage) == [0, 0], launcher.errors
    finally:
        launcher.close()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6, abs=2e-6)
    names = stored_names(newest(tmp_path / "two") / "sharded")
    assert "video_dit.transformer.transformer_blocks.1.attn2.to_k.lora_up" in names
    assert not any(name.startswith("exp_avg/video_dit") and not is_adapter(name) for name in names)
    one, two = (
        load_file(export(tmp_path / name, tmp_path / f"{name}_policy") / "video_dit.safetensors")
        for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4, msg=name)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if "loss" in row for name in ("loss", "video_loss", "action_loss")]
