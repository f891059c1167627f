"""UWM: its loss and its sampler by hand, its four modes, and a whole life: trained, resumed, sharded, served."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from agra.api import diagnose, make_sampler, prepare, report, train
from agra.batch import Batch
from agra.checkpoints.folder import newest, resolve
from agra.checkpoints.read import read_config
from agra.config import RunConfig
from agra.data.config import AugmentConfig, DataConfig, SourceConfig
from agra.data.features.online import OnlineEncoder
from agra.data.sampling.augment import augment
from agra.data.source import embodiment_stats, open_sources
from agra.diagnostics.record import read_diagnosis
from agra.diagnostics.samples.sources import dataset_samples
from agra.evaluation.collect import collect
from agra.methods.method import Imagines, observation_inputs
from agra.methods.uwm import UWMConfig
from agra.policies.load import load_method, load_policy
from agra.recipes import compose, tiny_uwm, uwm
from agra.rng import sharded_rng
from agra.simulators.registry import SUITES, Suite
from agra.stages import Stage, StageConfig
from agra.training.memory_estimate import encoding_flops_per_sample, measure
from agra.types import Observation
from agra.wam.codec import CodecConfig, to_frames, to_video
from agra.wam.joint_transformer import JointTransformerConfig
from agra.wam.text import TextConfig, mean_token
from tests.support.method_life import check_evaluated_by_name, check_resumed, check_served_episode
from tests.support.point_world import Expert, PointWorld, demonstrator, make_trial
from tests.support.two_ranks import train_in_two_ranks

SMALL = UWMConfig(
    frame_size=(32, 48),
    future_frames=(4, 5),
    image_codec=CodecConfig(kind="patch_pca", channels=6),
    encoder_channels=(16, 32),
    vector_dim=8,
    state_dim=2,
    action_dim=2,
    horizon=4,
    transformer=JointTransformerConfig(
        width=16, num_blocks=2, num_heads=2, num_registers=2, patch_size=(2, 3), step_dim=8
    ),
    sampling_steps=5,
)


def random_batch(config=SMALL, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames, shapes = config.num_observations, config.shapes
    tokens = torch.randn(count, *shapes.instruction, generator=generator) if config.language == "pooled" else None
    batch = Batch(
        state=torch.zeros(count, config.state_dim),
        states=torch.rand(count, frames, config.state_dim, generator=generator) * 2 - 1,
        actions=torch.rand(count, config.horizon, config.action_dim, generator=generator) * 2 - 1,
        action_mask=torch.rand(count, config.horizon, config.action_dim, generator=generator) < 0.7,
        embodiment=torch.zeros(count, dtype=torch.long),
        frames=torch.randint(0, 256, (count, frames, *config.frame_size, 3), generator=generator, dtype=torch.uint8),
        frame_latents=torch.randn(count, *config.image_shape, generator=generator),
        frame_mask=torch.ones(count, config.image_shape[0], dtype=torch.bool),
        instruction=tokens,
    )
    batch.frame_mask[0, 1] = False
    return batch


def make_method(config=SMALL, seed=0):
    """A method whose blocks do something: the gates start at zero."""
    torch.manual_seed(seed)
    method = config.build()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.3)
    return method


# --- sizes ------------------------------------------------------------------------------------------------------------


def count(config):
    with torch.device("meta"):
        method = config.build()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.parts().items()}
    assert sum(p.numel() for p in method.parameters()) == sum(counts.values())
    return counts


def test_published_sizes():
    published = uwm().method
    assert published.image_shape == (2, 4, 28, 28)
    assert published.transformer.token_grid((28, 28)) == (7, 7)
    # One camera, text, 29 numbers of state: 257.3 M were reckoned for the original's sizes.
    assert count(replace(published, state_dim=29)) == {"encoder": 11_866_176, "transformer": 257_311_901}
    sines = 2 * 29 * (12 * 6 + 2) * 768  # GR1's states are sines and cosines, two observations
    assert count(published) == {"encoder": 11_866_176, "transformer": 257_311_901 + sines}
    silent = count(replace(published, language="none"))
    assert silent["encoder"] == 11_176_512 + 513 * 768  # ResNet-18 and its projection
    assert count(published)["encoder"] - silent["encoder"] == 385 * 768
    assert count(published)["transformer"] - silent["transformer"] == 768 * (12 * 6 + 2) * 768


def test_tiny_size():
    assert count(tiny_uwm().method) == {"encoder": 1_088_448, "transformer": 2_086_272}
    assert tiny_uwm().method.transformer.token_grid(tiny_uwm().method.image_shape[2:]) == (4, 7)


def test_it_composes_with_the_presets_of_data():
    config = compose("uwm", Stage.JOINT, ["gr1_few_shot"])
    assert (config.method, config.stage.steps, len(config.data.mixture)) == (uwm().method, 40_000, 24)
    assert config.data.augment == uwm().data.augment
    with pytest.raises(ValueError, match="uwm: expected the joint stage, the only one of this method, got adapt"):
        compose("uwm", Stage.ADAPT)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="future_frames: expected ascending frames after the observation"):
        replace(SMALL, future_frames=(0, 4))
    with pytest.raises(ValueError, match=re.escape("latents of (4, 6) do not divide into patches of (3, 3)")):
        replace(SMALL, transformer=replace(SMALL.transformer, patch_size=(3, 3)))
    with pytest.raises(ValueError, match="sampling_steps: expected 1 to 100, got 101"):
        replace(SMALL, sampling_steps=101)
    with pytest.raises(ValueError, match=re.escape("clips actions to [-1, 1], so theirs must be min_max")):
        replace(tiny_uwm(), data=replace(tiny_uwm().data, normalization="mean_std"))


def test_the_condition_holds_frames_then_states_then_the_instruction():
    config = replace(SMALL, language="pooled", text_encoder=TextConfig(kind="minilm", length=5), text_dim=6)
    method, batch = make_method(config), random_batch(config)
    condition, encoder = method.encoder(batch), method.encoder
    assert condition.shape == (3, 2 * 8 + 2 * 2 + 8)
    assert config.condition_dim == condition.shape[1]
    for place in range(2):
        vector = encoder.project(encoder.frames(batch.frames[:, place]))
        torch.testing.assert_close(condition[:, 8 * place : 8 * place + 8], vector)
        assert torch.equal(condition[:, 16 + 2 * place : 18 + 2 * place], batch.states[:, place])
    torch.testing.assert_close(condition[:, 20:], encoder.text(mean_token(batch.instruction)))
    assert SMALL.text is None
    assert not SMALL.needs().instruction


# --- the loss ---------------------------------------------------------------------------------------------------------


def alpha_bars(steps=100):
    """The squared cosine, with betas of at most 0.999."""
    level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.cumprod([1 - min(1 - level[i + 1] / level[i], 0.999) for i in range(steps)])


def loss_by_hand(method, batch, seed):
    """The two losses. The draws are those of the method: two noises, then two steps."""
    torch.manual_seed(seed)
    rows, bars = len(batch), alpha_bars()
    noises = torch.randn(batch.actions.shape), torch.randn(batch.frame_latents.shape)
    steps = [torch.randint(100, (rows,)) for _ in range(2)]
    for row in range(rows):
        if not batch.action_mask[row].any():
            steps[0][row] = 99
    clean = batch.actions, batch.frame_latents / 3
    noisy = [
        torch.stack([bars[step[i]] ** 0.5 * x[i] + (1 - bars[step[i]]) ** 0.5 * noise[i] for i in range(rows)]).float()
        for step, x, noise in zip(steps, clean, noises, strict=True)
    ]
    predicted = [x.detach() for x in method.transformer(*noisy, *steps, method.encoder(batch))]
    actions = [
        (predicted[0][place] - noises[0][place]).item() ** 2
        for place in map(tuple, batch.action_mask.nonzero().tolist())
    ]
    frames = [
        float((predicted[1][row, frame] - noises[1][row, frame]).square().mean())
        for row, frame in batch.frame_mask.nonzero().tolist()
    ]
    return sum(actions) / len(actions), sum(frames) / len(frames)


def test_the_loss_is_both_noise_errors_one_to_one():
    method, batch = make_method(), random_batch()
    torch.manual_seed(3)
    loss = method(batch)
    action, dynamics = loss_by_hand(method, batch, 3)
    assert loss.terms["action"].item() == pytest.approx(action, rel=1e-5)
    assert loss.terms["dynamics"].item() == pytest.approx(dynamics, rel=1e-5)
    assert loss.total.item() == pytest.approx(action + dynamics, rel=1e-5)
    assert method.counts(batch) == {"actions": batch.action_mask.sum().item(), "frames": 5}


def test_a_sample_without_actions_is_video_at_the_last_step():
    method, batch = make_method(), random_batch()
    batch.action_mask[1] = False
    torch.manual_seed(3)
    loss = method(batch)
    action, dynamics = loss_by_hand(method, batch, 3)
    assert loss.terms["action"].item() == pytest.approx(action, rel=1e-5)
    assert loss.terms["dynamics"].item() == pytest.approx(dynamics, rel=1e-5)
    batch.action_mask[:], batch.frame_mask[:] = False, False
    assert method(batch).total.item() == 0  # nothing to learn is no division by zero


class Spy(nn.Module):
    """A stand-in for the transformer that depends on everything and keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, actions, images, action_step, image_step, condition):
        self.calls.append((actions, images, action_step, image_step))
        seen = condition[:, 0] + images.mean(dim=(1, 2, 3, 4)) + 0.002 * image_step
        also = condition[:, 1] + actions.mean(dim=(1, 2)) + 0.002 * action_step
        return (
            torch.sin(2 * actions) + 0.01 * action_step[:, None, None] + 0.1 * seen[:, None, None],
            torch.cos(2 * images)
            - 0.01 * image_step[:, None, None, None, None]
            + 0.1 * also[:, None, None, None, None],
        )


