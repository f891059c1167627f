"""The bridge: choice of layers, a shared projector, repeated layers."""

import pytest
import torch

from agra.wam.bridge import Bridge, BridgeConfig, bridged_layers, grid_sinusoid

TINY = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "dropout": 0.0}


def _hidden(*layers):
    torch.manual_seed(0)
    return {layer: torch.randn(2, 3, 2, 4, 16) for layer in layers}


@pytest.mark.parametrize(
    ("video", "action", "expected"),
    [(28, 8, (0, 4, 8, 12, 15, 19, 23, 27)), (6, 4, (0, 2, 3, 5)), (8, 8, tuple(range(8))), (1, 2, (0, 0))],
)
def test_bridged_layers(video, action, expected):
    assert bridged_layers(video, action) == expected


def test_a_single_block_has_no_spread():
    with pytest.raises(ValueError, match="num_action_blocks: expected at least 2"):
        bridged_layers(28, 1)


def test_layers_are_projected_alone_by_shared_weights():
    bridge = Bridge(BridgeConfig(layers=(0, 2), **TINY)).eval()
    hidden = _hidden(0, 2)
    first, second = bridge(hidden)
    assert first.shape == (2, 24, 16)
    hidden[2] = torch.zeros_like(hidden[2])
    torch.testing.assert_close(bridge(hidden)[0], first)
    swapped = bridge({0: hidden[0], 2: hidden[0]})
    torch.testing.assert_close(swapped[0], swapped[1])
    assert not torch.allclose(first, second)


def test_a_repeated_layer_is_projected_once():
    bridge = Bridge(BridgeConfig(layers=(1, 1, 1), **TINY))
    calls = []
    bridge.norm.register_forward_hook(lambda *_: calls.append(1))
    guidance = bridge(_hidden(1))
    assert len(guidance) == 3
    assert guidance[0] is guidance[2]
    assert calls == [1]


def test_positions_tell_tokens_apart():
    same = {0: torch.randn(1, 1, 1, 1, 16).expand(1, 3, 2, 4, 16)}
    plain = Bridge(BridgeConfig(layers=(0,), **TINY)).eval()(same)[0]
    placed = Bridge(BridgeConfig(layers=(0,), position_grid=(3, 2, 4), **TINY)).eval()(same)[0]
    assert plain.std(dim=1).max() < 1e-5
    assert placed.std(dim=1).max() > 1e-3


def test_position_sinusoid_is_as_large_as_a_normalised_state_and_unique():
    table = grid_sinusoid((2, 4, 7), 128).flatten(0, 2)
    assert table.square().mean(dim=1).sqrt().sub(0.7).abs().max() < 0.02
    distances = torch.cdist(table, table) + 100 * torch.eye(len(table))
    assert distances.min() > 1


def test_a_linear_projector_has_one_layer_of_weights_for_each_video_layer():
    bridge, hidden = Bridge(BridgeConfig(layers=(2, 0, 2), projector="linear", **TINY)), _hidden(0, 2)
    guidance = bridge(hidden)
    assert sum(p.numel() for p in bridge.parameters()) == 2 * (16 * 16 + 16)
    for layer, tokens in zip((2, 0, 2), guidance, strict=True):
        weights = bridge.linears[str(layer)]
        torch.testing.assert_close(tokens, hidden[layer].flatten(1, 3) @ weights.weight.T + weights.bias)
    assert guidance[0] is guidance[2]


def test_the_identity_passes_hidden_states_on():
    bridge, hidden = Bridge(BridgeConfig(layers=(2, 2), projector="identity", **TINY)), _hidden(2)
    assert not bridge.config.has_weights
    assert not list(bridge.parameters())
    for tokens in bridge(hidden):
        assert torch.equal(tokens, hidden[2].flatten(1, 3))
    placed = Bridge(BridgeConfig(layers=(2,), projector="identity", position_grid=(3, 2, 4), **TINY))
    assert placed.config.has_weights
    torch.testing.assert_close(placed(hidden)[0], (hidden[2] + placed.positions).flatten(1, 3))


def test_missing_layer_is_named():
    with pytest.raises(ValueError, match=r"hidden: expected the layers \(0, 2\), but \[2\] are missing"):
        Bridge(BridgeConfig(layers=(0, 2), **TINY))(_hidden(0))
