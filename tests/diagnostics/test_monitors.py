"""The monitors: the same figures again, in chunks, in the training's precision, and nothing for a method that lacks them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agra.batch import PolicyInputs
from agra.diagnostics import monitors
from agra.diagnostics.monitors import (
    GroundingMonitor,
    MonitorConfig,
    PredictionMonitor,
    ProbeInputs,
    VisualRelianceMonitor,
    require_video,
)
from agra.methods.method import observation_inputs
from agra.recipes.vla import tiny_vla


@pytest.fixture
def probes(small_config, make_batch):
    masks = torch.zeros(5, *small_config.method.model.token_grid, dtype=torch.bool)
    masks[:, :, 0, 1] = True
    masks[4] = True  # too large to be matched
    return ProbeInputs(inputs=observation_inputs(make_batch(small_config, 5), small_config.method), masks=masks)


@pytest.fixture
def wam(small_config):
    torch.manual_seed(0)
    return small_config.method.build().train()


def make_visual_reliance(config, batch):
    inputs = observation_inputs(batch, config.method)
    return VisualRelianceMonitor(
        inputs, batch.actions, ["go"] * len(batch), lambda actions: actions[:, 1, :2].float().numpy()
    )


def test_the_figures_repeat_and_the_method_keeps_its_mode(wam, probes):
    monitor = GroundingMonitor(probes, MonitorConfig(sensitivity_samples=3))
    before = torch.get_rng_state()
    figures = monitor(wam)
    assert figures == monitor(wam)
    assert torch.equal(before, torch.get_rng_state())
    assert wam.training
    assert set(figures) == {"in_mask_ratio", "centroid_error", "sensitivity_ratio"}
    even = (4 * 1 / 6 + 1) / 5  # the attention of an untrained head is nearly uniform
    assert figures["in_mask_ratio"] == pytest.approx(even, abs=0.05)
    assert "sensitivity_ratio" not in GroundingMonitor(probes, MonitorConfig(sensitivity_samples=0))(wam)


def test_all_attention_is_inside_a_mask_of_everything(wam, probes):
    everywhere = replace(probes, masks=torch.ones_like(probes.masks))
    figures = GroundingMonitor(everywhere, MonitorConfig())(wam)
    assert figures["in_mask_ratio"] == pytest.approx(1)
    assert "sensitivity_ratio" not in figures  # nothing is left to match with


def test_bad_settings_are_named(probes):
    with pytest.raises(ValueError, match="background_sets >= 1"):
        MonitorConfig(background_sets=0)
    with pytest.raises(ValueError, match="no probe sample has a mask"):
        GroundingMonitor(replace(probes, masks=probes.masks[:0]), MonitorConfig())


@pytest.mark.parametrize("chunk", [2, 16])
def test_monitors_run_in_chunks_and_in_the_training_s_precision(
    wam, probes, small_config, make_batch, monkeypatch, chunk
):
    """As the trainer calls them, under its autocast. No forward has more than a chunk's samples."""
    monkeypatch.setattr(monitors, "CHUNK", chunk)
    calls, condition = [], wam.wam.condition

    def watch(latents, *arguments, **options):
        hidden = condition(latents, *arguments, **options)
        calls.append((len(latents), hidden[wam.read_layers[0]].dtype))
        return hidden

    monkeypatch.setattr(wam.wam, "condition", watch)
    both = {
        "grounding": GroundingMonitor(probes, MonitorConfig(sensitivity_samples=2)),
        "visual_reliance": make_visual_reliance(small_config, make_batch(small_config, 5)),
    }
    exact = {name: monitor(wam) for name, monitor in both.items()}
    assert {dtype for _, dtype in calls} == {torch.float32}
    assert max(count for count, _ in calls) == min(chunk, 5)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = {name: monitor(wam) for name, monitor in both.items()}
    assert {dtype for _, dtype in calls} == {torch.bfloat16}
    assert half["grounding"]["in_mask_ratio"] == pytest.approx(exact["grounding"]["in_mask_ratio"], abs=0.01)
    assert half["visual_reliance"]["error"] == pytest.approx(exact["visual_reliance"]["error"], rel=0.05)


def test_figures_do_not_depend_on_the_chunk(wam, probes, small_config, make_batch, monkeypatch):
    monitor, visual = (
        GroundingMonitor(probes, MonitorConfig()),
        make_visual_reliance(small_config, make_batch(small_config, 5)),
    )
    figures, measures = monitor(wam), visual(wam)
    monkeypatch.setattr(monitors, "CHUNK", 1)
    assert monitor(wam) == pytest.approx(figures, rel=1e-4)
    assert visual(wam) == pytest.approx(measures, rel=1e-4)


