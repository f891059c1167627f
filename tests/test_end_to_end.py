"""From demonstrations to an acting policy, through every stage, in a world without a renderer and with the packaged frozen parts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agra import api
from agra.checkpoints.folder import newest, resolve
from agra.evaluation.collect import collect
from agra.evaluation.protocols import Protocol
from agra.evaluation.results import read_results
from agra.evaluation.rollout import evaluate
from agra.lora import LoRAConfig
from agra.policies.export import export
from agra.policies.load import load_policy
from agra.recipes import at_stage, tiny
from agra.stages import Stage
from agra.wam.bridge import bridged_layers
from tests.support.point_world import PointWorld, demonstrator, make_trial
from tests.support.small import with_alignment, with_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with demonstrations, and a config for them."""
    folder = tmp_path_factory.mktemp("end_to_end")
    collect("point", folder / "demonstrations", episodes=12, seed=0, demonstrator=demonstrator, progress=False)
    config = tiny()
    model = {
        "frame_size": (32, 48),
        "video_dit": replace(config.method.model.video_dit, num_layers=3),
        "bridge": replace(config.method.model.bridge, layers=bridged_layers(3, 2), position_grid=(2, 2, 3)),
        "action_dit": replace(config.method.model.action_dit, num_blocks=2, horizon=8),
    }
    teacher = replace(config.method.alignment.teacher, input_size=(28, 42))
    config = with_alignment(with_model(config, **model), layers=(1,), teacher=teacher)
    data = replace(
        config.data,
        path=str(folder / "demonstrations"),
        cache=str(folder / "cache"),
        embodiments=("dot",),
        frame_stride=1,
    )
    stage = replace(config.stage, steps=6, batch_size=8, save_every=3, validate_every=3, log_every=1)
    return folder, replace(config, data=data, stage=stage)


@pytest.fixture(scope="module")
def trained(world):
    folder, config = world
    api.prepare(config)
    previous = None
    for stage in Stage:
        assert api.train(at_stage(config, stage), output=folder / stage, init_from=previous)
        previous = folder / stage
    return folder, config


def test_adapters_make_a_policy(trained):
    """Adapters on the video DiT of the adapt stage are merged by loading and by exporting."""
    folder, config = trained
    config = replace(config, stage=replace(config.stage, lora=LoRAConfig(rank=4), steps=2))
    assert api.train(config, output=folder / "adapters", init_from=folder / Stage.ADAPT)
    whole = load_policy(export(folder / "adapters", folder / "adapters_policy"))
    policy = load_policy(folder / "adapters")
    layer = "video_dit.transformer.transformer_blocks.0.attn1.to_q.weight"
    base = load_file(resolve(folder / Stage.ADAPT) / "video_dit.safetensors")[layer]
    assert torch.equal(base, load_file(resolve(folder / "adapters") / "video_dit.safetensors")[layer])
    assert not torch.equal(base, policy.method.parts()["video_dit"].state_dict()[layer.removeprefix("video_dit.")])
    observation = PointWorld().reset(make_trial("t", "in_distribution", 3))
    assert np.array_equal(policy.act(observation).actions, whole.act(observation).actions)


def test_training_needs_prepared_features(world):
    folder, config = world
    data = replace(config.data, cache=str(folder / "empty"))
    with pytest.raises(
        FileNotFoundError, match="instructions not prepared for any dataset with these settings; run agra prepare"
    ):
        api.train(replace(config, data=data), output=folder / "nowhere")


def test_each_stage_computes_its_losses(trained):
    folder, _ = trained
    logged = {stage: json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[0]) for stage in Stage}
    losses = {stage: {k for k in row if k.endswith("_loss")} for stage, row in logged.items()}
    assert losses[Stage.ADAPT] == {"video_loss"}
    assert losses[Stage.JOINT] == {"video_loss", "action_loss", "alignment_loss"}
    assert losses[Stage.FINETUNE] == {"action_loss"}


