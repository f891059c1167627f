"""The WAM's methods: denoise, condition, act, imagine, text attention."""

from dataclasses import replace

import pytest
import torch

from agra.recipes import tiny
from agra.wam.model import WAM
from agra.wam.video_dit import VideoOutput


@pytest.fixture
def wam(small_config):
    torch.manual_seed(0)
    model = WAM(small_config.method.model).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def _spy(wam):
    calls = []
    forward = wam.video_dit.forward

    def spy(latents, level, *args, **kwargs):
        calls.append((latents.detach().clone(), level.clone(), kwargs))
        return forward(latents, level, *args, **kwargs)

    wam.video_dit.forward = spy
    return calls


def test_condition_is_pure_noise_behind_a_clean_observation(wam, small_config, make_batch):
    batch, calls = make_batch(small_config), _spy(wam)
    noise = torch.randn_like(batch.latents)
    hidden = wam.condition(batch.latents[:, :, :1], noise, batch.instruction, layers=(1,))
    latents, level, kwargs = calls[0]
    assert torch.equal(latents[:, :, 0], batch.latents[:, :, 0])
    assert torch.equal(latents[:, :, 1:], noise[:, :, 1:])
    assert level[:, 1:].eq(1).all()
    assert level[:, 0].eq(1e-4).all()
    assert kwargs["condition_mask"][:, :, 0].eq(1).all()
    assert kwargs["condition_mask"][:, :, 1:].eq(0).all()
    assert sorted(hidden) == [0, 1, 3]
    assert hidden[1].shape == (4, *small_config.method.model.token_grid, 32)
    assert all(h.requires_grad for h in hidden.values())


def test_every_conditioning_pass_runs_at_the_guidance_level(wam, small_config, make_batch):
    wam.config = replace(small_config.method.model, guidance_noise_level=0.9)
    batch, calls = make_batch(small_config), _spy(wam)
    noise, level = torch.randn_like(batch.latents), torch.rand(2)
    seen = batch.latents[:, :, :1]
    wam.condition(seen, noise, batch.instruction)
    wam.text_attention(seen, noise, batch.instruction, layers=(1,))
    wam.denoise_and_condition(batch.latents, noise[:2], level, noise, batch.instruction)
    expected = torch.full((4,), 0.9)
    assert torch.equal(calls[0][1][:, 1], expected)
    assert torch.equal(calls[1][1][:, 1], expected)
    assert torch.equal(calls[2][1][:, 1], torch.cat([level, expected]))
    with pytest.raises(ValueError, match=r"guidance_noise_level: expected a number in \(0, 1\], got 0"):
        replace(small_config.method.model, guidance_noise_level=0)


def test_future_latents_do_not_enter_the_conditioning_pass(wam, small_config, make_batch):
    """Future frames must not guide the robot. Only latent frame 0 of the window has an effect."""
    batch = make_batch(small_config)
    noise = torch.randn_like(batch.latents)
    other = batch.latents.clone()
    other[:, :, 1:] += 5
    first = wam.condition(batch.latents[:, :, :1], noise, batch.instruction)
    second = wam.condition(other[:, :, :1], noise, batch.instruction)
    assert all(torch.equal(first[layer], second[layer]) for layer in first)


def test_denoise_mixes_the_future_and_keeps_the_observation(wam, small_config, make_batch):
    batch, calls = make_batch(small_config), _spy(wam)
    noise, level = torch.randn_like(batch.latents), torch.tensor([0.0, 0.3, 0.7, 1.0])
    output = wam.denoise(batch.latents, noise, level, batch.instruction, layers=(2,))
    latents, levels, _ = calls[0]
    assert torch.equal(latents[:, :, 0], batch.latents[:, :, 0])
    torch.testing.assert_close(latents[0, :, 1:], batch.latents[0, :, 1:])
    torch.testing.assert_close(latents[3, :, 1:], noise[3, :, 1:])
    torch.testing.assert_close(levels[:, 1], level)
    assert output.velocity.shape == batch.latents.shape
    assert sorted(output.hidden) == [2]


def test_pre_trained_cosmos_gives_the_observation_the_common_level(wam, small_config, make_batch):
    wam.config = replace(small_config.method.model, condition_noise_level=None)
    batch, calls = make_batch(small_config), _spy(wam)
    wam.denoise(batch.latents, torch.randn_like(batch.latents), torch.rand(4), batch.instruction)
    assert calls[0][1].shape == (4,)


