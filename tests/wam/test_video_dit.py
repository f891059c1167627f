"""The forward pass of the Cosmos transformer against diffusers' own."""

import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers.models.transformers.transformer_cosmos as stock
import pytest
import torch
from diffusers import CosmosTransformer3DModel
from torch.nn.functional import interpolate

from agra.wam.video_dit import VideoDiT, VideoDiTConfig, _attend, _attention_weights, _keys_values

CONFIG = VideoDiTConfig(
    latent_channels=6, num_layers=3, num_heads=2, head_dim=24, adaln_lora_dim=16, text_dim=20, text_projection_dim=None
)


@pytest.fixture(autouse=True)
def _resize_without_torchvision(monkeypatch):
    """Replace the nearest resize of the padding mask, for which the stock forward pass needs torchvision."""
    functional = SimpleNamespace(
        resize=lambda mask, size, interpolation: interpolate(mask, size=size, mode=interpolation)
    )
    stand_in = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(stock, "transforms", stand_in, raising=False)


def _random(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = VideoDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def _inputs(batch=2, frames=3, size=(8, 12), text=(5, 20)):
    mask = torch.zeros(batch, 1, frames, *size)
    mask[:, :, 0] = 1
    return torch.randn(batch, 6, frames, *size), torch.randn(batch, *text), mask


def _twin(model):
    """diffusers' own transformer with the same weights."""
    twin = model.config.build()
    twin.load_state_dict(model.transformer.state_dict())
    return twin


def _stock(transformer, latents, level, text, mask):
    return transformer(
        hidden_states=latents,
        timestep=level if level.ndim == 1 else level[:, None, :, None, None],
        encoder_hidden_states=text,
        condition_mask=mask,
        padding_mask=torch.zeros(1, 1, 64, 96),
    ).sample


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"learned_positions": True}, {"text_projection_dim": 30}], ids=["plain", "learned", "projection"]
)
def test_forward_equals_diffusers(per_frame, changes):
    config = replace(CONFIG, **changes)
    model = _random(config)
    latents, text, mask = _inputs(text=(5, config.text_projection_dim or 20))
    level = torch.rand(2, 3) if per_frame else torch.rand(2)
    ours = model(latents, level, text, condition_mask=mask).velocity
    theirs = _stock(_twin(model), latents, level, text, mask)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_gradients_equal_diffusers():
    model = _random()
    latents, text, mask = _inputs()
    level = torch.rand(2, 3)
    twin = _twin(model)
    model(latents, level, text, condition_mask=mask).velocity.square().mean().backward()
    _stock(twin, latents, level, text, mask).square().mean().backward()
    gradients = [[p.grad for p in m.parameters()] for m in (model.transformer, twin)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_levels_are_embedded_in_float32():
    """As in Cosmos's own code, in training and with the bfloat16 weights of an answer."""
    model, level = _random(), torch.tensor([[0.8, 0.803]])
    whole = model.embed_levels(level, torch.zeros(1))
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.embed_levels(level, torch.zeros(1, dtype=torch.bfloat16))
        rounded = model.transformer.time_embed(torch.zeros(1, dtype=torch.bfloat16), level.flatten())
    for one, exact, theirs in zip(ours, whole, rounded, strict=True):
        assert torch.equal(one, exact.bfloat16())
        assert not torch.equal(one.flatten(), theirs.flatten())
    stored = {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}
    rounded = _random()
    rounded.load_state_dict(stored)
    expected = rounded.embed_levels(level, torch.zeros(1))
    answer = rounded.bfloat16().embed_levels(level, torch.zeros(1, dtype=torch.bfloat16))
    for one, exact in zip(answer, expected, strict=True):
        assert torch.equal(one, exact.bfloat16())


def test_hidden_states_are_the_blocks_outputs():
    model = _random()
    latents, text, mask = _inputs()
    level = torch.rand(2)
    outputs = {}
    twin = _twin(model)
    for i, block in enumerate(twin.transformer_blocks):
        block.register_forward_hook(lambda _, __, out, i=i: outputs.__setitem__(i, out))
    _stock(twin, latents, level, text, mask)
    hidden = model(latents, level, text, condition_mask=mask, layers=(0, 1, 2)).hidden
    assert sorted(hidden) == [0, 1, 2]
    for index, value in hidden.items():
        assert value.shape == (2, 3, 4, 6, 48)
        torch.testing.assert_close(value.flatten(1, 3), outputs[index], atol=2e-5, rtol=0)


def test_text_attention_holds_the_weights_of_the_values():
    """A value of 1 for a token and 0 for the rest becomes that token's weight. Recording the weights changes nothing."""
    model = _random()
    (latents, text, mask), level = _inputs(), torch.rand(2)
    plain = model(latents, level, text, condition_mask=mask)
    watched = model(latents, level, text, condition_mask=mask, text_layers=(0, 1))
    assert torch.equal(watched.velocity, plain.velocity)
    assert {layer: weights.shape for layer, weights in watched.text_attention.items()} == dict.fromkeys(
        (0, 1), (2, 3, 4, 6, 5)
    )
    attn = model.transformer.transformer_blocks[0].attn2
    x, context = torch.randn(2, 7, attn.to_q.in_features), torch.randn(2, 5, attn.to_k.in_features)
    weights = _attention_weights(attn, x, _keys_values(attn, context)[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))
    width = attn.to_q.out_features
    indicator = SimpleNamespace(
        heads=attn.heads, to_q=attn.to_q, to_k=attn.to_k, norm_q=attn.norm_q, norm_k=attn.norm_k,
        to_v=lambda c: torch.eye(5)[None, :, 3:4].expand(2, 5, width), to_out=[torch.nn.Identity()],
    )  # fmt: skip
    attended = _attend(indicator, x, _keys_values(indicator, context)).unflatten(-1, (attn.heads, -1)).mean(dim=(2, 3))
    torch.testing.assert_close(attended, weights[..., 3])


def test_stops_after_the_last_requested_layer():
    model = _random()
    latents, text, mask = _inputs()
    output = model(latents, torch.rand(2), text, condition_mask=mask, layers=(1,), velocity=False)
    assert output.velocity is None
    output.hidden[1].square().mean().backward()
    used = {
        name.split(".")[2]
        for name, p in model.named_parameters()
        if "transformer_blocks" in name and p.grad is not None
    }
    assert used == {"0", "1"}


def test_config_and_weights_interchange(tmp_path):
    model = _random()
    model.transformer.save_pretrained(tmp_path)
    loaded = CosmosTransformer3DModel.from_pretrained(tmp_path)
    written, original = json.loads(loaded.to_json_string()), json.loads(model.transformer.to_json_string())
    assert {k: v for k, v in written.items() if k != "_name_or_path"} == original
    for ours, theirs in zip(model.transformer.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])


