"""A VLA of GR00T-N1.6's shape: its equations in N1.6's own convention, and a whole life: trained, resumed, sharded, served."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu, layer_norm, silu

from agra.api import make_sampler, prepare, train
from agra.batch import Batch
from agra.checkpoints.folder import resolve
from agra.checkpoints.read import read_config
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.data.features.preparation import open_instructions
from agra.data.source import embodiment_stats, open_sources
from agra.diagnostics.instruments.attention import action_attention, capture_attention
from agra.diagnostics.instruments.intervention import InterventionInputs, action_deviation, sensitivity_map, token_table
from agra.diagnostics.measurement import applicable_instruments
from agra.evaluation.collect import collect
from agra.methods.method import observation_inputs
from agra.methods.vla import load_groot_n16, noise_levels
from agra.policies.load import load_policy
from agra.recipes import compose, tiny_vla, tiny_wam, vla
from agra.rng import sharded_rng
from agra.stages import Stage, StageConfig
from agra.training.initialization import load_initial_weights
from agra.training.memory_estimate import measure
from agra.types import Observation
from agra.wam.action_dit import ActionDiTConfig
from agra.wam.text import TextConfig
from tests.support.method_life import check_evaluated_by_name, check_resumed, check_served_chunk
from tests.support.point_world import demonstrator
from tests.support.two_ranks import assert_same_weights, train_in_two_ranks

GRID, LENGTH, ROWS, WIDTH, GUIDE, HIDDEN, HORIZON, STATE, ACTION = (2, 3), 5, 4, 32, 24, 12, 4, 5, 3
SMALL = replace(
    tiny_vla().method,
    vision_encoder=replace(tiny_vla().method.vision_encoder, input_size=(28, 42)),
    feature_grid=GRID,
    text_encoder=TextConfig(kind="minilm", length=LENGTH),
    action_dit=ActionDiTConfig(
        state_dim=STATE, action_dim=ACTION, horizon=HORIZON, num_blocks=4, num_heads=2, head_dim=16,
        guidance_dim=GUIDE, hidden_dim=HIDDEN, dropout=0.0, max_horizon=8,
    ),
    action_draws=2,
)  # fmt: skip
"""GR00T-N1.6's head with 8 small sub-blocks."""


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def random_batch(samples=3, seed=0):
    """Noise in the shapes of SMALL. Instructions have 5, 3 and 2 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(samples, *shape, generator=generator)

    instruction = noise(LENGTH, 384)
    for row, length in zip(range(samples), (5, 3, 2), strict=False):
        instruction[row, length:] = 0
    return Batch(
        state=noise(STATE),
        actions=noise(HORIZON, ACTION),
        action_mask=torch.rand(samples, HORIZON, ACTION, generator=generator) < 0.7,
        embodiment=torch.zeros(samples, dtype=torch.long),
        instruction=instruction,
        features=noise(1, *GRID, 384),
    )


# --- sizes and recipes ------------------------------------------------------------------------------------------------


def test_published_sizes():
    with torch.device("meta"):
        method = vla().method.build()
    head = method.action_dit
    assert len(head.blocks) == 32
    assert head.config.width == 1536
    assert count(head.blocks, head.time_embedding, head.modulation_out, head.project_out) == 1_091_722_240
    assert count(head, method.context.norm) == 1_103_465_600
    assert count(method.context.vision, method.context.text) == 3_149_824
    assert set(method.parts()) == set(vla().method.part_names)
    assert count(method) == count(*method.parts().values())
    for embodiments, width, expected in ((1, 29, 1_103_106_589), (32, 29, 1_407_262_624), (32, 128, 1_418_619_904)):
        config = replace(head.config, num_embodiments=embodiments, state_dim=width, action_dim=width)
        with torch.device("meta"):
            built = replace(vla().method, action_dit=config).build()
        assert count(built.action_dit) == expected


def test_tiny_is_tiny_but_for_the_method():
    ours, theirs = tiny_vla(), tiny_wam()
    assert ours.method.action_dit == theirs.method.model.action_dit
    assert ours.method.action_draws == theirs.method.objective.action_draws
    assert replace(ours, method=theirs.method, data=theirs.data) == theirs
    assert replace(ours.data, target_steps=theirs.data.target_steps) == theirs.data
    assert RunConfig.from_json(ours.to_json()) == ours
    published = compose("vla", Stage.JOINT, ["gr1"])
    assert RunConfig.from_json(published.to_json()) == published
    assert len(published.data.sources) == 24


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"future_tokens": 32}, "no future tokens"),
        ({"self_attention_first": True}, "cross-attention first"),
        ({"num_blocks": 1}, "one reads text and one the frame, got 1"),
    ],
)
def test_what_it_is_not_is_refused(head, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, action_dit=replace(SMALL.action_dit, **head))


# --- its equations, on a checkpoint in the released layout ------------------------------------------------------------


class Released:
    """GR00T-N1.6's head on tensors under its own names.

    Time 0 is noise. One sequence holds all tokens, and a mask tells those of the image from the others.
    """

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.weights = {"position_embedding.weight": torch.randn(8, WIDTH), "mask_token": torch.zeros(1, 1, WIDTH)}
        self.weights |= {"vlln.weight": torch.rand(GUIDE) + 0.5, "vlln.bias": torch.randn(GUIDE) * 0.2}
        banks = {
            "state_encoder.layer1": (STATE, HIDDEN), "state_encoder.layer2": (HIDDEN, WIDTH),
            "action_encoder.W1": (ACTION, WIDTH), "action_encoder.W2": (2 * WIDTH, WIDTH),
            "action_encoder.W3": (WIDTH, WIDTH),
            "action_decoder.layer1": (HIDDEN, HIDDEN), "action_decoder.layer2": (HIDDEN, ACTION),
        }  # fmt: skip
        for name, (inputs, outputs) in banks.items():
            self.weights |= {
                f"{name}.W": torch.randn(ROWS, inputs, outputs) * 0.2,
                f"{name}.b": torch.randn(ROWS, outputs) * 0.2,
            }
        linears = {
            "model.timestep_encoder.timestep_embedder.linear_1": (256, WIDTH),
            "model.timestep_encoder.timestep_embedder.linear_2": (WIDTH, WIDTH),
            "model.proj_out_1": (WIDTH, 2 * WIDTH),
            "model.proj_out_2": (WIDTH, HIDDEN),
        }
        for i in range(8):
            context = GUIDE if i % 2 == 0 else WIDTH
            block = {"norm1.linear": (WIDTH, 2 * WIDTH), "attn1.to_q": (WIDTH, WIDTH), "attn1.to_k": (context, WIDTH),
                     "attn1.to_v": (context, WIDTH), "attn1.to_out.0": (WIDTH, WIDTH),
                     "ff.net.0.proj": (WIDTH, 4 * WIDTH), "ff.net.2": (4 * WIDTH, WIDTH)}  # fmt: skip
            linears |= {f"model.transformer_blocks.{i}.{name}": sizes for name, sizes in block.items()}
        for name, (inputs, outputs) in linears.items():
            self.weights |= {
                f"{name}.weight": torch.randn(outputs, inputs) * 0.2,
                f"{name}.bias": torch.randn(outputs) * 0.2,
            }

    def save(self, folder, rows):
        tensors = {f"action_head.{name}": value for name, value in self.weights.items()}
        save_file({**tensors, "backbone.model.mlp1.weight": torch.zeros(2)}, folder / "model.safetensors")
        (folder / "embodiment_id.json").write_text(json.dumps(rows))
        return str(folder)

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def bank(self, name, x, row):
        return x @ self.weights[f"{name}.W"][row] + self.weights[f"{name}.b"][row]

    def attention(self, name, x, context, read):
        """Keys outside `read` (B, N) get the weight 0."""
        q, k, v = (
            self.linear(f"{name}.to_{part}", source).unflatten(-1, (2, -1)).transpose(1, 2)
            for part, source in (("q", x), ("k", context), ("v", context))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).exp()
        if read is not None:
            weights = weights * read[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True)
        return self.linear(f"{name}.to_out.0", (weights @ v).transpose(1, 2).flatten(2))

    def velocity(self, noisy, state, time, tokens, is_image, is_token, row=2):
        """From noise to data at `time`. `tokens` (B, N, G) of both kinds come from the frozen encoders."""
        context = layer_norm(tokens, (GUIDE,), self.weights["vlln.weight"], self.weights["vlln.bias"])
        step = (time * 1000).floor()
        angles = step[:, None] * 10_000 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
        encoded = torch.cat([angles.sin(), angles.cos()], -1)[:, None].expand(-1, HORIZON, -1)
        x = torch.cat([self.bank("action_encoder.W1", noisy, row), encoded], -1)
        x = self.bank("action_encoder.W3", silu(self.bank("action_encoder.W2", x, row)), row)
        x = x + self.weights["position_embedding.weight"][:HORIZON]
        first = self.bank("state_encoder.layer1", state[:, None], row).clamp(min=0)
        x = torch.cat([self.bank("state_encoder.layer2", first, row), x], dim=1)
        angles = step[:, None] * 10_000 ** (-torch.arange(128) / 127)
        embedder = "model.timestep_encoder.timestep_embedder"
        embedded = silu(self.linear(f"{embedder}.linear_1", torch.cat([angles.cos(), angles.sin()], -1)))
        embedded = silu(self.linear(f"{embedder}.linear_2", embedded))
        for i in range(8):
            name = f"model.transformer_blocks.{i}"
            scale, shift = self.linear(f"{name}.norm1.linear", embedded)[:, None].chunk(2, -1)
            h = layer_norm(x, (WIDTH,)) * (1 + scale) + shift
            if i % 2 == 1:
                x = x + self.attention(f"{name}.attn1", h, h, None)
            else:
                chosen = ~is_image if i % 4 == 0 else is_image
                x = x + self.attention(f"{name}.attn1", h, context, chosen & is_token)
            h = gelu(self.linear(f"{name}.ff.net.0.proj", layer_norm(x, (WIDTH,))), approximate="tanh")
            x = x + self.linear(f"{name}.ff.net.2", h)
        shift, scale = self.linear("model.proj_out_1", embedded)[:, None].chunk(2, -1)
        x = self.linear("model.proj_out_2", layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
        x = self.bank("action_decoder.layer1", x, row).clamp(min=0)
        return self.bank("action_decoder.layer2", x, row)[:, -HORIZON:]


def vlm_tokens(method, batch):
    """One sequence of both kinds: instruction, then patches, each through its linear layer, and the two masks."""
    patches, text = batch.features.flatten(1, 3), batch.instruction
    context = method.context
    tokens = torch.cat(
        [text @ context.text.weight.T + context.text.bias, patches @ context.vision.weight.T + context.vision.bias], 1
    )
    is_image = torch.arange(LENGTH + 6).expand(len(batch), -1) >= LENGTH
    is_token = torch.cat([text.abs().sum(-1) > 0, torch.ones(len(batch), 6, dtype=torch.bool)], 1)
    return tokens, is_image, is_token


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The equations, and a method that has imported their weights."""
    equations = Released()
    torch.manual_seed(1)
    method = SMALL.build().eval()
    folder = equations.save(tmp_path_factory.mktemp("n16"), {"gr1": 2, "new_embodiment": 0})
    assert load_groot_n16(method, folder) == ("mask_token",)
    return equations, method, folder