def test_the_two_steps_are_uniform_and_independent():
    method, batch = make_method(), random_batch(count=2)
    method.encoder, method.transformer = nn.Identity(), Spy()
    method.encoder.forward = lambda inputs: torch.zeros(len(inputs), 2)
    rows = 20_000
    many = {name: value[:1].expand(rows, *value.shape[1:]) for name, value in batch.tensors.items()}
    torch.manual_seed(0)
    method(Batch(**many))
    *_, action_step, image_step = method.transformer.calls[0]
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (action_step.numpy() // 25, image_step.numpy() // 25), 1)
    assert abs(pairs - rows / 16).max() < 5 * (rows / 16) ** 0.5
    for step in (action_step, image_step):
        assert (step.min(), step.max()) == (0, 99)


def test_micro_batches_have_the_loss_of_the_whole_step():
    method, batch = make_method(), random_batch(count=4)
    with sharded_rng(0, 1, samples=4):
        whole = method(batch).total
    denominators = {"actions": batch.action_mask.sum() / 2, "frames": batch.frame_mask.sum() / 2}
    halves = []
    for index in range(2):
        with sharded_rng(0, 1, samples=2, index=index, count=2):
            halves.append(method(batch.micro_batch(index, 2), denominators).total)
    torch.testing.assert_close(sum(halves) / 2, whole)


# --- the four modes ---------------------------------------------------------------------------------------------------


def prepared(rows=2, **changes):
    config = replace(SMALL, **changes)
    method, batch = make_method(config).eval(), random_batch(config, rows)
    method.transformer = Spy()
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(rows, *shape, generator=generator) for name, shape in method.noise_shapes().items()}
    return method, batch, observation_inputs(batch, config), noise


