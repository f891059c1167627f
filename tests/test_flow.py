"""Noise levels and Euler steps."""

import math

import pytest
import torch

from agra.flow import (
    beta_levels,
    continuation_weights,
    continue_chunk,
    euler,
    interpolate,
    logit_normal_levels,
    uniform_levels,
    velocity,
)


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
    with pytest.raises(ValueError, match=r"leading axes of the data, whose shape is \(2, 3\), got \(3,\)"):
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
    with pytest.raises(ValueError, match="expected at least 1 Euler step, got 0"):
        euler(predict, noise, 0)


def test_euler_calls_the_function_of_each_step_in_order():
    noise, calls = torch.zeros(1), []

    def function(step):
        return lambda sample, level: calls.append((step, level.item())) or torch.full((1,), 10.0**step)

    result = euler([function(step) for step in range(4)], noise, 4)
    assert calls == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert result.item() == -1111 / 4
    with pytest.raises(ValueError, match="one function for each of the 3 Euler steps, got 4"):
        euler([function(step) for step in range(4)], noise, 3)


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
    """b ~ Beta(1.5, 1) has CDF b^1.5. The level is b / 0.999, clamped."""
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


def test_continuation_weights_are_those_of_the_paper():
    """Eq. 5 of 2506.07339 with H = 10, d = 2, s = 4: c_i = (6 - i) / 5."""
    weights = continuation_weights(2, 6, 10)
    expected = [1, 1, *(c * (math.exp(c) - 1) / (math.e - 1) for c in (4 / 5, 3 / 5, 2 / 5, 1 / 5)), 0, 0, 0, 0]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert continuation_weights(0, 0, 3).tolist() == [0, 0, 0]
    assert continuation_weights(3, 3, 3).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="delay <= overlap"):
        continuation_weights(4, 3, 10)


def test_guidance_is_eq_2_of_the_paper_in_our_time():
    """The paper's convention (time 1 - level, velocity towards data), computed with a full Jacobian."""
    torch.manual_seed(0)
    matrix, target, weights = torch.randn(6, 6), torch.randn(1, 3, 2), torch.rand(1, 3, 2)
    for level in (1.0, 0.75, 0.3):
        time, sample = 1 - level, torch.randn(1, 3, 2)

        def predict(x, _):
            return (x.flatten() @ matrix).tanh().view_as(x)

        def denoised(flat, time=time):
            return flat + (1 - time) * -predict(flat, None)

        flat = sample.flatten()
        jacobian = torch.autograd.functional.jacobian(denoised, flat)
        error = (target.flatten() - denoised(flat)) * weights.flatten()
        squared = (1 - time) ** 2 / (time**2 + (1 - time) ** 2)
        factor = min(5.0, (1 - time) / (time * squared) if time else math.inf)
        towards_data = -predict(flat, None) + factor * (error @ jacobian)
        ours = continue_chunk(predict, target, weights)(sample, torch.tensor([level]))
        torch.testing.assert_close(ours.flatten(), -towards_data, rtol=1e-4, atol=1e-5)


def test_guidance_reaches_the_old_chunk_through_a_network_that_listens():
    """If the denoised estimate follows the sample, the executed actions stay unchanged."""
    torch.manual_seed(0)
    noise, previous = torch.randn(2, 8, 3), 0.3 * torch.randn(2, 8, 3)
    weights = torch.zeros_like(noise)
    weights[0] = continuation_weights(4, 6, 8)[:, None]

    def predict(sample, level):  # the exact velocity for data ~ N(0, 1): the estimate is a share of the sample
        level = level.view(-1, 1, 1)
        return sample * (level - (1 - level)) / (level**2 + (1 - level) ** 2)

    plain = euler(predict, noise, 20)
    held = euler(continue_chunk(predict, previous, weights), noise, 20)
    before, after = ((chunk - previous)[0, :4].abs().mean() for chunk in (plain, held))
    assert after < 0.1 * before
    torch.testing.assert_close(held[0, 6:], plain[0, 6:])
    torch.testing.assert_close(held[1], plain[1])  # a row without a chunk to continue