@torch.no_grad()
def test_the_imported_methods_answer_is_the_equations(released):
    equations, method, _ = released
    batch = random_batch()
    tokens = vlm_tokens(method, batch)
    actions = noise = torch.randn(3, HORIZON, ACTION)
    for time in (0.0, 0.25, 0.5, 0.75):
        actions = actions + 0.25 * equations.velocity(actions, batch.state, torch.full((3,), time), *tokens)
    assert (actions - noise).abs().max() > 0.5
    torch.testing.assert_close(
        method.act(observation_inputs(batch, SMALL), {"action": noise}), actions, atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_the_loss_is_the_equations(released):
    """Two draws a sample with noise and levels of their own, over the actions that the mask keeps."""
    equations, method, _ = released
    batch = random_batch()
    torch.manual_seed(3)
    loss = method(batch)
    torch.manual_seed(3)
    noise = torch.randn(6, HORIZON, ACTION)
    time = 0.999 * (1 - torch.distributions.Beta(1.5, 1.0).sample((6,)))
    tokens, is_image, is_token = vlm_tokens(method, batch)
    total = torch.zeros(())
    for row in range(6):
        sample, drawn = slice(row // 2, row // 2 + 1), slice(row, row + 1)
        noisy = time[row] * batch.actions[sample] + (1 - time[row]) * noise[drawn]
        velocity = equations.velocity(
            noisy, batch.state[sample], time[drawn], tokens[sample], is_image[sample], is_token[sample]
        )
        error = velocity - (batch.actions[sample] - noise[drawn])
        total += error.square()[batch.action_mask[sample]].sum()
    torch.testing.assert_close(loss.total, total / (2 * batch.action_mask.sum()), rtol=1e-4, atol=1e-5)
    assert loss.terms.keys() == {"action"}


def test_levels_are_n16s():
    torch.manual_seed(0)
    levels = noise_levels(20_000)
    assert levels.min() >= 0.001
    assert levels.max() <= 1
    assert levels.mean().item() == pytest.approx(0.001 + 0.999 * 0.6, abs=0.005)  # Beta(1.5, 1) has the mean 0.6


def test_a_run_starts_from_the_released_head(released):
    equations, imported, folder = released
    config = replace(tiny_vla(), method=SMALL, data=replace(tiny_vla().data, embodiments=("tabletop",)))
    method = SMALL.build()
    load_initial_weights(method, folder, config)
    assert all(
        torch.equal(a, b) for a, b in zip(method.action_dit.parameters(), imported.action_dit.parameters(), strict=True)
    )
    assert torch.equal(method.context.norm.weight, equations.weights["vlln.weight"])
    assert not torch.equal(method.context.text.weight, imported.context.text.weight)  # fresh


def test_embodiments_are_found_by_name(released, tmp_path):
    equations, _, folder = released
    two = replace(SMALL, action_dit=replace(SMALL.action_dit, num_embodiments=2)).build()
    load_groot_n16(two, folder, embodiments=("new_embodiment", "gr1"))
    for here, there in ((0, 0), (1, 2)):
        expected = equations.weights["state_encoder.layer1.W"][there]
        assert torch.equal(two.action_dit.state_encoder.layer1.weight[here], expected)
    with pytest.raises(ValueError, match="no embodiment 'iron'; expected some of gr1, new_embodiment"):
        load_groot_n16(two, folder, embodiments=("iron",))
    with pytest.raises(ValueError, match="made for another architecture"):
        load_groot_n16(replace(SMALL, action_dit=replace(SMALL.action_dit, hidden_dim=16)).build(), folder)
    with pytest.raises(FileNotFoundError, match=r"embodiment_id\.json: expected the file that numbers"):
        load_groot_n16(two, str(tmp_path))


# --- what each block reads --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_second_cross_attention_reads_text(released):
    _, method, _ = released
    seen, hooks = [], []
    for block in method.action_dit.blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, args: seen.append((args[1], args[4]))))
    batch = random_batch()
    method(batch)
    for hook in hooks:
        hook.remove()
    image, text = method.context(batch.features, batch.instruction)
    for index, (context, mask) in enumerate(seen):
        if index % 2 == 1:
            assert (context, mask) == (None, None)
        elif index in (0, 4):
            assert torch.equal(context, text)
            assert mask.sum(1).tolist() == [5, 3, 2]
        else:
            assert torch.equal(context, image)
            assert mask is None


