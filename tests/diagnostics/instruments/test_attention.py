import pytest
import torch

from agra.diagnostics.instruments.attention import action_attention, average_queries, capture_attention


@pytest.fixture
def arguments(method, policy, make_sample):
    """Hidden states, inputs and noise of three samples."""
    inputs, noise = policy.encode([make_sample(seed=i).observation for i in range(3)]), policy.noise(3, 0)
    return method.hidden(inputs, noise), inputs, noise


def test_attention_finds_the_token(method, arguments, target):
    attention = action_attention(method, *arguments, (3, 4, 5))
    assert attention.shape == (3, 2, 3, 4, 5)
    torch.testing.assert_close(attention.sum(dim=(2, 3, 4)), torch.ones(3, 2))
    assert (attention[:, :, *target] == 1).all()


def test_capture_keeps_everything_and_changes_nothing(method, arguments):
    captured = capture_attention(method, *arguments, steps=3)
    assert captured.weights.shape == (3, 3, 2, 2, 5, 60)  # B, steps, blocks, heads, queries, tokens
    assert torch.equal(captured.actions, method.act_on(*arguments, steps=3))
    reduced = average_queries(captured.weights, 4).mean(dim=1)
    expected = action_attention(method, *arguments, (3, 4, 5), steps=3)
    torch.testing.assert_close(reduced.unflatten(-1, (3, 4, 5)), expected)


def test_only_action_queries_count():
    weights = torch.zeros(1, 2, 5, 3)
    weights[:, :, :2, 0] = 1  # state and one learned token
    weights[:, 0, 2:, 1] = 1
    weights[:, 1, 2:, 2] = 1
    assert average_queries(weights, 3).tolist() == [[0, 0.5, 0.5]]
    with pytest.raises(ValueError, match="does not hold 6"):
        average_queries(weights, 6)


def test_training_mode_and_another_grid_are_refused(method, arguments):
    with pytest.raises(ValueError, match=r"60 tokens does not fit the grid \(3, 4, 4\)"):
        action_attention(method, *arguments, (3, 4, 4))
    method.train()
    with pytest.raises(ValueError, match="training mode"):
        action_attention(method, *arguments, (3, 4, 5))


def test_a_method_without_attention_is_named(plain_policy, arguments):
    with pytest.raises(ValueError, match="not applicable to the method plain"):
        action_attention(plain_policy.method, *arguments, (3, 4, 5))
