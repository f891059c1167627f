"""Diffusion Policy: its equations by hand, LeRobot's on the same weights, and a whole life: trained, resumed, sharded, served.

Run as a program, the file trains the config in a JSON file: `test_diffusion_policy.py CONFIG OUTPUT`.
"""

import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from agra.api import make_sampler, prepare, train
from agra.batch import Batch
from agra.checkpoints.folder import resolve
from agra.checkpoints.read import read_config
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.data.source import embodiment_stats, open_sources
from agra.evaluation.collect import collect
from agra.methods.diffusion_policy import ConditionedBlock, DiffusionPolicyConfig
from agra.methods.method import observation_inputs
from agra.policies.export import export
from agra.policies.load import load_method, load_policy
from agra.recipes import compose, diffusion_policy, tiny_diffusion_policy
from agra.rng import sharded_rng
from agra.stages import Stage, StageConfig
from agra.training.memory_estimate import measure
from agra.types import Observation
from agra.wam.text import TextConfig, mean_token
from tests.support.method_life import check_evaluated_by_name, check_resumed, check_served_episode
from tests.support.point_world import PointWorld, demonstrator, make_trial
from tests.support.two_ranks import assert_same_weights, train_in_two_ranks

ROOT = Path(__file__).parents[2]
LEROBOT = ROOT / ".venv-lerobot" / "bin" / "python"
SMALL = DiffusionPolicyConfig(
    frame_size=(32, 48),
    crop_size=(28, 42),
    encoder_channels=(16, 32),
    state_dim=2,
    action_dim=2,
    horizon=4,
    unet_channels=(8, 16),
    kernel_size=3,
    num_groups=4,
    step_dim=8,
    sampler="ddim",
    sampling_steps=5,
)


