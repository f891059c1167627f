"""The import of GR00T-N1.5's head against a head built from diffusers' modules by its description."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import Attention, FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors.torch import save_file
from torch import nn

from agra.wam.action_dit import ActionDiT, ActionDiTConfig
from agra.wam.bridge import Bridge, BridgeConfig
from agra.wam.groot import load_groot_head

ROWS, WIDTH, STATE, ACTION, HIDDEN, GUIDE, HORIZON = 5, 16, 7, 3, 12, 24, 4
CONFIG = ActionDiTConfig(
    state_dim=STATE,
    action_dim=ACTION,
    horizon=HORIZON,
    num_embodiments=2,
    num_blocks=2,
    num_heads=2,
    head_dim=8,
    guidance_dim=GUIDE,
    hidden_dim=HIDDEN,
    future_tokens=3,
    max_horizon=8,
    dropout=0.0,
)
BRIDGE = BridgeConfig(layers=(0, 1), num_layers=2, num_heads=2, head_dim=12, dropout=0.0)


class Bank(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.W, self.b = (
            nn.Parameter(torch.randn(ROWS, n_in, n_out) * 0.3),
            nn.Parameter(torch.randn(ROWS, n_out) * 0.3),
        )

    def forward(self, x, row):
        return x @ self.W[row] + self.b[row]


class TwoLayers(nn.Module):
    def __init__(self, n_in, hidden, n_out):
        super().__init__()
        self.layer1, self.layer2 = Bank(n_in, hidden), Bank(hidden, n_out)

    def forward(self, x, row):
        return self.layer2(F.relu(self.layer1(x, row)), row)


class AdaNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(width, 1e-5, elementwise_affine=False)

    def forward(self, x, time):
        scale, shift = self.linear(F.silu(time)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width, heads, head_dim, cross=None, ada=True):
        super().__init__()
        self.ada = ada
        self.norm1 = AdaNorm(width) if ada else nn.LayerNorm(width)
        self.attn1 = Attention(width, cross, heads=heads, dim_head=head_dim, bias=True)
        self.norm3 = nn.LayerNorm(width, 1e-5, elementwise_affine=not ada)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")

    def forward(self, x, time=None, context=None):
        h = self.norm1(x, time) if self.ada else self.norm1(x)
        x = x + self.attn1(h, encoder_hidden_states=context)
        return x + self.ff(self.norm3(x))


class Groot(nn.Module):
    """N1.5's head in N1.5's convention: time 1 is data, the velocity points from noise to data."""

    def __init__(self):
        super().__init__()
        self.state_encoder, self.action_decoder = TwoLayers(STATE, HIDDEN, WIDTH), TwoLayers(HIDDEN, HIDDEN, ACTION)
        self.action_encoder = nn.ModuleDict(
            {"W1": Bank(ACTION, WIDTH), "W2": Bank(2 * WIDTH, WIDTH), "W3": Bank(WIDTH, WIDTH)}
        )
        self.position_embedding, self.future_tokens = nn.Embedding(8, WIDTH), nn.Embedding(3, WIDTH)
        self.vlln = nn.LayerNorm(GUIDE)
        self.vl_self_attention = nn.ModuleDict(
            {"transformer_blocks": nn.ModuleList(Block(GUIDE, 2, 12, ada=False) for _ in range(2))}
        )
        self.model = nn.ModuleDict(
            {
                "timestep_encoder": nn.ModuleDict({"timestep_embedder": TimestepEmbedding(256, WIDTH)}),
                "transformer_blocks": nn.ModuleList(
                    Block(WIDTH, 2, 8, cross=GUIDE if i % 2 == 0 else None) for i in range(4)
                ),
                "proj_out_1": nn.Linear(WIDTH, 2 * WIDTH),
                "proj_out_2": nn.Linear(WIDTH, HIDDEN),
            }
        )
        self.mask_token = nn.Parameter(torch.zeros(1))  # a tensor without counterpart

    def forward(self, noisy, state, time, features, row):
        features = self.vlln(features)
        for block in self.vl_self_attention["transformer_blocks"]:
            features = block(features)
        bucket = (time * 1000 + 1e-4).long()
        frequencies = torch.exp(-torch.arange(WIDTH // 2) * (torch.log(torch.tensor(10000.0)) / (WIDTH // 2)))
        angles = bucket[:, None] * frequencies
        encoded = torch.cat([angles.sin(), angles.cos()], -1)[:, None].expand(-1, HORIZON, -1)
        encoder = self.action_encoder
        x = torch.cat([encoder["W1"](noisy, row), encoded], -1)
        x = encoder["W3"](F.silu(encoder["W2"](x, row)), row) + self.position_embedding.weight[:HORIZON]
        future = self.future_tokens.weight.expand(len(noisy), -1, -1)
        x = torch.cat([self.state_encoder(state[:, None], row), future, x], 1)
        embedder = self.model["timestep_encoder"]["timestep_embedder"]
        embedding = embedder(Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)(bucket))
        for index, block in enumerate(self.model["transformer_blocks"]):
            x = block(x, embedding, features if index % 2 == 0 else None)
        shift, scale = self.model["proj_out_1"](F.silu(embedding)).chunk(2, dim=1)
        x = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return self.action_decoder(self.model["proj_out_2"](x), row)[:, -HORIZON:]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    theirs = Groot().eval()
    folder = tmp_path_factory.mktemp("groot")
    weights = {f"action_head.{name}": value.contiguous() for name, value in theirs.state_dict().items()}
    save_file({**weights, "backbone.eagle.weight": torch.zeros(2)}, folder / "model-00001-of-00001.safetensors")
    return theirs, str(folder)


def test_the_imported_head_is_groot_in_the_papers_convention(published):
    """Ours at level 1 - t equals minus theirs at t, for every embodiment, and so do four Euler steps."""
    theirs, folder = published
    torch.manual_seed(1)
    bridge, head = Bridge(BRIDGE).eval(), ActionDiT(CONFIG).eval()
    assert load_groot_head(bridge, head, folder, rows=(4, 2)) == ("mask_token",)
    noisy, state, hidden = torch.randn(3, HORIZON, ACTION), torch.randn(3, STATE), torch.randn(3, 1, 2, 5, GUIDE)
    guidance = bridge({0: hidden, 1: hidden})
    for ours, row in ((0, 4), (1, 2)):
        for time in (0.0, 0.25, 0.7):
            level = torch.full((3,), 1 - time)
            got = head(noisy, state, level, guidance, torch.full((3,), ours)).velocity
            expected = theirs(noisy, state, torch.full((3,), time), hidden.flatten(1, 3), row)
            torch.testing.assert_close(got, -expected, atol=1e-5, rtol=0)
            assert expected.abs().max() > 0.1


def test_banks_may_stay_fresh_and_shapes_must_fit(published):
    _, folder = published
    bridge, head = Bridge(BRIDGE), ActionDiT(replace(CONFIG, action_dim=6))
    before = head.action_decoder.layer2.weight.clone()
    with pytest.raises(ValueError, match=r"its action head: made for another architecture; 3 entries do not fit"):
        load_groot_head(bridge, head, folder)
    assert "action_decoder.layer2.W" in load_groot_head(bridge, head, folder, rows=())
    assert torch.equal(head.action_decoder.layer2.weight, before)
    with pytest.raises(ValueError, match=r"rows: expected 1 or 2 of GR00T's embodiment rows, got \[1, 2, 3\]"):
        load_groot_head(bridge, head, folder, rows=(1, 2, 3))
    with pytest.raises(ValueError, match="expected an action DiT with cross-attention first"):
        load_groot_head(bridge, ActionDiT(replace(CONFIG, time_grows_with_noise=True)), folder)
    with pytest.raises(FileNotFoundError, match="GR00T head: cannot load"):
        load_groot_head(bridge, head, "./nowhere")