def chain(method, inputs, start, fixed, fixed_step, *, images, steps=range(80, -1, -20)):
    """DDIM by hand, beside a modality that stays `fixed`."""
    bars, sample = alpha_bars(), start.double().numpy()
    condition = method.encoder(inputs).detach().double().numpy()
    fixed = fixed.double().numpy().reshape(len(sample), -1)
    seen = condition[:, 1 if images else 0] + fixed.mean(axis=1) + 0.002 * fixed_step
    seen = 0.1 * seen.reshape(-1, *[1] * (sample.ndim - 1))
    apart = steps[0] - steps[1]
    for step in steps:
        error = (np.cos(2 * sample) - 0.01 * step if images else np.sin(2 * sample) + 0.01 * step) + seen
        clean = np.clip((sample - (1 - bars[step]) ** 0.5 * error) / bars[step] ** 0.5, -1, 1)
        before = bars[step - apart] if step else 1.0
        sample = before**0.5 * clean + (1 - before) ** 0.5 * error
    return sample


@torch.no_grad()
def test_the_policy_marginalises_the_future_at_the_first_step_of_the_schedule():
    method, _, inputs, noise = prepared(sampling_steps=10)
    expected = chain(method, inputs, noise["action"], noise["image"], 90, images=False, steps=range(90, -1, -10))
    np.testing.assert_allclose(method.act(inputs, noise).numpy(), expected, atol=1e-5)
    assert np.abs(expected).max() <= 1
    for index, (_, images, action_step, image_step) in enumerate(method.transformer.calls):
        assert torch.equal(images, noise["image"])
        assert image_step.tolist() == [90, 90]
        assert action_step.tolist() == [90 - 10 * index] * 2
    twenty = chain(method, inputs, noise["action"], noise["image"], 95, images=False, steps=range(95, -1, -5))
    np.testing.assert_allclose(method.act(inputs, noise, steps=20).numpy(), twenty, atol=1e-5)


