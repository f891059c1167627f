from dataclasses import replace

import pytest
import torch

from agra.diagnostics.monitors.grounding import GroundingMonitor, MonitorConfig, ProbeInputs
from agra.wam.model import WAM


@pytest.fixture
def inputs(small_config, make_batch):
    batch = make_batch(small_config, 5)
    masks = torch.zeros(5, *small_config.model.token_grid, dtype=torch.bool)
    masks[:, :, 0, 1] = True
    masks[4] = True  # too large to be matched
    return ProbeInputs(
        latents=batch.latents[:, :, :1], instruction=batch.instruction, state=batch.state,
        embodiment=batch.embodiment, masks=masks,
    )  # fmt: skip


def test_it_says_the_same_again_and_leaves_no_trace(small_config, inputs):
    torch.manual_seed(0)
    wam, monitor = WAM(small_config.model).train(), GroundingMonitor(inputs, MonitorConfig(sensitivity_samples=3))
    before = torch.get_rng_state()
    first = monitor(wam)
    assert first == monitor(wam)
    assert torch.equal(before, torch.get_rng_state())
    assert wam.training
    assert set(first) == {"in_mask_ratio", "centroid_error", "sensitivity_ratio"}
    even = (4 * 1 / 6 + 1) / 5  # an untrained head's attention is nearly even
    assert first["in_mask_ratio"] == pytest.approx(even, abs=0.05)
    assert "sensitivity_ratio" not in GroundingMonitor(inputs, MonitorConfig(sensitivity_samples=0))(wam)


def test_it_sees_where_attention_goes(small_config, inputs):
    """Masks moved onto everything: all of the attention lies inside."""
    torch.manual_seed(0)
    everywhere = replace(inputs, masks=torch.ones_like(inputs.masks))
    found = GroundingMonitor(everywhere, MonitorConfig())(WAM(small_config.model))
    assert found["in_mask_ratio"] == pytest.approx(1)
    assert "sensitivity_ratio" not in found  # nothing is left to match with


def test_what_cannot_be_is_named(inputs):
    with pytest.raises(ValueError, match="draws >= 1"):
        MonitorConfig(background_sets=0)
    with pytest.raises(ValueError, match="no probe sample has a mask"):
        GroundingMonitor(replace(inputs, masks=inputs.masks[:0]), MonitorConfig())
