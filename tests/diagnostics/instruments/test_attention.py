import pytest
import torch

from agra.diagnostics.instruments.attention import action_attention, average_queries, capture_attention


def inputs(wam, policy, make_sample, count=3):
    prepared = policy.prepare([make_sample(seed=i).observation for i in range(count)])
    hidden = wam.condition(prepared.latents, policy.video_noise(count, 0), prepared.instruction)
    return wam.guide(hidden), prepared.state, prepared.embodiment, policy.action_noise(count, 0)


def test_attention_finds_the_token(wam, policy, make_sample, target):
    attention = action_attention(wam, *inputs(wam, policy, make_sample), (3, 4, 5))
    assert attention.shape == (3, 2, 3, 4, 5)
    torch.testing.assert_close(attention.sum(dim=(2, 3, 4)), torch.ones(3, 2))
    assert (attention[:, :, *target] == 1).all()


def test_capture_keeps_everything_and_changes_nothing(wam, policy, make_sample):
    arguments = inputs(wam, policy, make_sample)
    captured = capture_attention(wam, *arguments, steps=3)
    assert captured.weights.shape == (3, 3, 2, 2, 5, 60)  # B, steps, blocks, heads, queries, tokens
    assert torch.equal(captured.actions, wam.act(*arguments, steps=3))
    reduced = average_queries(captured.weights, 4).mean(dim=1)
    torch.testing.assert_close(reduced.unflatten(-1, (3, 4, 5)), action_attention(wam, *arguments, (3, 4, 5), steps=3))


def test_only_action_queries_count():
    weights = torch.zeros(1, 2, 5, 3)
    weights[:, :, :2, 0] = 1  # state and one learned token
    weights[:, 0, 2:, 1] = 1
    weights[:, 1, 2:, 2] = 1
    assert average_queries(weights, 3).tolist() == [[0, 0.5, 0.5]]
    with pytest.raises(ValueError, match="does not hold 6"):
        average_queries(weights, 6)


def test_dropout_is_refused(wam, policy, make_sample):
    arguments = inputs(wam, policy, make_sample)
    wam.train()
    with pytest.raises(ValueError, match="training mode"):
        action_attention(wam, *arguments, (3, 4, 5))