@torch.no_grad()
def test_inverse_dynamics_reads_clean_frames():
    method, batch, inputs, noise = prepared()
    answer = method.inverse_dynamics(inputs, batch.frame_latents, noise)
    expected = chain(method, inputs, noise["action"], batch.frame_latents / 3, 0, images=False)
    np.testing.assert_allclose(answer.numpy(), expected, atol=1e-5)
    assert all(call[3].tolist() == [0, 0] for call in method.transformer.calls)


@torch.no_grad()
def test_forward_dynamics_reads_clean_actions():
    method, batch, inputs, noise = prepared()
    answer = method.forward_dynamics(inputs, batch.actions, noise)
    expected = chain(method, inputs, noise["image"], batch.actions, 0, images=True)
    np.testing.assert_allclose(answer.numpy(), 3 * expected, atol=3e-5)
    assert all(call[2].tolist() == [0, 0] for call in method.transformer.calls)
    assert np.abs(expected).max() <= 1


@torch.no_grad()
def test_video_marginalises_the_actions():
    method, _, inputs, noise = prepared()
    answer = method.predict_video(inputs, noise)
    expected = chain(method, inputs, noise["image"], noise["action"], 80, images=True)
    np.testing.assert_allclose(answer.numpy(), 3 * expected, atol=3e-5)
    imagined = method.imagine(inputs, noise, steps=5)
    assert torch.equal(imagined[:, :, 0], answer[:, 0])
    assert imagined.shape == (2, 6, 1, 4, 6)


