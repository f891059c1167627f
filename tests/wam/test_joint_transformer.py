"""UWM's transformer against its equations in numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from agra.wam.joint_transformer import JointBlock, JointTransformer, JointTransformerConfig, sinusoid

SMALL = JointTransformerConfig(width=8, num_blocks=2, num_heads=2, num_registers=3, patch_size=(2, 3), step_dim=4)
IMAGES = (2, 3, 4, 6)  # 2 x 2 tokens


def make_transformer(seed=0):
    torch.manual_seed(seed)
    return JointTransformer(SMALL, actions=(5, 2), images=IMAGES, condition_dim=6)


def noise_everywhere(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def values(layer):
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


def linear(x, layer):
    weight, bias = values(layer)
    return x @ weight.T + bias


def silu(x):
    return x / (1 + np.exp(-x))


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def block(x, condition, layer):
    """One sample, (N, D)."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = np.split(linear(silu(condition), layer.modulation), 6)
    heads, width = layer.num_heads, x.shape[1]
    q, k, v = np.split(linear(norm(x) * (1 + scale) + shift, layer.qkv), 3, axis=1)
    attended = np.zeros_like(x)
    for part in np.split(np.arange(width), heads):
        scores = q[:, part] @ k[:, part].T / len(part) ** 0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        attended[:, part] = weights / weights.sum(axis=1, keepdims=True) @ v[:, part]
    x = x + gate * linear(attended, layer.out)
    hidden = gelu(linear(norm(x) * (1 + mlp_scale) + mlp_shift, layer.mlp[0]))
    return x + mlp_gate * linear(hidden, layer.mlp[2])


def test_the_step_is_a_sinusoid():
    row = sinusoid(torch.tensor([7]), 8)[0].numpy()
    frequencies = [10_000 ** (-i / 3) for i in range(4)]
    np.testing.assert_allclose(
        row, [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies], atol=1e-6
    )


def test_a_block_is_its_equations():
    torch.manual_seed(0)
    layer = JointBlock(SMALL, condition_dim=6)
    noise_everywhere(layer)
    x, condition = torch.randn(2, 7, 8), torch.randn(2, 6)
    answer = layer(x, condition).detach().numpy()
    for row in range(2):
        expected = block(x[row].double().numpy(), condition[row].double().numpy(), layer)
        np.testing.assert_allclose(answer[row], expected, atol=1e-4)


def test_the_network_is_its_equations():
    """Tokens are actions, patches (frame, channel, y, x) row by row, and registers; each output has its own decoder."""
    network = make_transformer()
    noise_everywhere(network)
    actions, images, condition = torch.randn(2, 5, 2), torch.randn(2, *IMAGES), torch.randn(2, 6)
    action_step, image_step = torch.tensor([3, 90]), torch.tensor([41, 0])
    chunk, predicted = (x.detach().numpy() for x in network(actions, images, action_step, image_step, condition))
    for row in range(2):
        frames = images[row].double().numpy()
        places = [(slice(2 * i, 2 * i + 2), slice(3 * j, 3 * j + 3)) for i in range(2) for j in range(2)]
        patches = np.stack([frames[:, :, y, x].reshape(-1) for y, x in places])
        encoder = network.action_encoder
        action_tokens = linear(mish(linear(actions[row].double().numpy(), encoder[0])), encoder[2])
        registers = network.registers.detach().double().numpy()
        x = np.concatenate([action_tokens, linear(patches, network.image_encoder), registers])
        x = x + network.positions.detach().double().numpy()
        steps = torch.cat([sinusoid(step[row : row + 1], 4)[0] for step in (action_step, image_step)]).double().numpy()
        steps = linear(mish(linear(steps, network.step_encoder[0])), network.step_encoder[2])
        whole = np.concatenate([condition[row].double().numpy(), steps])
        for layer in network.blocks:
            x = block(x, whole, layer)
        shift, scale = np.split(linear(silu(whole), network.modulation), 2)
        x = linear(norm(x) * (1 + scale) + shift, network.head)
        decoder = network.action_decoder
        np.testing.assert_allclose(chunk[row], linear(mish(linear(x[:5], decoder[0])), decoder[2]), atol=1e-4)
        for (y, z), values_of_patch in zip(places, linear(x[5:9], network.image_decoder), strict=True):
            np.testing.assert_allclose(predicted[row][:, :, y, z].reshape(-1), values_of_patch, atol=1e-4)


def test_blocks_start_as_the_identity():
    network, x = make_transformer(), torch.randn(3, 7, 8)
    for layer in network.blocks:
        assert torch.equal(layer(x, torch.randn(3, 10)), x)
    assert not network.modulation.weight.any()
    # So nothing depends on the observation, on the steps or on the other modality, but for the gates' gradients.
    actions, images = torch.randn(1, 5, 2), torch.randn(1, *IMAGES)
    one, other = (
        network(actions, images * factor, torch.tensor([step]), torch.tensor([99 - step]), torch.randn(1, 6))[0]
        for factor, step in ((1, 0), (2, 50))
    )
    assert torch.equal(one, other)
    one.square().sum().backward()
    assert network.blocks[0].modulation.weight.grad.any()


def test_patches_come_back():
    images = torch.randn(2, *IMAGES)
    network = make_transformer()
    assert torch.equal(network.unpatch(network.patches(images)), images)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width: expected a multiple of 3 heads, got 8"):
        replace(SMALL, num_heads=3)
    with pytest.raises(ValueError, match=r"latents of \(4, 7\) do not divide into patches of \(2, 3\)"):
        JointTransformer(SMALL, actions=(5, 2), images=(2, 3, 4, 7), condition_dim=6)
    with pytest.raises(ValueError, match="step_dim: expected an even number"):
        replace(SMALL, step_dim=5)