def random_batch(config, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames, shapes = config.num_observations, config.shapes
    tokens = torch.randn(count, *shapes.instruction, generator=generator) if config.language == "film" else None
    return Batch(
        state=torch.zeros(count, config.state_dim),
        states=torch.rand(count, frames, config.state_dim, generator=generator) * 2 - 1,
        actions=torch.rand(count, config.horizon, config.action_dim, generator=generator) * 2 - 1,
        action_mask=torch.rand(count, config.horizon, config.action_dim, generator=generator) < 0.7,
        embodiment=torch.zeros(count, dtype=torch.long),
        frames=torch.randint(0, 256, (count, frames, *config.frame_size, 3), generator=generator, dtype=torch.uint8),
        instruction=tokens,
    )


def make_method(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return config.build()


# --- sizes ------------------------------------------------------------------------------------------------------------


def count(config):
    with torch.device("meta"):
        method = config.build()
    assert sum(p.numel() for p in method.parameters()) == sum(
        p.numel() for part in method.parts().values() for p in part.parameters()
    )
    return {name: sum(p.numel() for p in part.parameters()) for name, part in method.parts().items()}


def test_published_sizes():
    published = diffusion_policy().method
    assert published.condition_dim == 2 * (512 + 58)
    assert count(published) == {"encoder": 11_176_512, "unet": 280_510_109}  # ResNet-18 without its classifier
    lerobot = replace(published, pooling="spatial_softmax", num_keypoints=32)
    assert lerobot.condition_dim == 244
    assert count(lerobot)["unet"] == 254_819_997
    narrow = replace(published, unet_channels=(256, 512, 1024), pooling="spatial_softmax")
    assert round(count(narrow)["unet"] / 1e6, 1) == 66.5


def test_it_composes_with_the_presets_of_data():
    config = compose("diffusion_policy", Stage.JOINT, ["gr1_few_shot"])
    assert (config.method, config.stage.steps, len(config.data.mixture)) == (diffusion_policy().method, 40_000, 24)
    with pytest.raises(
        ValueError, match="diffusion_policy: expected the joint stage, the only one of this method, got adapt"
    ):
        compose("diffusion_policy", Stage.ADAPT)


def test_film_language_widens_the_condition_alone():
    plain, film = diffusion_policy().method, replace(diffusion_policy().method, language="film")
    outputs = 2 * 2 * (512 + 1024 + 2048 + 2048 + 1024 + 512)  # of the blocks' FiLM layers
    assert count(film)["unet"] - count(plain)["unet"] == 384 * outputs
    assert plain.text is None
    assert not plain.needs().instruction
    assert film.text == TextConfig(kind="minilm", length=32)


# --- the network's equations ------------------------------------------------------------------------------------------


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def conv1d(x, layer):
    """(C, K) by loops, with zeros outside."""
    weight, bias = layer.weight.detach().numpy().astype(float), layer.bias.detach().numpy().astype(float)
    size, length = weight.shape[2], x.shape[1]
    y = np.zeros((len(weight), length))
    for o in range(len(weight)):
        for k in range(length):
            for j in range(size):
                place = k + j - size // 2
                if 0 <= place < length:
                    y[o, k] += weight[o, :, j] @ x[:, place]
    return y + bias[:, None]


def group_norm(x, layer):
    y = np.concatenate([(g - g.mean()) / np.sqrt(g.var() + layer.eps) for g in np.split(x, layer.num_groups)])
    return y * layer.weight.detach().numpy()[:, None] + layer.bias.detach().numpy()[:, None]


def test_film_scales_then_shifts_after_the_first_convolution():
    torch.manual_seed(0)
    block = ConditionedBlock(3, 8, SMALL)
    for norm in (block.conv1[1], block.conv2[1]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x, condition = torch.randn(2, 3, 4), torch.randn(2, SMALL.step_dim + SMALL.condition_dim)
    for row, answer in enumerate(block(x, condition).detach()):
        values = x[row].double().numpy()
        film = block.film[1].weight.detach().double().numpy() @ mish(condition[row].double().numpy())
        film += block.film[1].bias.detach().double().numpy()
        first = mish(group_norm(conv1d(values, block.conv1[0]), block.conv1[1]))
        second = conv1d(film[:8, None] * first + film[8:, None], block.conv2[0])
        expected = mish(group_norm(second, block.conv2[1])) + conv1d(values, block.shortcut)
        np.testing.assert_allclose(answer.numpy(), expected, atol=1e-5)


def test_the_condition_holds_every_observation_in_order():
    config = replace(SMALL, language="film", text_encoder=TextConfig(kind="minilm", length=5), text_dim=6)
    method, batch = make_method(config).eval(), random_batch(config)
    condition, width = method.condition(batch), config.frame_dim + 2
    assert condition.shape == (3, 2 * width + 6)
    torch.testing.assert_close(condition[:, config.frame_dim : width], batch.states[:, 0])
    torch.testing.assert_close(condition[:, width + config.frame_dim : 2 * width], batch.states[:, 1])
    torch.testing.assert_close(condition[:, 2 * width :], mean_token(batch.instruction))
    centre = batch.frames[:, 1, 2:30, 3:45]
    torch.testing.assert_close(condition[:, width : width + config.frame_dim], method.encoder(centre))


# --- the loss ---------------------------------------------------------------------------------------------------------


def alpha_bars(steps=100):
    """The squared cosine, with betas of at most 0.999."""
    level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.cumprod([1 - min(1 - level[i + 1] / level[i], 0.999) for i in range(steps)])


def test_the_loss_is_the_noise_error_of_the_kept_actions():
    method, batch = make_method(), random_batch(SMALL)
    torch.manual_seed(3)
    loss = method(batch)
    torch.manual_seed(3)
    corners = (torch.rand(6, 2) * torch.tensor([5, 7])).long()
    noise, step = torch.randn(3, 4, 2), torch.randint(100, (3,))
    frames = batch.frames.flatten(0, 1)
    windows = torch.stack([f[t : t + 28, c : c + 42] for f, (t, c) in zip(frames, corners.tolist(), strict=True)])
    features = method.encoder(windows).unflatten(0, (3, 2))
    condition = torch.stack(
        [torch.cat([features[i, 0], batch.states[i, 0], features[i, 1], batch.states[i, 1]]) for i in range(3)]
    )
    bars = alpha_bars()
    noisy = torch.stack(
        [
            bars[t] ** 0.5 * a + (1 - bars[t]) ** 0.5 * e
            for t, a, e in zip(step.tolist(), batch.actions, noise, strict=True)
        ]
    )
    predicted = method.unet(noisy.float(), step, condition).detach()
    kept = [
        (predicted[i, k, d] - noise[i, k, d]).item() ** 2
        for i in range(3)
        for k in range(4)
        for d in range(2)
        if batch.action_mask[i, k, d]
    ]
    assert loss.total.item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert set(loss.terms) == {"action"}


def test_micro_batches_have_the_loss_of_the_whole_step():
    method, batch = make_method(), random_batch(SMALL, count=4)
    with sharded_rng(0, 1, samples=4):
        whole = method(batch).total
    denominators = {"actions": batch.action_mask.sum() / 2}
    halves = []
    for index in range(2):
        with sharded_rng(0, 1, samples=2, index=index, count=2):
            halves.append(method(batch.micro_batch(index, 2), denominators).total)
    torch.testing.assert_close(sum(halves) / 2, whole)


# --- the sampler ------------------------------------------------------------------------------------------------------


class Curve(nn.Module):
    """A stand-in for the U-Net that depends on everything."""

    def forward(self, actions, step, condition):
        return torch.sin(2 * actions) + 0.01 * step[:, None, None] + 0.1 * condition[:, :1, None]


def prepared(config, count=2):
    method, batch = make_method(config).eval(), random_batch(config, count)
    method.unet = Curve()
    inputs = observation_inputs(batch, config)
    generator = torch.Generator().manual_seed(1)
    noise = {
        name: torch.randn(count, *shape, generator=generator) for name, shape in config.build().noise_shapes().items()
    }
    return method, inputs, noise


def predict(method, sample, step, inputs):
    condition = method.condition(inputs)[:, :1, None].detach().double().numpy()
    return np.sin(2 * sample) + 0.01 * step + 0.1 * condition


@torch.no_grad()
def test_ddim_by_hand():
    method, inputs, noise = prepared(SMALL)
    bars, sample = alpha_bars(), noise["action"].double().numpy()
    for step in (80, 60, 40, 20, 0):
        error = predict(method, sample, step, inputs)
        clean = np.clip((sample - (1 - bars[step]) ** 0.5 * error) / bars[step] ** 0.5, -1, 1)
        before = bars[step - 20] if step else 1.0
        sample = before**0.5 * clean + (1 - before) ** 0.5 * error
    np.testing.assert_allclose(method.act(inputs, noise).numpy(), sample, atol=1e-5)
    assert np.abs(sample).max() <= 1


@torch.no_grad()
def test_ddpm_by_hand_and_by_diffusers(monkeypatch):
    config = replace(SMALL, sampler="ddpm", sampling_steps=100)
    method, inputs, noise = prepared(config)
    assert noise["later"].shape == (2, 99, 4, 2)
    answer, bars, sample = method.act(inputs, noise).numpy(), alpha_bars(), noise["action"].double().numpy()
    for index, step in enumerate(range(99, -1, -1)):
        error = predict(method, sample, step, inputs)
        clean = np.clip((sample - (1 - bars[step]) ** 0.5 * error) / bars[step] ** 0.5, -1, 1)
        before = bars[step - 1] if step else 1.0
        alpha = bars[step] / before
        mean = (
            before**0.5 * (1 - alpha) / (1 - bars[step]) * clean + alpha**0.5 * (1 - before) / (1 - bars[step]) * sample
        )
        spread = ((1 - before) / (1 - bars[step]) * (1 - alpha)) ** 0.5
        sample = mean + (spread * noise["later"][:, index].double().numpy() if step else 0)
    np.testing.assert_allclose(answer, sample, atol=1e-4)

    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=True)
    scheduler.set_timesteps(100)
    rows = iter(noise["later"].unbind(1))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(rows))
    sample = noise["action"]
    for step in scheduler.timesteps:
        predicted = Curve()(sample, step.expand(2), method.condition(inputs))
        sample = scheduler.step(predicted, step, sample).prev_sample
    np.testing.assert_allclose(answer, sample.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="at most sampling_steps = 100 steps, got 101"):
        method.act(inputs, noise, steps=101)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@torch.no_grad()
def test_a_continuation_keeps_what_is_being_executed(sampler):
    method, inputs, noise = prepared(replace(SMALL, sampler=sampler, sampling_steps=10))
    previous = torch.rand(2, 4, 2) * 2 - 1
    weights = torch.tensor([1.0, 0.5, 0.0, 0.0])[None, :, None].expand(2, 4, 2)
    free = method.act(inputs, noise)
    held = method.act(inputs, noise, continuation=(previous, weights))
    torch.testing.assert_close(held[:, 0], previous[:, 0], atol=1e-4, rtol=0)
    assert ((held[:, 1] - previous[:, 1]).abs() < (free[:, 1] - previous[:, 1]).abs()).float().mean() > 0.7
    untouched = method.act(inputs, noise, continuation=(previous, torch.zeros_like(previous)))
    torch.testing.assert_close(untouched, free, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_row_of_a_batch_is_answered_as_alone():
    method, batch = make_method().eval(), random_batch(SMALL)
    inputs = observation_inputs(batch, SMALL)
    noise = {"action": torch.randn(3, 4, 2)}
    together = method.act(inputs, noise)
    for row in range(3):
        alone = method.act(inputs.rows([row]), {"action": noise["action"][row : row + 1]})
        torch.testing.assert_close(alone[0], together[row])


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 levels need a multiple of 4, got 18"):
        DiffusionPolicyConfig(horizon=18)
    with pytest.raises(ValueError, match="crop_size: expected at most"):
        replace(SMALL, crop_size=(33, 48))
    config = tiny_diffusion_policy()
    with pytest.raises(
        ValueError, match=re.escape("clips actions to [-1, 1], so theirs must be min_max, got mean_std")
    ):
        replace(config, data=replace(config.data, normalization="mean_std"))


# --- LeRobot's on the same weights ------------------------------------------------------------------------------------

NAMES = (
    (r"^unet\.step_encoder\.(\d)", lambda m: f"unet.diffusion_step_encoder.{int(m[1]) + 1}"),
    (r"^unet\.(down|up)sample\.(\d)", r"unet.\1_modules.\2.2"),
    (r"^unet\.(down|up)\.", r"unet.\1_modules."),
    (r"^unet\.middle\.", "unet.mid_modules."),
    (r"^unet\.final\.", "unet.final_conv.0.block."),
    (r"^unet\.output\.", "unet.final_conv.1."),
    (r"^(unet.*\.conv[12])\.", r"\1.block."),
    (r"^(unet.*)\.film\.", r"\1.cond_encoder."),
    (r"^(unet.*)\.shortcut\.", r"\1.residual_conv."),
    (r"^encoder\.stem\.", "rgb_encoder.backbone."),
    (r"^encoder\.blocks\.(\d)", lambda m: f"rgb_encoder.backbone.{4 + int(m[1]) // 2}.{int(m[1]) % 2}"),
    (r"^(rgb_encoder.*)\.norm", r"\1.bn"),
    (r"^(rgb_encoder.*)\.shortcut\.", r"\1.downsample."),
    (r"^encoder\.keypoints\.", "rgb_encoder.pool.nets."),
    (r"^encoder\.project\.", "rgb_encoder.out."),
)
"""Names of weights here and in LeRobot."""


def lerobot_name(name):
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def differences_to_lerobot(config, folder):
    """The largest differences of features, predicted noise and sampled chunks, weights of every kind made random."""
    method = make_method(config).eval()
    for parameter in method.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    frames = torch.randint(0, 256, (2, *config.crop_size, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    actions, condition = torch.randn(2, config.horizon, config.action_dim), torch.randn(2, config.condition_dim)
    step = torch.tensor([3, 96])
    inputs = {
        "frames": ((frames / 255 - mean) / std).movedim(-1, 1).contiguous(),
        "actions": actions,
        "condition": condition,
        "step": step,
    }
    settings = {
        "state_dim": config.state_dim,
        "horizon": config.horizon,
        "n_action_steps": 8,
        "down_dims": config.unet_channels,
        "spatial_softmax_num_keypoints": config.num_keypoints,
        "num_inference_steps": config.sampling_steps,
    }
    weights = {lerobot_name(name): value for name, value in method.state_dict().items()}
    tensors = weights | {f"input/{name}": value for name, value in inputs.items()}
    save_file(tensors, folder / "in.safetensors", metadata={"settings": json.dumps(settings)})
    script = ROOT / "tests" / "support" / "lerobot_diffusion.py"
    subprocess.run(
        [LEROBOT, script, folder / "in.safetensors", folder / "out.safetensors"],
        check=True,
        env={"HF_HUB_OFFLINE": "1"},
    )
    theirs = load_file(folder / "out.safetensors")
    method.condition = lambda _: condition
    ours = {
        "features": method.encoder(frames),
        "noise": method.unet(actions, step, condition),
        "chunk": method.act(None, {"action": actions}),
    }
    assert ours.keys() == theirs.keys()
    return {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}


@pytest.mark.slow
@pytest.mark.skipif(not LEROBOT.exists(), reason="needs LeRobot's environment: make env-lerobot")
def test_it_is_lerobots_on_the_same_weights(tmp_path):
    config = replace(
        diffusion_policy().method, frame_size=(96, 96), crop_size=(84, 84), pooling="spatial_softmax",
        unet_channels=(64, 128, 256), sampler="ddim", sampling_steps=10,
    )  # fmt: skip
    differences = differences_to_lerobot(config, tmp_path)
    print("largest difference to LeRobot:", differences)
    assert max(differences.values()) < 1e-5


# --- a whole life -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps that keeps every checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("diffusion_policy")
    collect("point", folder / "demonstrations", episodes=6, seed=0, demonstrator=demonstrator, progress=False)
    config = RunConfig(
        method=SMALL,
        data=DataConfig(path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",)),
        stage=StageConfig(
            steps=6, batch_size=8, learning_rate=3e-3, save_every=1, keep_checkpoints=6, validate_every=3, log_every=1,
            ema_decay=0.6, ema_power=0.75,
        ),
    )  # fmt: skip
    assert len(prepare(config)) == 1  # frames
    assert train(config, output=folder / "run")
    return folder / "run", config


def test_its_checkpoint_describes_itself(trained):
    run, config = trained
    assert read_config(resolve(run)) == config
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len([row for row in rows if "action_loss" in row]) == 6
    assert len([row for row in rows if "validation/action_loss" in row]) == 2
    assert {file.name for file in resolve(run).glob("*.safetensors")} >= {"encoder.safetensors", "unet.safetensors"}


def test_a_policy_acts_on_averaged_weights(trained, tmp_path):
    """Decays of at most 0.6, from 1 - (1 + n)^-0.75 on. An export holds the averages."""
    run, config = trained
    history = [load_method(run / f"step_{step:06d}", config).state_dict() for step in range(1, 7)]
    averaged = dict(history[0])
    for step, weights in enumerate(history[1:], start=1):
        decay = min(0.6, 1 - (1 + step) ** -0.75)
        averaged = {name: decay * averaged[name] + (1 - decay) * value for name, value in weights.items()}
    policy, exported = load_policy(run), load_policy(export(run, tmp_path / "export"))
    assert any(not torch.equal(policy.method.state_dict()[name], value) for name, value in history[-1].items())
    for name, value in averaged.items():
        torch.testing.assert_close(policy.method.state_dict()[name], value)
        assert torch.equal(exported.method.state_dict()[name], policy.method.state_dict()[name])


def test_it_resumes_bit_for_bit(trained, tmp_path):
    run, config = trained
    check_resumed(run, config, tmp_path / "run", step=3, parts=("encoder", "unet"))  # the averages are in the last


def test_two_ranks_train_what_one_process_trains(trained, tmp_path):
    run, config = trained
    rarely = replace(config, stage=replace(config.stage, save_every=100, validate_every=100))
    train_in_two_ranks(rarely, tmp_path / "run")
    sharded, whole = load_policy(tmp_path / "run"), load_policy(run)
    assert_same_weights(sharded.method.state_dict(), whole.method.state_dict())


def test_it_is_served(trained):
    policy = load_policy(trained[0])
    assert policy.spec.past == (-1,)
    check_served_episode(policy)


def test_a_policy_reads_the_observation_before(trained):
    policy, world = load_policy(trained[0]), PointWorld()
    first = world.reset(make_trial("t", "in_distribution", 3))
    second = world.step(first.state + 0.1).observation
    together = policy.encode([replace(second, past=(first,)), second])
    assert torch.equal(together.frames[0, 0], torch.from_numpy(first.frame))
    assert torch.equal(together.frames[0, 1], torch.from_numpy(second.frame))
    assert torch.equal(together.frames[1, 0], together.frames[1, 1])  # it repeats
    normalized = policy.stats["dot"].normalize("state", np.stack([first.state, second.state]))
    np.testing.assert_array_equal(together.states[0].numpy(), normalized)
    assert torch.equal(together.states[1], together.states[0, 1].expand(2, -1))
    with pytest.raises(ValueError, match=re.escape("expected past observations at the control steps (-1,), got 2")):
        policy.encode([replace(second, past=(first, first))])


def test_a_policy_sees_what_training_saw(trained):
    """Windows of the sampler and observations of a policy are the same inputs, at an episode's start and within it."""
    config = trained[1]
    sources = open_sources(config.data)
    stats = embodiment_stats(sources)
    sampler = make_sampler(config, sources, stats, None, None)
    policy, dataset = load_policy(trained[0]), sources[0].dataset
    episode = int(np.argmax(dataset.lengths))
    steps = (0, 1, dataset.lengths[episode] - 1)
    windows = observation_inputs(sampler._assemble(np.array([(0, episode, step) for step in steps])), config.method)
    frames, states = dataset.frames(episode), dataset.states(episode)

    def moment(step):
        return Observation(frame=frames[step], state=states[step], instruction="go", embodiment="dot")

    observations = [replace(moment(step), past=(moment(max(0, step - 1)),)) for step in steps]
    seen = policy.encode(observations)
    assert torch.equal(seen.frames, windows.frames)
    assert torch.equal(seen.states, windows.states)
    decoding = make_sampler(replace(config, data=replace(config.data, cached=())), sources, stats, None, None)
    cached, decoded = sampler.batch(0).tensors, decoding.batch(0).tensors
    assert all(torch.equal(value, decoded[name]) for name, value in cached.items())


def test_it_is_evaluated_by_name(trained, monkeypatch, capsys):
    run, _ = trained
    check_evaluated_by_name(run, monkeypatch, capsys)


def test_it_is_planned(trained):
    cost = measure(trained[1])
    assert cost.parameters == count(SMALL)
    assert cost.flops_per_sample > 2 * cost.validation_flops_per_sample > 0
