"""Noise levels and Euler steps."""

import pytest
import torch

from agra.flow import beta_levels, euler, interpolate, logit_normal_levels, uniform_levels, velocity


def test_interpolate_spreads_the_level_from_the_left():
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    level = torch.tensor([0.0, 1.0])
    mixed = interpolate(data, noise, level)
    assert torch.equal(mixed[0], data[0])
    assert torch.equal(mixed[1], noise[1])
    per_frame = interpolate(data, noise, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    assert torch.equal(per_frame[0, 1], noise[0, 1])
    assert torch.equal(per_frame[1, 1], data[1, 1])


def test_interpolate_refuses_a_level_that_does_not_lead():
    with pytest.raises(ValueError, match=r"noise level of shape \(3,\) does not lead data of shape \(2, 3\)"):
        interpolate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


def test_euler_recovers_the_data_under_the_true_velocity():
    """The path is straight, so any number of steps lands on the data exactly."""
    data, noise = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    levels = []

    def predict(sample, level):
        levels.append(level[0].item())
        return velocity(data, noise)

    torch.testing.assert_close(euler(predict, noise, 4), data)
    assert levels == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="at least one step, got 0"):
        euler(predict, noise, 0)


def test_logit_normal_quantiles_are_cosmos():
    torch.manual_seed(0)
    levels = logit_normal_levels(200_000)
    quantiles = torch.quantile(levels, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(quantiles, torch.tensor([0.49, 0.72, 0.834, 0.908, 0.963]), atol=0.006, rtol=0)
    logit = torch.logit(levels)
    assert logit.mean().item() == pytest.approx(torch.log(torch.tensor(5.0)).item(), abs=0.01)
    assert logit.std().item() == pytest.approx(1.0, abs=0.01)


def test_uniform_levels_fill_the_interval():
    torch.manual_seed(0)
    levels = uniform_levels(100_000)
    assert levels.min() >= 0
    assert levels.max() < 1
    assert levels.mean().item() == pytest.approx(0.5, abs=0.005)


def test_beta_levels_are_gr00t_reversed():
    """b ~ Beta(1.5, 1) has CDF b^1.5; the level is b / 0.999, clamped."""
    torch.manual_seed(0)
    levels = beta_levels(200_000)
    assert levels.max() <= 1
    for at in (0.2, 0.5, 0.8):
        assert (levels <= at).float().mean().item() == pytest.approx((at * 0.999) ** 1.5, abs=0.005)
    assert (levels == 1).float().mean().item() == pytest.approx(1 - 0.999**1.5, abs=0.001)


def test_levels_follow_the_global_seed():
    for sampler in (logit_normal_levels, uniform_levels, beta_levels):
        torch.manual_seed(3)
        first = sampler(5)
        torch.manual_seed(3)
        assert torch.equal(first, sampler(5))