@torch.no_grad()
def test_a_continuation_keeps_what_is_being_executed():
    method, _, inputs, noise = prepared()
    previous = torch.rand(2, 4, 2) * 2 - 1
    weights = torch.tensor([1.0, 0.5, 0.0, 0.0])[None, :, None].expand(2, 4, 2)
    held = method.act(inputs, noise, continuation=(previous, weights))
    torch.testing.assert_close(held[:, 0], previous[:, 0], atol=1e-4, rtol=0)
    free = method.act(inputs, noise, continuation=(previous, torch.zeros_like(previous)))
    torch.testing.assert_close(free, method.act(inputs, noise), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_row_of_a_batch_is_answered_as_alone():
    method, batch = make_method().eval(), random_batch()
    inputs = observation_inputs(batch, SMALL)
    assert inputs.frame_latents is None
    noise = {name: torch.randn(3, *shape) for name, shape in method.noise_shapes().items()}
    together = method.act(inputs, noise)
    for row in range(3):
        alone = method.act(inputs.rows([row]), {name: value[row : row + 1] for name, value in noise.items()})
        torch.testing.assert_close(alone[0], together[row])


# --- a whole life -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps that keeps every checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("uwm")
    collect("point", folder / "demonstrations", episodes=6, seed=0, demonstrator=demonstrator, progress=False)
    config = RunConfig(
        method=SMALL,
        data=DataConfig(path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",)),
        stage=StageConfig(
            steps=6, batch_size=8, learning_rate=3e-3, save_every=1, keep_checkpoints=6, validate_every=3, log_every=1,
        ),
    )  # fmt: skip
    assert len(prepare(config)) == 2  # latents of single frames, and frames
    assert train(config, output=folder / "run")
    return folder / "run", config


def open_sampler(config, *, online=False):
    sources = open_sources(config.data)
    encoder = OnlineEncoder.open(config.method, config.data, sources) if online else None
    return make_sampler(config, sources, embodiment_stats(sources), None, encoder), sources[0].dataset


def test_its_checkpoint_describes_itself(trained):
    run, config = trained
    assert read_config(resolve(run)) == config
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len([row for row in rows if {"action_loss", "dynamics_loss"} <= row.keys()]) == 6
    assert len([row for row in rows if "validation/dynamics_loss" in row]) == 2
    names = {file.name for file in resolve(run).glob("*.safetensors")}
    assert names >= {"encoder.safetensors", "transformer.safetensors", "codec.safetensors"}


def test_future_frames_are_encoded_alone_and_masked_past_the_end(trained):
    sampler, dataset = open_sampler(trained[1])
    codec = load_policy(trained[0]).codec
    episode = int(np.argmax(dataset.lengths))
    length, frames = int(dataset.lengths[episode]), dataset.frames(episode)
    assert length == 5
    starts = (0, 1, 4)
    batch = sampler._assemble(np.array([(0, episode, start) for start in starts]))
    assert batch.frame_mask.tolist() == [[True, False], [False, False], [False, False]]
    assert sampler.windows_of[0].recorded(episode, 2, (-3, -2, 2, 3)).tolist() == [False, True, True, False]
    for row, start in enumerate(starts):
        for place, step in enumerate((start + 4, start + 5)):
            video = to_video(frames[min(step, length - 1)][None], SMALL.frame_size)
            expected = codec.encode(video)[0, :, 0].half().float()
            torch.testing.assert_close(batch.frame_latents[row, place], expected, atol=2e-3, rtol=2e-3)


def test_it_resumes_bit_for_bit(trained, tmp_path):
    run, config = trained
    check_resumed(run, config, tmp_path / "run", step=3, parts=("encoder", "transformer"))


def test_two_ranks_train_what_one_process_trains(trained, tmp_path):
    run, config = trained
    rarely = replace(config, stage=replace(config.stage, save_every=100, validate_every=100))
    train_in_two_ranks(rarely, tmp_path / "run")
    sharded, whole = load_policy(tmp_path / "run"), load_policy(run)
    # While the gates are near zero, the encoder's gradients are tiny, and Adam scales their rounding up.
    for name, value in whole.method.state_dict().items():
        torch.testing.assert_close(sharded.method.state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_it_is_served(trained):
    policy = load_policy(trained[0])
    assert policy.spec.past == (-1,)
    check_served_episode(policy)


def test_a_policy_sees_what_training_saw(trained):
    """Windows of the sampler and observations of a policy are the same inputs, and decoded frames the cached ones."""
    config = trained[1]
    sampler, dataset = open_sampler(config)
    policy, episode = load_policy(trained[0]), 0
    windows = observation_inputs(sampler._assemble(np.array([(0, episode, step) for step in (0, 2)])), config.method)
    frames, states = dataset.frames(episode), dataset.states(episode)

    def moment(step):
        return Observation(frame=frames[step], state=states[step], instruction="go", embodiment="dot")

    seen = policy.encode([replace(moment(step), past=(moment(max(0, step - 1)),)) for step in (0, 2)])
    assert torch.equal(seen.frames, windows.frames)
    assert torch.equal(seen.states, windows.states)
    assert seen.frame_latents is None
    uncached = replace(config, data=replace(config.data, cached=()))
    decoded, cached = (open_sampler(c, online=c is uncached)[0].batch(0).tensors for c in (uncached, config))
    assert cached.keys() == decoded.keys()
    assert all(torch.equal(value, decoded[name]) for name, value in cached.items())


def test_present_and_future_have_the_same_crop_and_colours(trained):
    run, config = trained
    settings = AugmentConfig(crop=0.8)
    augmented = replace(config, data=replace(config.data, cached=(), augment=settings))
    sampler, dataset = open_sampler(augmented, online=True)
    codec, batch = load_policy(run).codec, sampler.batch(3)
    seeds = np.random.SeedSequence([config.stage.seed, 3, 2]).spawn(len(batch))
    for row, (_, episode, start) in enumerate(sampler.windows(3).tolist()):
        steps = np.clip(start + np.array([-1, 0, 4, 5]), 0, dataset.lengths[episode] - 1)
        clip = augment(dataset.frames(episode)[steps], settings, np.random.default_rng(seeds[row]))
        np.testing.assert_array_equal(batch.frames[row].numpy(), clip[:2])
        for place in range(2):
            expected = codec.encode(to_video(clip[None, 2 + place], SMALL.frame_size))[0, :, 0]
            torch.testing.assert_close(batch.frame_latents[row, place], expected, atol=2e-3, rtol=2e-3)


def test_it_imagines_the_frame_at_the_chunks_end(trained):
    run, config = trained
    policy = load_policy(run)
    assert isinstance(policy.method, Imagines)
    first = PointWorld().reset(make_trial("t", "in_distribution", 3))
    policy.reset(0)
    plain = policy.act(first)
    policy.reset(0)
    chunk = policy.act_and_imagine(first)
    np.testing.assert_array_equal(chunk.actions, plain.actions)
    assert chunk.imagined.shape == (2, 32, 48, 3)
    np.testing.assert_array_equal(chunk.imagined[0], first.frame)
    policy.reset(0)
    inputs, noise = policy.encode([first]), policy.noise(1, 0)
    latents = policy.method.predict_video(inputs, noise, steps=10)[:, 0]
    expected = to_frames(policy.codec.decode(latents[:, :, None]))[0, 0]
    assert np.abs(policy.imagine(inputs, noise, steps=10)[0, 1].astype(int) - expected).max() == 0
    assert config.method.imagined_frames == (0, 4)
    sample, recorded = dataset_samples(config, 1)[0], open_sampler(config)[1].frames(5)
    np.testing.assert_array_equal(sample.video, recorded[[0, min(4, len(recorded) - 1)]])


def test_its_instruments(trained, monkeypatch, tmp_path):
    """The observation enters as one vector, so there is no token grid to read or to replace."""
    run, _ = trained
    monkeypatch.setitem(SUITES, "point", Suite(make=PointWorld, install="", expert=Expert))
    read = read_diagnosis(diagnose(run, simulator="point", samples=4))
    assert set(read.header["not_applicable"]) == {"attention", "interventions", "hidden_states", "text_attention"}
    assert all(row["in_mask_ratio"] is row["deviation"] is None for row in read.rows)
    assert all(row["action_error"] > 0 and row["psnr"] > 0 for row in read.rows)
    assert read.arrays["imagined"].shape[1:] == read.arrays["recorded"].shape[1:] == (2, 32, 48, 3)
    page = report([run], output=tmp_path / "report.html").read_text()
    assert "not applicable" in page
    assert "Predicted video" in page


def test_it_is_evaluated_by_name(trained, monkeypatch, capsys):
    run, _ = trained
    check_evaluated_by_name(run, monkeypatch, capsys)


def test_it_is_planned(trained):
    cost = measure(trained[1])
    assert cost.parameters == count(SMALL)
    assert cost.flops_per_sample > 2 * cost.validation_flops_per_sample > 0
    assert encoding_flops_per_sample(uwm().method)["frame_latents"] > 1e11


def test_video_without_actions_trains_beside_demonstrations(trained, tmp_path):
    """A source of the same embodiment whose actions are all missing."""
    config = trained[1]
    folder = tmp_path / "videos"
    shutil.copytree(config.data.path, folder)
    keys = {"state": ("observation.state",), "action": ("action",)}
    mixture = (
        SourceConfig(path=config.data.path, embodiment="dot", **keys),
        SourceConfig(path=str(folder), embodiment="dot", missing_keys=("action",), **keys),
    )
    data = replace(config.data, path="", mixture=mixture, cache=str(tmp_path / "cache"))
    mixed = replace(config, data=data, stage=replace(config.stage, steps=2))
    prepare(mixed)
    sampler, _ = open_sampler(mixed)
    windows, batch = sampler.windows(0), sampler.batch(0)
    assert {0, 1} == set(windows[:, 0])
    assert batch.action_mask.flatten(1).any(dim=1).tolist() == (windows[:, 0] == 0).tolist()
    assert train(mixed, output=tmp_path / "run")
    assert load_method(newest(tmp_path / "run"), mixed)