def test_visual_reliance_is_monitored_where_the_action_head_learns(trained):
    folder, _ = trained
    rows = {stage: [json.loads(line) for line in (folder / stage / "metrics.jsonl").open()] for stage in Stage}
    measured = {stage: [row for row in rows[stage] if "visual_reliance/error" in row] for stage in Stage}
    assert [row["step"] for row in measured[Stage.JOINT]] == [3, 6]
    assert not measured[Stage.ADAPT]
    # One held-out episode: there is nothing to swap its image with.
    assert set(measured[Stage.FINETUNE][0]) >= {
        "visual_reliance/error",
        "visual_reliance/image_mask_shift",
        "validation/action_loss",
    }


@pytest.mark.parametrize("stage", [Stage.JOINT, Stage.FINETUNE])
def test_a_policy_is_rebuilt_from_its_checkpoint_alone(trained, tmp_path, stage):
    folder, _ = trained
    copy = tmp_path / "elsewhere"
    shutil.copytree(newest(folder / stage), copy)
    policy, moved = load_policy(folder / stage), load_policy(copy)
    observation = PointWorld().reset(make_trial("t", "in_distribution", 3))
    policy.reset(5)
    moved.reset(5)
    first = policy.act(observation)
    assert first.actions.shape == (8, 2)
    assert set(first.timings) == {"text", "codec", "video", "bridge", "action"}
    np.testing.assert_array_equal(first.actions, moved.act(observation).actions)
    assert not np.array_equal(first.actions, policy.act(observation).actions)  # fresh noise for every chunk
    policy.reset(5)
    np.testing.assert_array_equal(first.actions, policy.act(observation).actions)


def test_actions_come_back_in_the_robots_units(trained):
    folder, _ = trained
    policy = load_policy(folder / Stage.JOINT)
    stats = policy.stats["dot"]
    extremes = torch.zeros(1, 2, policy.config.method.model.action_dit.action_dim)
    extremes[0, 0], extremes[0, 1] = -1, 1
    low, high = policy.unnormalize(extremes, "dot")[0]
    np.testing.assert_allclose(low, stats.action["mean"] - stats.action["std"], atol=1e-6)
    np.testing.assert_allclose(high, stats.action["mean"] + stats.action["std"], atol=1e-6)


def test_a_report_follows_the_stages_back_also_after_a_move(trained, tmp_path):
    folder, _ = trained
    for stage in Stage:
        shutil.copytree(folder / stage, tmp_path / "moved" / stage)
    page = api.report([tmp_path / "moved" / Stage.FINETUNE], output=tmp_path / "report.html").read_text()
    for stage in Stage:
        assert f"<code>{stage}</code>" in page
    assert "weight 0.2" in page
    assert "adapt 6 steps, joint 6 steps, finetune 6 steps" in page


def test_evaluation_runs_the_checkpoint(trained, tmp_path):
    folder, _ = trained
    world = PointWorld()
    trials = [make_trial(f"in_distribution/{i}", "in_distribution", i) for i in range(3)]
    evaluate(
        load_policy(folder / Stage.JOINT),
        world,
        trials,
        output=tmp_path / "results.jsonl",
        protocol=Protocol(execute_steps=4),
        policy_name="joint",
    )
    assert len(read_results(tmp_path / "results.jsonl").trials) == 3


def test_an_adapt_checkpoint_and_an_unknown_embodiment_are_refused(trained):
    folder, _ = trained
    with pytest.raises(ValueError, match="a checkpoint of the adapt stage cannot act"):
        load_policy(folder / Stage.ADAPT)
    policy = load_policy(folder / Stage.JOINT)
    observation = replace(PointWorld().reset(make_trial("t", "in_distribution", 3)), embodiment="gr1")
    with pytest.raises(ValueError, match=r"not trained on embodiment 'gr1'; expected one of \['dot'\]"):
        policy.act(observation)


def test_a_flipped_byte_is_named(trained, tmp_path):
    folder, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(newest(folder / Stage.JOINT), copy)
    weights = copy / "video_dit.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"video_dit\.safetensors: checksum differs"):
        load_policy(copy)
