"""DiT4DiT: its equations written out on a checkpoint in the released layout, and a whole life: trained, resumed, sharded, served.

Run as a program, the file trains the config in a JSON file in two processes: `test_dit4dit.py CONFIG OUTPUT`.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers.models.transformers.transformer_cosmos as stock
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, interpolate, layer_norm, silu

from agra.api import prepare, train
from agra.checkpoints.folder import resolve
from agra.checkpoints.read import read_config
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.evaluation.collect import collect
from agra.methods.dit4dit import DiT4DiTConfig, load_dit4dit
from agra.methods.method import observation_inputs
from agra.methods.wam import NoiseLevels, ObjectiveConfig, Pass
from agra.policies.load import load_policy
from agra.recipes import compose, dit4dit, dit4dit_attached, tiny_dit4dit, tiny_dit4dit_attached, tiny_wam
from agra.rng import sharded_rng
from agra.stages import Stage, StageConfig
from agra.wam.text import TextConfig
from tests.support.method_life import check_resumed, check_served_chunk
from tests.support.point_world import demonstrator
from tests.support.small import make_small_config, random_batch, with_model
from tests.support.two_ranks import assert_same_weights, train_in_two_ranks

ROOT = Path(__file__).parents[2]
LAYER, LEVEL, DRAWS = 2, 0.99502, 4
VIDEO, ACTION = "backbone_interface.extractor.transformer.", "action_model."


def small_config(**changes):
    """The published architecture with small networks: 4 video blocks, 4 action sub-blocks."""
    config = make_small_config()
    model, published = config.method.model, DiT4DiTConfig()
    head = replace(
        published.model.action_dit, state_dim=5, action_dim=3, horizon=4, num_blocks=2, num_heads=2, head_dim=16,
        guidance_dim=32, hidden_dim=24, dropout=0.0, max_horizon=8,
    )  # fmt: skip
    bridge = replace(model.bridge, layers=(LAYER, LAYER), projector="identity", position_grid=None)
    model = replace(model, guidance_noise_level=LEVEL, bridge=bridge, action_dit=head)
    data = replace(config.data, embodiments=("tabletop",))
    return replace(config, method=replace(published, model=model, **changes), data=data)


# --- sizes and recipes ------------------------------------------------------------------------------------------------


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_published_sizes():
    method = dit4dit().method
    assert method == DiT4DiTConfig()
    with torch.device("meta"):
        built = method.build()
    assert set(built.parts()) == set(method.part_names) == {"video_dit", "action_dit"}
    assert count(built) == count(*built.parts().values())
    head = built.wam.action_dit
    assert count(head.blocks, head.time_embedding, head.modulation_out, head.project_out) == 151_922_176
    assert count(head) == 163_276_320
    assert count(built.wam.video_dit) == 2_059_174_912
    assert method.model.token_grid == (3, 14, 14)


def test_published_settings():
    config = compose("dit4dit", Stage.JOINT, ["gr1"])
    assert {source.frame_stride for source in config.data.sources} == {2}
    assert config.stage.rate_of("video_dit") == 1e-5
    assert config.stage.rate_of("action_dit") == 1e-4
    assert round(config.stage.warmup_ratio * config.stage.steps) == 5000
    assert config.method.objective.noise_levels is NoiseLevels.UNIFORM
    assert config.method.model.bridge.layers == (17,) * 8
    assert replace(dit4dit_attached().method, detach=True) == config.method
    assert compose("dit4dit", Stage.ADAPT).stage.frozen == ("action_dit",)
    assert RunConfig.from_json(config.to_json()) == config


def test_tiny_is_tiny_wam_but_for_the_method():
    ours, theirs = tiny_dit4dit(), tiny_wam()
    assert replace(ours, method=theirs.method) == theirs
    model, other = ours.method.model, theirs.method.model
    assert model.bridge.layers == (3,) * 4
    assert replace(model, bridge=other.bridge, guidance_noise_level=1.0) == other
    assert replace(ours.method.objective, noise_levels=NoiseLevels.LOGIT_NORMAL) == theirs.method.objective
    assert (ours.method.detach, tiny_dit4dit_attached().method.detach) == (True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, alignment=make_small_config().method.alignment), "a WAM with an alignment is the method wam"),
        (
            lambda m: replace(m, model=replace(m.model, bridge=replace(m.model.bridge, layers=(1, 2)))),
            r"DiT4DiT reads one layer, got \[1, 2\]",
        ),
        (
            lambda m: replace(m, objective=ObjectiveConfig(guidance_pass=Pass.DENOISING, aligned_pass=Pass.DENOISING)),
            "head reads the conditioning pass",
        ),
        (
            lambda m: RunConfig(method=replace(m, objective=replace(m.objective, video_weight=0.0)), data=DataConfig()),
            "nothing trains the video DiT; add video_dit to stage.frozen",
        ),
    ],
)  # fmt: skip
def test_what_it_is_not_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(small_config().method)


# --- its equations, on a checkpoint in the released layout -------------------------------------------------------------


@pytest.fixture(autouse=True)
def _resize_without_torchvision(monkeypatch):
    """Replace the nearest resize of the padding mask, for which the stock forward pass needs torchvision."""
    functional = SimpleNamespace(
        resize=lambda mask, size, interpolation: interpolate(mask, size=size, mode=interpolation)
    )
    stand_in = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(stock, "transforms", stand_in, raising=False)


def released_shapes(head):
    """Names and shapes of the released action model."""
    width, hidden = head.width, head.hidden_dim
    linears = {
        "state_encoder.layer1": (head.state_dim, hidden),
        "state_encoder.layer2": (hidden, width),
        "action_encoder.layer1": (head.action_dim, width),
        "action_encoder.layer2": (2 * width, width),
        "action_encoder.layer3": (width, width),
        "action_decoder.layer1": (hidden, hidden),
        "action_decoder.layer2": (hidden, head.action_dim),
        "model.timestep_encoder.timestep_embedder.linear_1": (256, width),
        "model.timestep_encoder.timestep_embedder.linear_2": (width, width),
        "model.proj_out_1": (width, 2 * width),
        "model.proj_out_2": (width, hidden),
    }
    for i in range(2 * head.num_blocks):
        context = head.guidance_dim if i % 2 == 0 else width
        block = {"norm1.linear": (width, 2 * width), "attn1.to_q": (width, width), "attn1.to_k": (context, width),
                 "attn1.to_v": (context, width), "attn1.to_out.0": (width, width),
                 "ff.net.0.proj": (width, 4 * width), "ff.net.2": (4 * width, width)}  # fmt: skip
        linears |= {f"model.transformer_blocks.{i}.{name}": sizes for name, sizes in block.items()}
    shapes = {"position_embedding.weight": (head.max_horizon, width)}
    for name, (inputs, outputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return shapes


class Released:
    """DiT4DiT's equations on the tensors of a released checkpoint: diffusers' video transformer, the head by hand."""

    def __init__(self, model, seed=0):
        torch.manual_seed(seed)
        self.model, self.head = model, model.action_dit
        self.transformer = model.video_dit.build()
        for parameter in self.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        self.weights = {name: torch.randn(shape) * 0.2 for name, shape in released_shapes(self.head).items()}

    def save(self, folder):
        tensors = {VIDEO + name: value for name, value in self.transformer.state_dict().items()}
        tensors |= {ACTION + name: value for name, value in self.weights.items()}
        tensors |= {f"backbone_interface.extractor.{part}.weight": torch.zeros(2) for part in ("vae", "text_encoder")}
        tensors[f"{ACTION}unused"] = torch.zeros(1)
        save_file(tensors, folder / "model.safetensors")
        return folder

    def video(self, observed, noisy, level, text):
        """Velocity, and the hidden tokens of the layer, as a hook on the block sees them."""
        latents = torch.cat([observed, noisy[:, :, 1:]], dim=2)
        mask = torch.zeros_like(latents[:, :1])
        mask[:, :, 0] = 1
        levels = torch.cat(
            [torch.full((len(latents), 1), 1e-4), level[:, None].expand(-1, latents.shape[2] - 1)], dim=1
        )
        hidden = []
        block = self.transformer.transformer_blocks[LAYER]
        hook = block.register_forward_hook(lambda _, __, out: hidden.append(out))
        velocity = self.transformer(
            hidden_states=latents, timestep=levels[:, None, :, None, None], encoder_hidden_states=text,
            condition_mask=mask, padding_mask=torch.zeros(1, 1, *self.model.frame_size),
        ).sample  # fmt: skip
        hook.remove()
        return velocity, hidden[0]

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, name, x):
        return self.linear(f"{name}.layer2", self.linear(f"{name}.layer1", x).clamp(min=0))

    def attention(self, name, x, context):
        heads = self.head.num_heads
        q, k, v = (
            self.linear(f"{name}.to_{part}", source).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, source in (("q", x), ("k", context), ("v", context))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear(f"{name}.to_out.0", (weights @ v).transpose(1, 2).flatten(2))

    def velocity(self, noisy, state, level, tokens):
        """The head: time counts from 0 at the data to 1000 at noise, each cross-attention reads the same tokens."""
        width, step = (self.head.width,), (level * 1000).floor()
        angles = step[:, None] * 10_000 ** (-torch.arange(width[0] // 2) / (width[0] // 2))
        time = torch.cat([angles.sin(), angles.cos()], -1)[:, None].expand(-1, noisy.shape[1], -1)
        x = torch.cat([self.linear("action_encoder.layer1", noisy), time], -1)
        x = self.linear("action_encoder.layer3", silu(self.linear("action_encoder.layer2", x)))
        x = x + self.weights["position_embedding.weight"][: noisy.shape[1]]
        x = torch.cat([self.mlp("state_encoder", state[:, None]), x], dim=1)
        angles = step[:, None] * 10_000 ** (-torch.arange(128) / 127)
        embedder = "model.timestep_encoder.timestep_embedder"
        embedded = self.linear(f"{embedder}.linear_1", torch.cat([angles.cos(), angles.sin()], -1))
        embedded = silu(self.linear(f"{embedder}.linear_2", silu(embedded)))
        for i in range(2 * self.head.num_blocks):
            name = f"model.transformer_blocks.{i}"
            scale, shift = self.linear(f"{name}.norm1.linear", embedded)[:, None].chunk(2, -1)
            h = layer_norm(x, width) * (1 + scale) + shift
            x = x + self.attention(f"{name}.attn1", h, tokens if i % 2 == 0 else h)
            h = gelu(self.linear(f"{name}.ff.net.0.proj", layer_norm(x, width)), approximate="tanh")
            x = x + self.linear(f"{name}.ff.net.2", h)
        shift, scale = self.linear("model.proj_out_1", embedded)[:, None].chunk(2, -1)
        x = self.linear("model.proj_out_2", layer_norm(x, width, eps=1e-6) * (1 + scale) + shift)
        return self.mlp("action_decoder", x)[:, -noisy.shape[1] :]

    def act(self, inputs, noise):
        """One video pass at the scheduler's first level, four Euler steps from noise to actions."""
        level = torch.full((len(inputs.state),), LEVEL)
        _, tokens = self.video(inputs.latents, noise["video"], level, inputs.instruction)
        actions = noise["action"]
        for level in (1.0, 0.75, 0.5, 0.25):
            actions = actions - 0.25 * self.velocity(actions, inputs.state, torch.full((len(actions),), level), tokens)
        return actions


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The equations, and a method that has imported their weights."""
    config = small_config()
    equations, method = Released(config.method.model), config.method.build()
    folder = equations.save(tmp_path_factory.mktemp("released"))
    assert load_dit4dit(method, folder) == (f"{ACTION}unused",)
    return equations, method.eval(), config


def answer_noise(method, count=4):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in method.noise_shapes().items()}


@torch.no_grad()
def test_the_imported_methods_answer_is_the_equations(released):
    equations, method, config = released
    inputs, noise = observation_inputs(random_batch(config), config.method), answer_noise(method)
    expected = equations.act(inputs, noise)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(method.act(inputs, noise), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_loss_is_the_equations(released):
    """Two passes with noise of their own, four draws a sample with noise of their own, masks, and the observed frame apart."""
    equations, method, config = released
    batch = random_batch(config)
    batch = replace(batch, action_mask=torch.rand(batch.actions.shape) < 0.7)
    torch.manual_seed(3)
    losses = method(batch)
    torch.manual_seed(3)
    level, noise = torch.rand(4), torch.randn_like(batch.latents)
    seen, text = batch.latents[:, :, :1], batch.instruction
    spread = level[:, None, None, None, None]
    predicted, _ = equations.video(seen, (1 - spread) * batch.latents + spread * noise, level, text)
    video = (predicted - (noise - batch.latents))[:, :, 1:].square().mean()
    _, tokens = equations.video(seen, torch.randn_like(batch.latents), torch.full((4,), LEVEL), text)
    noise = torch.randn(4 * DRAWS, 4, 3)
    level = (torch.distributions.Beta(1.5, 1.0).sample((4 * DRAWS,)) / 0.999).clamp(max=1)
    total = torch.zeros(())
    for row in range(4 * DRAWS):
        sample = slice(row // DRAWS, row // DRAWS + 1)
        noisy = (1 - level[row]) * batch.actions[sample] + level[row] * noise[row : row + 1]
        velocity = equations.velocity(noisy, batch.state[sample], level[row : row + 1], tokens[sample])
        error = velocity - (noise[row : row + 1] - batch.actions[sample])
        total += error.square()[batch.action_mask[sample]].sum()
    action = total / (batch.action_mask.sum() * DRAWS)
    torch.testing.assert_close(losses.terms["video"], video, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.terms["action"], action, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, video + action, rtol=1e-4, atol=1e-5)


def test_other_architectures_and_pickles_are_not_imported(released, tmp_path):
    equations, _, config = released
    method = small_config().method
    other = replace(method.model, action_dit=replace(method.model.action_dit, hidden_dim=16))
    with pytest.raises(ValueError, match="made for another architecture"):
        load_dit4dit(replace(method, model=other).build(), equations.save(tmp_path))
    with pytest.raises(ValueError, match="expected an identity bridge, time_grows_with_noise"):
        load_dit4dit(tiny_dit4dit().method.build(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.pt")
    with pytest.raises(FileNotFoundError, match=r"expected the published weights as \.safetensors files"):
        load_dit4dit(config.method.build(), tmp_path)


# --- gradients ----------------------------------------------------------------------------------------------------------


def block_gradients(config):
    torch.manual_seed(0)
    method = config.method.build()
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    method(random_batch(config)).terms["action"].backward()
    assert all(p.grad is not None for p in method.wam.action_dit.blocks.parameters())
    return [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in method.blocks()[:4]]


def test_actions_train_the_video_dit_only_when_attached():
    assert block_gradients(small_config()) == [False] * 4
    assert block_gradients(small_config(detach=False)) == [True, True, True, False]


def test_detaching_changes_no_loss_and_each_pass_runs_once():
    losses = []
    for detach in (True, False):
        config = small_config(detach=detach)
        torch.manual_seed(0)
        method, passes = config.method.build(), []
        method.wam.video_dit.register_forward_pre_hook(lambda _, args, passes=passes: passes.append(args[1][:, 1]))
        with sharded_rng(0, 1, samples=4):
            losses.append(method(random_batch(config)))
        assert len(passes) == 2
        assert passes[0].unique().numel() == 4
        assert (passes[1] == LEVEL).all()
    assert torch.equal(losses[0].total, losses[1].total)


# --- acting -------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "as published": {},
    "a linear projector": {"bridge": {"projector": "linear"}},
    "self-attention first": {"action_dit": {"self_attention_first": True}},
    "a transformer with positions": {"bridge": {"projector": "transformer", "position_grid": (2, 2, 3)}},
}


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_fast_answer_is_the_plain_one(changes):
    config = small_config()
    parts = {name: replace(getattr(config.method.model, name), **values) for name, values in changes.items()}
    config = with_model(config, **parts)
    torch.manual_seed(0)
    method = config.method.build().eval()
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs, noise = observation_inputs(random_batch(config), config.method), answer_noise(method)
    plain = method.act(inputs, noise)
    fast = method.actor(fast=True)
    instructions = [fast.prepare_instruction(tokens) for tokens in inputs.instruction]
    torch.testing.assert_close(fast.act(inputs, noise, instructions), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.actor(fast=False).act(inputs, noise, [None] * 4), plain)
    shown = []
    visited = method.visit_attention(method.hidden(inputs, noise), inputs, noise, shown.append)
    torch.testing.assert_close(visited, plain, rtol=1e-4, atol=1e-5)
    assert [weights.shape for weights in shown[0]] == [(4, 2, 5, 12)] * 2
    assert len(shown) == 4


# --- a whole life -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps that keeps every checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("dit4dit")
    collect("point", folder / "demonstrations", episodes=6, seed=0, demonstrator=demonstrator, progress=False)
    method = small_config().method
    model = replace(
        method.model,
        text=TextConfig(kind="minilm", length=5),
        video_dit=replace(method.model.video_dit, text_dim=384),
        action_dit=replace(method.model.action_dit, state_dim=2, action_dim=2),
    )
    config = RunConfig(
        method=replace(method, model=model),
        data=DataConfig(path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",)),
        stage=StageConfig(
            steps=4, batch_size=8, learning_rate=3e-3, save_every=1, keep_checkpoints=4, validate_every=2, log_every=1,
            precision="float32",
        ),
    )  # fmt: skip
    assert len(prepare(config)) > 0
    assert train(config, output=folder / "run")
    return folder / "run", config


def test_its_checkpoint_describes_itself(trained):
    run, config = trained
    assert read_config(resolve(run)) == config
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len([row for row in rows if "action_loss" in row and "video_loss" in row]) == 4
    assert {f.name for f in resolve(run).glob("*_dit.safetensors")} == {
        "video_dit.safetensors",
        "action_dit.safetensors",
    }


def test_it_resumes_bit_for_bit(trained, tmp_path):
    run, config = trained
    check_resumed(run, config, tmp_path / "run", step=2, parts=("video_dit", "action_dit"))


def test_two_ranks_train_what_one_process_trains(trained, tmp_path):
    run, config = trained
    rarely = replace(config, stage=replace(config.stage, save_every=100, validate_every=100))
    train_in_two_ranks(rarely, tmp_path / "run")
    sharded, whole = load_policy(tmp_path / "run"), load_policy(run)
    assert_same_weights(sharded.method.state_dict(), whole.method.state_dict())


def test_it_is_served(trained):
    check_served_chunk(load_policy(trained[0]))


def test_the_documented_conversion_is_the_importers(tmp_path, released):
    """docs/methods.md's command turns a pickle in the released layout into a folder that can be imported."""
    equations, _, config = released
    stored = load_file(equations.save(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(stored, tmp_path / "pytorch_model.pt")
    page = (ROOT / "docs" / "methods.md").read_text()
    command = re.search(r"python - <<'END'\n(.*?)END", page, re.DOTALL)
    assert command is not None
    assert "weights_only=True" in command[1]
    subprocess.run([sys.executable, "-c", command[1]], cwd=tmp_path, check=True)
    method = config.method.build()
    assert load_dit4dit(method, tmp_path) == (f"{ACTION}unused",)