def test_a_method_without_token_grids_has_no_grounding(plain_policy, probes):
    with pytest.raises(ValueError, match=r"monitor\.probes: not applicable to the method plain"):
        GroundingMonitor(probes, MonitorConfig())(plain_policy.method)


class Repeat:
    """A codec of one pixel for each latent value: 4 frames a latent frame, but for the first, which is one."""

    def decode(self, latents):
        first, rest = latents[:, :3, :1], latents[:, :3, 1:].repeat_interleave(4, dim=2)
        return torch.cat([first, rest], dim=2)


def test_predictions_are_compared_with_the_recording(wam, small_config, make_batch):
    batch = make_batch(small_config, 5)
    batch = replace(batch, latents=batch.latents.clamp(-0.9, 0.9))
    monitor = PredictionMonitor(batch, 3, small_config.method, Repeat())
    height, width = batch.latents.shape[-2:]
    wam.imagine = lambda inputs, noise, steps: batch.latents[: len(inputs)] + torch.tensor([0, 0.1])[:, None, None]
    figures = monitor(wam)
    assert set(figures) == {"psnr", "video"}
    assert figures["psnr"] == pytest.approx(20 * np.log10(255 / 12.75), abs=0.3)
    video = figures["video"].astype(int)  # (F, 2H, B W, 3)
    assert video.shape == (5, 2 * height, 3 * width, 3)
    expected = (127.5 * (batch.latents[2, :3, 1].permute(1, 2, 0).numpy() + 1)).round()
    assert np.array_equal(video[4, :height, 2 * width :], expected)  # the recording above
    assert np.array_equal(video[0, :height], video[0, height:])  # the observation in both
    assert np.abs(video[1:, height:] - video[1:, :height] - 12.75).max() <= 1


def test_predictions_of_an_untrained_model_repeat(wam, small_config, make_batch):
    monitor = PredictionMonitor(make_batch(small_config, 3), 2, small_config.method, Repeat())
    before = torch.get_rng_state()
    first, second = monitor(wam), monitor(wam)
    assert first["psnr"] == second["psnr"] < 20
    assert np.array_equal(first["video"], second["video"])
    assert torch.equal(before, torch.get_rng_state())
    assert wam.training


def test_a_method_without_video_has_no_predictions(small_config):
    require_video(small_config.method)
    with pytest.raises(ValueError, match=r"monitor\.predictions: not applicable to the method vla"):
        require_video(tiny_vla().method)
    with pytest.raises(ValueError, match=r"monitor\.predictions: expected at least 0, got -1"):
        MonitorConfig(predictions=-1)


def test_a_method_without_visible_attention_has_sensitivity_alone(token_policy, make_sample):
    """A sample that nothing moves has no ratio. With no other sample the figure is absent."""
    method = token_policy.method
    inputs = token_policy.encode([make_sample(seed=seed).observation for seed in range(3)])
    masks = torch.zeros(3, *method.token_grid, dtype=torch.bool)
    masks[:, :, 0, 1] = True
    monitor = GroundingMonitor(ProbeInputs(inputs=inputs, masks=masks), MonitorConfig(background_sets=1))
    assert monitor(method) == {}
    method.tokens_read = lambda hidden: hidden[0].flatten(1, 3).square().sum(dim=1)
    assert set(monitor(method)) == {"sensitivity_ratio"}


def test_a_method_without_instruction_has_no_measure_of_it(plain_policy):
    """The figure is absent, not zero, although the instructions differ."""
    torch.manual_seed(0)
    inputs = PolicyInputs(
        state=torch.randn(12, 4), embodiment=torch.zeros(12, dtype=torch.long), latents=torch.randn(12, 3, 1, 4, 5)
    )
    texts = [f"take {row % 2}" for row in range(12)]
    monitor = VisualRelianceMonitor(inputs, torch.randn(12, 4, 3), texts, lambda actions: actions[:, 0, :2].numpy())
    measures = monitor(plain_policy.method)
    assert measures["image_swap_shift"] > 0
    assert not {"instruction_swap_shift", "follows_instruction"} & set(measures)


def test_visual_reliance_falls_to_zero_without_the_image(wam, small_config, make_batch):
    monitor = make_visual_reliance(small_config, make_batch(small_config, 12))
    before = torch.get_rng_state()
    measures = monitor(wam)
    assert measures == monitor(wam)
    assert torch.equal(before, torch.get_rng_state())
    assert wam.training
    assert measures["image_swap_shift"] > 0
    assert measures["error_ratio"] == pytest.approx(measures["error"] / measures["constant_error"])
    assert "instruction_swap_shift" not in measures  # all episodes have the same instruction
    with torch.no_grad():
        wam.wam.video_dit.transformer.patch_embed.proj.weight.zero_()
    assert monitor(wam)["image_swap_shift"] == pytest.approx(0, abs=1e-6)