def test_act_takes_euler_steps_under_fixed_guidance(wam, small_config, make_batch):
    batch = make_batch(small_config)
    hidden = wam.condition(batch.latents[:, :, :1], torch.randn_like(batch.latents), batch.instruction)
    guidance = wam.guide(hidden)
    noise = torch.randn_like(batch.actions)
    acted = wam.act(guidance, batch.state, batch.embodiment, noise, steps=2)
    by_hand = noise
    for level in (1.0, 0.5):
        step = wam.action_dit(by_hand, batch.state, torch.full((4,), level), guidance, batch.embodiment).velocity
        by_hand = by_hand - step / 2
    torch.testing.assert_close(acted, by_hand)


@pytest.mark.gpu
@torch.no_grad()
def test_actions_on_cuda_equal_those_on_the_cpu(wam, small_config, make_batch):
    batch = make_batch(small_config)
    video_noise, action_noise = torch.randn_like(batch.latents), torch.randn_like(batch.actions)

    def act(device):
        inputs = (batch.latents[:, :, :1], video_noise, batch.instruction)
        guidance = wam.to(device).guide(wam.condition(*(value.to(device) for value in inputs)))
        inputs = (batch.state, batch.embodiment, action_noise)
        return wam.act(guidance, *(value.to(device) for value in inputs), steps=2)

    torch.testing.assert_close(act("cuda").cpu(), act("cpu"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 8}, r"num_frames: expected 1 \+ 4n for the causal codec, got 8"),
        ({"frame_size": (30, 48)}, r"frame_size: expected multiples of \(16, 16\), got \(30, 48\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(small_config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(small_config.method.model, **changes)


def test_bridge_and_head_must_agree(small_config):
    model = small_config.method.model
    with pytest.raises(ValueError, match="expected 2 layers, one for each cross-attention block"):
        replace(model, bridge=replace(model.bridge, layers=(0, 1, 3)))
    with pytest.raises(ValueError, match=r"bridge.layers: expected layers 0\.\.3, got \(0, 4\)"):
        replace(model, bridge=replace(model.bridge, layers=(0, 4)))
    with pytest.raises(ValueError, match="expected equal widths"):
        replace(model, action_dit=replace(model.action_dit, guidance_dim=64))


@torch.no_grad()
def test_imagination_reaches_a_video_that_the_velocity_points_at(wam, small_config, make_batch):
    """With the velocity noise - latents, any number of Euler steps arrives at the latents."""
    batch, noise = make_batch(small_config), torch.randn_like(make_batch(small_config).latents)
    wam.video_dit.forward = lambda latents, *a, **k: VideoOutput(velocity=noise - batch.latents)
    for steps in (1, 5):
        imagined = wam.imagine(batch.latents[:, :, :1], noise, batch.instruction, steps=steps)
        torch.testing.assert_close(imagined, batch.latents)


@torch.no_grad()
def test_text_attention_is_that_of_the_conditioning_pass(wam, small_config, make_batch):
    batch, calls = make_batch(small_config), _spy(wam)
    noise = torch.randn_like(batch.latents)
    attention = wam.text_attention(batch.latents[:, :, :1], noise, batch.instruction, layers=(2,))
    assert attention[2].shape == (4, *small_config.method.model.token_grid, 5)
    torch.testing.assert_close(attention[2].sum(-1), torch.ones(4, *small_config.method.model.token_grid))
    assert calls[0][1][:, 1:].eq(1).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_frames": 9}, r"\(3, 4, 7\) of frame_size \(64, 112\) and num_frames 9, or None, got \(2, 4, 7\)"),
        (
            {"frame_size": (64, 128)},
            r"\(2, 4, 8\) of frame_size \(64, 128\) and num_frames 5, or None, got \(2, 4, 7\)",
        ),
        ({"bridge": {"position_grid": (1, 1, 1)}}, r"\(2, 4, 7\) .*, got \(1, 1, 1\)"),
    ],
)
def test_positions_of_another_grid_are_refused(changes, expected):
    model = tiny().method.model
    bridge = replace(model.bridge, **changes.get("bridge", {}))
    with pytest.raises(ValueError, match=rf"bridge\.position_grid: expected the token grid {expected}"):
        replace(model, **(changes | {"bridge": bridge}))