@torch.no_grad()
def test_padding_is_not_read(released):
    _, method, _ = released
    inputs, noise = observation_inputs(random_batch(), SMALL), {"action": torch.randn(3, HORIZON, ACTION)}
    longer = replace(inputs, instruction=torch.cat([inputs.instruction, torch.zeros(3, 4, 384)], 1))
    torch.testing.assert_close(method.act(longer, noise), method.act(inputs, noise))


@torch.no_grad()
def test_a_row_of_a_batch_is_answered_as_alone(released):
    _, method, _ = released
    inputs, noise = observation_inputs(random_batch(), SMALL), torch.randn(3, HORIZON, ACTION)
    together = method.act(inputs, {"action": noise})
    for row in range(3):
        alone = method.act(inputs.rows([row]), {"action": noise[row : row + 1]})
        torch.testing.assert_close(alone[0], together[row])


@torch.no_grad()
def test_a_continuation_pulls_towards_what_is_being_executed(released):
    _, method, _ = released
    inputs, noise = observation_inputs(random_batch(), SMALL), {"action": torch.randn(3, HORIZON, ACTION)}
    previous, weights = torch.randn(3, HORIZON, ACTION), torch.zeros(3, HORIZON, ACTION)
    weights[:, :2] = 1
    free = method.act(inputs, noise, steps=8)
    held = method.act(inputs, noise, steps=8, continuation=(previous, weights))
    assert ((held - previous)[:, :2].abs() < (free - previous)[:, :2].abs()).float().mean() > 0.8
    untouched = method.act(inputs, noise, steps=8, continuation=(previous, torch.zeros_like(weights)))
    torch.testing.assert_close(untouched, free)


