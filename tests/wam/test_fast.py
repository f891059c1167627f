"""The fast path against the plain path, with the same weights and inputs."""

from dataclasses import replace

import pytest
import torch

from agra.flow import continuation_weights
from agra.wam.fast import FastWAM
from agra.wam.model import WAM

VARIANTS = {
    "as it is": {},
    "one level": {"condition_noise_level": None},
    "learned positions": {"video_dit": {"learned_positions": True}},
    "text projection": {"video_dit": {"text_projection_dim": 20}},
    "future tokens": {"action_dit": {"future_tokens": 3}},
    "a layer read twice": {"bridge": {"layers": (1, 1)}},
    "a lower guidance level": {"guidance_noise_level": 0.6},
    "a linear projector": {"bridge": {"projector": "linear"}},
    "no projector": {"bridge": {"projector": "identity", "position_grid": None}},
    "self-attention first": {"action_dit": {"self_attention_first": True}},
    "time that grows with noise": {"action_dit": {"time_grows_with_noise": True}},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(request, small_config):
    changes = {
        name: replace(getattr(small_config.method.model, name), **value) if isinstance(value, dict) else value
        for name, value in request.param.items()
    }
    torch.manual_seed(0)
    wam = WAM(replace(small_config.method.model, **changes)).eval().requires_grad_(False)
    for parameter in wam.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return wam


def close(values, reference):
    torch.testing.assert_close(values, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_same_results(model, small_config, make_batch, steps):
    batch, width = make_batch(small_config), model.config.video_dit.text_projection_dim or 12
    torch.manual_seed(1)
    noise, actions_noise = torch.randn_like(batch.latents), torch.randn_like(batch.actions)
    tokens = torch.randn(2, 5, width)[[0, 1, 0, 0]]
    fast = FastWAM(model, action_steps=steps)
    first, second = fast.instruction(tokens[0]), fast.instruction(tokens[1])
    hidden = model.condition(batch.latents[:, :, :1], noise, tokens)
    ours = fast.condition(batch.latents[:, :, :1], noise, [first, second, first, first])
    assert sorted(ours) == sorted(hidden)
    for layer, values in hidden.items():
        close(ours[layer], values)
    head = (model.guide(hidden), batch.state, batch.embodiment, actions_noise)
    close(fast.act(*head), model.act(*head, steps=steps))
    weights = continuation_weights(1, 3, 4)[None, :, None].expand_as(actions_noise)
    continuation = (batch.actions, weights)
    held = fast.act(*head, continuation=continuation)
    close(held, model.act(*head, steps=steps, continuation=continuation))
    assert not torch.allclose(held, fast.act(*head), atol=1e-2)


@torch.no_grad()
def test_one_instruction_for_all_is_not_copied(model, small_config, make_batch):
    batch = make_batch(small_config)
    tokens = torch.randn(5, model.config.video_dit.text_projection_dim or 12)
    fast, noise = FastWAM(model), torch.randn_like(batch.latents)
    hidden = model.condition(batch.latents[:, :, :1], noise, tokens.expand(4, -1, -1))
    ours = fast.condition(batch.latents[:, :, :1], noise, [fast.instruction(tokens)] * 4)
    for layer, values in hidden.items():
        close(ours[layer], values)


def test_steps_are_checked(model):
    with pytest.raises(ValueError, match="action_steps"):
        FastWAM(model, action_steps=0)


@torch.no_grad()
def test_future_tokens_are_pooled_and_the_observed_frames_are_not(model, small_config, make_batch):
    bridge, (frames, height, width) = model.bridge, model.config.token_grid
    torch.manual_seed(2)
    hidden = {
        layer: torch.randn(2, frames, height, width, bridge.config.width) for layer in set(model.config.bridge.layers)
    }
    fast = FastWAM(model, pool_future=2)
    layer = model.config.bridge.layers[0]
    x = bridge.norm(hidden[layer]) if bridge.linears is None else bridge.linears[str(layer)](hidden[layer])
    if bridge.positions is not None:
        x = x + bridge.positions
    rows = [list(range(i, min(i + 2, height))) for i in range(0, height, 2)]
    columns = [list(range(i, min(i + 2, width))) for i in range(0, width, 2)]
    means = [x[:, t][:, r][:, :, c].mean((1, 2)) for t in range(1, frames) for r in rows for c in columns]
    expected = torch.cat([x[:, 0].flatten(1, 2), torch.stack(means, dim=1)], dim=1)
    for block in bridge.blocks:
        expected = block(expected)
    close(fast.guide(hidden)[0], expected)
    for fast, plain in zip(FastWAM(model).guide(hidden), model.guide(hidden), strict=True):
        assert torch.equal(fast, plain)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("pool_future", [1, 2])
def test_compiled_gives_the_same(small_config, make_batch, pool_future):
    torch.manual_seed(0)
    model = WAM(small_config.method.model).eval().requires_grad_(False)
    batch = make_batch(small_config)
    noise, actions_noise = torch.randn_like(batch.latents), torch.randn_like(batch.actions)
    tokens = torch.randn(5, 12)
    answers = []
    for compiled in (False, True):
        fast = FastWAM(model, pool_future=pool_future, compiled=compiled)
        instructions = [fast.instruction(tokens)] * 4
        for _ in range(2):
            fast.begin()
            guidance = fast.guide(fast.condition(batch.latents[:, :, :1], noise, instructions))
            answers.append(fast.act(guidance, batch.state, batch.embodiment, actions_noise).clone())
    for answer in answers[1:]:
        close(answer, answers[0])
