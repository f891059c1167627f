"""The action head: GR00T-N1.5's parameter counts, attention, embodiments."""

from dataclasses import replace

import pytest
import torch

from agra.wam.action_dit import ActionDiT, ActionDiTConfig
from agra.wam.bridge import Bridge, BridgeConfig

TINY = ActionDiTConfig(
    state_dim=5,
    action_dim=3,
    horizon=4,
    num_embodiments=2,
    num_blocks=2,
    num_heads=2,
    head_dim=8,
    guidance_dim=12,
    hidden_dim=16,
    dropout=0.0,
)


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _inputs(batch=3, config=TINY, tokens=7):
    torch.manual_seed(1)
    return {
        "noisy_actions": torch.randn(batch, config.horizon, config.action_dim),
        "state": torch.randn(batch, config.state_dim),
        "noise_level": torch.rand(batch),
        "guidance": [torch.randn(batch, tokens, config.guidance_dim) for _ in range(config.num_blocks)],
        "embodiment": torch.zeros(batch, dtype=torch.long),
    }


@pytest.fixture
def head():
    torch.manual_seed(0)
    return ActionDiT(TINY).eval()


def test_parameter_counts_are_gr00t_n15():
    config = ActionDiTConfig(future_tokens=32)
    with torch.device("meta"):
        head, bridge = ActionDiT(config), Bridge(BridgeConfig())
    dit = [head.blocks, head.time_embedding, head.modulation_out, head.project_out]
    assert sum(map(_count, dit)) == 550_386_688
    assert _count(bridge.blocks) == 201_433_088
    assert _count(head) + _count(bridge) == 763_300_896
    with torch.device("meta"):
        banks = ActionDiT(replace(config, num_embodiments=32))
    assert _count(banks) + _count(bridge) == 1_068_806_144


def test_literal_preset_is_464_million():
    with torch.device("meta"):
        head = ActionDiT(ActionDiTConfig(head_dim=32, future_tokens=32))
    assert _count(head) + 201_433_088 + 4096 == 464_198_688


def test_attention_weights_are_those_that_acted(head):
    inputs = _inputs()
    plain, watched = head(**inputs), head(**inputs, return_attention=True)
    assert plain.attention is None
    torch.testing.assert_close(plain.velocity, watched.velocity, atol=1e-6, rtol=1e-5)
    assert [tuple(a.shape) for a in watched.attention] == [(3, 2, 1 + 4, 7)] * 2
    for weights in watched.attention:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 5))


def test_each_block_reads_its_own_guidance(head):
    inputs = _inputs()
    before = head(**inputs, return_attention=True).attention
    inputs["guidance"][1] = torch.randn_like(inputs["guidance"][1])
    after = head(**inputs, return_attention=True).attention
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_embodiments_have_their_own_weights(head):
    inputs = _inputs()
    first = head(**inputs).velocity
    inputs["embodiment"] = torch.tensor([0, 1, 0])
    mixed = head(**inputs).velocity
    torch.testing.assert_close(mixed[[0, 2]], first[[0, 2]])
    assert not torch.allclose(mixed[1], first[1])
    mixed.sum().backward()
    used = head.action_encoder.layer1.weight.grad.abs().sum(dim=(1, 2))
    assert (used > 0).all()


def test_time_runs_from_noise_to_data(head):
    """Level 0.75 is GR00T's bucket 250, independent of float rounding."""
    times = []
    head.action_encoder.register_forward_hook(lambda _, args, __: times.append(args[1]))
    inputs = _inputs()
    inputs["noise_level"] = torch.tensor([1.0, 0.75, 0.3])
    head(**inputs)
    assert torch.equal(times[0], head.action_encoder.time_features(torch.tensor([0.0, 250.0, 700.0])))


def test_time_may_grow_with_noise():
    torch.manual_seed(0)
    head = ActionDiT(replace(TINY, time_grows_with_noise=True)).eval()
    assert head.bucket(torch.tensor([1.0, 0.75, 0.3])).tolist() == [1000, 750, 300]


def test_self_attention_may_come_first(head):
    """The same sub-blocks in the other order: the attention shown is that of the second and the fourth."""
    torch.manual_seed(0)
    other = ActionDiT(replace(TINY, self_attention_first=True)).eval()
    assert [block.attn.to_k.in_features for block in other.blocks] == [16, 12, 16, 12]
    assert [block.attn.to_k.in_features for block in head.blocks] == [12, 16, 12, 16]
    order = (1, 0, 3, 2)
    other.load_state_dict(
        {
            (
                f"blocks.{order[int(name.split('.')[1])]}.{name.split('.', 2)[2]}"
                if name.startswith("blocks.")
                else name
            ): v
            for name, v in head.state_dict().items()
        }
    )
    inputs = _inputs()
    shown = other(**inputs, return_attention=True).attention
    assert [weights.shape[-1] for weights in shown] == [7, 7]
    bucket = other.bucket(inputs["noise_level"])
    x, time = (
        other._tokens(inputs["noisy_actions"], inputs["state"], bucket, inputs["embodiment"]),
        other.embed_time(bucket, torch.float32),
    )
    for block, context in zip(
        (head.blocks[i] for i in order), (None, inputs["guidance"][0], None, inputs["guidance"][1]), strict=True
    ):
        x, _ = block(x, context, time, False)
    expected = other.project(x, other.modulate_out(time), 4, inputs["embodiment"])
    torch.testing.assert_close(other(**inputs).velocity, expected)
    assert not torch.allclose(head(**inputs).velocity, expected)


def test_state_dropout_acts_in_training_only():
    torch.manual_seed(0)
    head = ActionDiT(replace(TINY, state_dropout=1.0))
    inputs = _inputs()
    other = inputs | {"state": torch.randn(3, 5)}
    assert torch.equal(head(**inputs).velocity, head(**other).velocity)
    head.eval()
    assert not torch.allclose(head(**inputs).velocity, head(**other).velocity)


def test_draws_that_share_a_guidance_act_as_if_each_had_its_own(head):
    inputs = _inputs(batch=6)
    inputs["guidance"] = [g[::3] for g in inputs["guidance"]]
    shared = head(**inputs, return_attention=True)
    inputs["guidance"] = [g.repeat_interleave(3, dim=0) for g in inputs["guidance"]]
    apart = head(**inputs, return_attention=True)
    torch.testing.assert_close(shared.velocity, apart.velocity, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(shared.attention, apart.attention, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    inputs["guidance"] = [g[:4] for g in inputs["guidance"]]
    with pytest.raises(ValueError, match=r"number of samples that divides 6, .* got \[4, 4\]"):
        head(**inputs)


def test_wrong_number_of_guidances_is_named(head):
    inputs = _inputs()
    inputs["guidance"].pop()
    with pytest.raises(ValueError, match="guidance: expected 2, one per cross-attention block, got 1"):
        head(**inputs)