def test_gradients_reach_both_projections_and_every_block():
    torch.manual_seed(0)
    method = SMALL.build()
    with sharded_rng(0, 1, samples=3):
        method(random_batch()).total.backward()
    silent = [
        name for name, parameter in method.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    keys = [name for name in silent if name.endswith("to_k.bias")]  # a key's bias changes no attention
    assert set(silent) == set(keys)


# --- instruments ------------------------------------------------------------------------------------------------------


def test_instruments_that_apply():
    applicable = applicable_instruments(SMALL.build())
    assert {name for name, applies in applicable.items() if applies} == {"attention", "interventions", "hidden_states"}


@torch.no_grad()
def test_attention_is_that_of_the_blocks_that_read_the_frame(released):
    _, method, _ = released
    inputs, noise = observation_inputs(random_batch(), SMALL), {"action": torch.randn(3, HORIZON, ACTION)}
    hidden = method.hidden(inputs, noise)
    captured = capture_attention(method, hidden, inputs, noise)
    assert captured.weights.shape == (3, 4, 2, 2, 1 + HORIZON, 6)  # steps, blocks, heads, [state | actions], patches
    torch.testing.assert_close(captured.weights.sum(-1), torch.ones(3, 4, 2, 2, 1 + HORIZON))
    torch.testing.assert_close(captured.actions, method.act(inputs, noise), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(method.act_on(hidden, inputs, noise), method.act(inputs, noise))
    shares = action_attention(method, hidden, inputs, noise, method.token_grid)
    assert shares.shape == (3, len(method.read_layers), 1, *GRID)
    with pytest.raises(ValueError, match=r"has one token grid, number 0, got \[3\]"):
        method.hidden(inputs, noise, layers=(3,))


@torch.no_grad()
def test_interventions_replace_patches(released):
    _, method, _ = released
    inputs = observation_inputs(random_batch(), SMALL).rows([1])
    noise = {"action": torch.randn(1, HORIZON, ACTION)}
    sample = InterventionInputs(hidden={0: inputs.features[0]}, inputs=inputs, noise=noise)
    assert sample.grid == (1, *GRID)
    chosen = torch.zeros(1, 1, *GRID, dtype=torch.bool)
    assert action_deviation(method, sample, token_table(chosen, "zero")).item() == 0
    chosen[0, 0, 1, 2] = True
    changed = replace(inputs, features=inputs.features.clone())
    changed.features[0, 0, 1, 2] = 0
    expected = (method.act(changed, noise) - method.act(inputs, noise)).norm()
    deviation = action_deviation(method, sample, token_table(chosen, "zero"))[0]
    torch.testing.assert_close(deviation, expected, atol=1e-5, rtol=1e-4)
    assert sensitivity_map(method, sample, kind="zero")[1, 2].item() == pytest.approx(expected.item(), abs=1e-5)


# --- a whole life -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 6 steps that keeps every checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("vla")
    collect("point", folder / "demonstrations", episodes=6, seed=0, demonstrator=demonstrator, progress=False)
    method = replace(SMALL, action_dit=replace(SMALL.action_dit, state_dim=2, action_dim=2, bank_init_std=None))
    config = RunConfig(
        method=method,
        data=DataConfig(path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",)),
        stage=StageConfig(
            steps=6, batch_size=8, learning_rate=3e-3, save_every=1, keep_checkpoints=6, validate_every=3, log_every=1,
            precision="float32",
        ),
    )  # fmt: skip
    assert len(prepare(config)) == 2  # patches, instructions
    assert train(config, output=folder / "run")
    return folder / "run", config


def test_its_checkpoint_describes_itself(trained):
    run, config = trained
    assert read_config(resolve(run)) == config
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert len([row for row in rows if "action_loss" in row]) == 6
    assert len([row for row in rows if "validation/action_loss" in row]) == 2
    assert {f.name for f in resolve(run).glob("*.safetensors")} >= {"context.safetensors", "action_dit.safetensors"}


def test_it_resumes_bit_for_bit(trained, tmp_path):
    run, config = trained
    check_resumed(run, config, tmp_path / "run", step=3, parts=("context", "action_dit"))


def test_two_ranks_train_what_one_process_trains(trained, tmp_path):
    run, config = trained
    rarely = replace(config, stage=replace(config.stage, save_every=100, validate_every=100))
    train_in_two_ranks(rarely, tmp_path / "run")
    sharded, whole = load_policy(tmp_path / "run"), load_policy(run)
    assert_same_weights(sharded.method.state_dict(), whole.method.state_dict())


def test_a_policy_sees_what_training_saw(trained):
    """Patches of an observation, encoded alone, are the cached ones up to rounding, and do not depend on the batch."""
    config = trained[1]
    sources = open_sources(config.data)
    tokens = open_instructions(config.method, config.data, sources)
    sampler = make_sampler(config, sources, embodiment_stats(sources), tokens, None)
    batch = sampler._assemble(np.array([(0, 1, step) for step in (0, 1, 2)]))
    policy, dataset = load_policy(trained[0]), sources[0].dataset
    observations = [
        Observation(
            frame=dataset.frames(1)[step],
            state=dataset.states(1)[step],
            instruction=dataset.instruction(1),
            embodiment="dot",
        )
        for step in (0, 1, 2)
    ]
    seen = policy.encode(observations)
    torch.testing.assert_close(seen.features, batch.features, atol=5e-3, rtol=2e-3)
    assert torch.equal(seen.instruction, batch.instruction)
    assert torch.equal(seen.state, batch.state)
    for row, observation in enumerate(observations):
        assert torch.equal(policy.encode([observation]).features[0], seen.features[row])


def test_it_is_served(trained):
    check_served_chunk(load_policy(trained[0]))


def test_it_is_evaluated_by_name(trained, monkeypatch, capsys):
    run, _ = trained
    check_evaluated_by_name(run, monkeypatch, capsys)


def test_it_is_planned(trained):
    cost = measure(trained[1])
    assert cost.parameters == {name: count(part) for name, part in trained[1].method.build().parts().items()}
    assert cost.flops_per_sample > 2 * cost.validation_flops_per_sample > 0