def test_paper_scale_has_cosmos_parameters():
    with torch.device("meta"):
        model = VideoDiT(VideoDiTConfig())
    assert sum(p.numel() for p in model.parameters()) == 2_059_174_912
    shapes = {name: tuple(p.shape) for name, p in model.transformer.named_parameters()}
    assert shapes["patch_embed.proj.weight"] == (2048, 72)
    assert shapes["transformer_blocks.27.ff.net.2.weight"] == (2048, 8192)
    assert shapes["crossattn_proj.0.weight"] == (1024, 100352)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": (3,)}, r"layers: expected 0\.\.2"),
        ({"level": torch.rand(2, 2)}, r"noise_level: expected \(2,\) or \(2, 3\), got \(2, 2\)"),
        ({"text": torch.rand(2, 5, 7)}, "instruction tokens: expected width 20, got 7"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    latents, text, mask = _inputs()
    with pytest.raises(ValueError, match=message):
        _random()(
            latents,
            kwargs.get("level", torch.rand(2)),
            kwargs.get("text", text),
            condition_mask=mask,
            layers=kwargs.get("layers", ()),
        )


def test_pretrained_weights_load_from_a_diffusers_folder(tmp_path):
    """The layout of the public checkpoints: a folder with a `transformer` written by diffusers."""
    theirs = _random(seed=3).transformer
    theirs.save_pretrained(tmp_path / "model" / "transformer")
    ours = _random(seed=4)
    ours.load_pretrained(str(tmp_path / "model"))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.transformer.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"another architecture; num_layers is 3 there and 2 in this recipe"):
        VideoDiT(replace(CONFIG, num_layers=2)).load_pretrained(str(tmp_path / "model"))
    (tmp_path / "model/transformer/config.json").unlink()
    with pytest.raises(ValueError, match=r"its transformer: made for another architecture; \d+ entries do not fit"):
        VideoDiT(replace(CONFIG, num_layers=2)).load_pretrained(str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match="the folder must hold transformer as saved by save_pretrained"):
        ours.load_pretrained(str(tmp_path))
