"""The multi-layer bridge (Eqs. 2, 14-17, 20): hidden states of several video layers, projected to guidance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


def bridged_layers(num_video_layers: int, num_action_blocks: int) -> tuple[int, ...]:
    """Return the video layer that each cross-attention block reads, 0-based, "output after block l" (Eq. 14).

    Layer j is j (M - 1) / (N - 1), rounded to the nearest integer. The equation prints a floor, but C.1 lists the
    rounded layers 0, 4, 8, 12, 15, 19, 23, 27 for (28, 8), and only these contain the aligned layer 8
    (docs/paper.md #1).
    """
    if num_action_blocks < 2:
        raise ValueError(
            f"num_action_blocks: expected at least 2 for Eq. 14, got {num_action_blocks}; for a single-layer bridge "
            "set BridgeConfig.layers"
        )
    if num_video_layers < 1:
        raise ValueError(f"num_video_layers: expected at least 1, got {num_video_layers}")
    span = num_action_blocks - 1
    return tuple((2 * j * (num_video_layers - 1) + span) // (2 * span) for j in range(num_action_blocks))


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The layers that the action head reads, and the shape of the projector. The defaults are C.1's."""

    layers: tuple[int, ...] = bridged_layers(28, 8)
    """One video layer for each action cross-attention block. A layer may repeat (AGRA-BridgeL8)."""
    projector: Literal["transformer", "linear", "identity"] = "transformer"
    """`transformer` is Eq. 15, shared by all layers. `linear` is one linear layer for each distinct video layer,
    `identity` the hidden states as they are, both without a norm: other public world action models
    (docs/methods.md)."""
    num_layers: int = 4  # transformer blocks of the projector
    num_heads: int = 32  # attention heads of the projector. Times head_dim: the video DiT's width
    head_dim: int = 64  # width of an attention head
    dropout: float = 0.2  # of the projector, in training
    position_grid: tuple[int, int, int] | None = None
    """(T, H, W) of a learned position embedding, initialised with sines and cosines and added to the normalised hidden
    states. Not in the paper. Cosmos's rotary embedding is relative, so without this a head trained from scratch cannot
    tell the position of a token."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("BridgeConfig.layers: expected at least one video layer, got none")

    @property
    def width(self) -> int:
        """Width of the hidden states and of the guidance."""
        return self.num_heads * self.head_dim

    @property
    def has_weights(self) -> bool:
        """Whether there is anything to train."""
        return self.projector != "identity" or self.position_grid is not None


class Bridge(nn.Module):
    """The projector Proj_j (Eq. 15): LayerNorm and self-attention, shared by all layers, applied to each layer alone.

    `BridgeConfig.projector` replaces it.
    """

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        transformer = config.projector == "transformer"
        self.norm = nn.LayerNorm(config.width) if transformer else nn.Identity()
        self.blocks = nn.ModuleList(SelfAttentionBlock(config) for _ in range(config.num_layers * transformer))
        self.linears = None
        if config.projector == "linear":
            linears = {str(layer): nn.Linear(config.width, config.width) for layer in dict.fromkeys(config.layers)}
            self.linears = nn.ModuleDict(linears)
        self.positions = None
        if config.position_grid is not None:
            self.positions = nn.Parameter(grid_sinusoid(config.position_grid, config.width))

    def forward(
        self, hidden: Mapping[int, Float[Tensor, "B T H W D"]], *, pool_future: int = 1
    ) -> tuple[Float[Tensor, "B N D"], ...]:
        """Return the guidance G_j of each cross-attention block, tokens flattened row-major.

        A layer that several blocks read is projected once. `pool_future` > 1 is an approximation: before the blocks,
        squares of `pool_future` x `pool_future` tokens of the frames after the observation become their mean. Not in
        the paper.
        """
        # Dynamo of torch 2.11 cannot trace the difference of a set and a dictionary's keys.
        missing = sorted({layer for layer in self.config.layers if layer not in hidden})
        if missing:
            raise ValueError(f"hidden: expected the layers {self.config.layers}, but {missing} are missing")
        distinct = tuple(dict.fromkeys(self.config.layers))
        if self.linears is not None:
            hidden = {layer: self.linears[str(layer)](hidden[layer]) for layer in distinct}
        # Layers become samples, for one large forward pass instead of a small one per layer.
        stacked = torch.cat([hidden[layer] for layer in distinct])
        projected = self._project(stacked, pool_future).chunk(len(distinct))
        guidance = dict(zip(distinct, projected, strict=True))
        return tuple(guidance[layer] for layer in self.config.layers)

    def _project(self, hidden: Tensor, pool_future: int = 1) -> Tensor:
        x = self.norm(hidden)
        if self.positions is not None:
            x = x + self.positions
        x = x.flatten(1, 3) if pool_future == 1 else _pool_after_first_frame(x, pool_future)
        for block in self.blocks:
            x = block(x)
        return x


def _pool_after_first_frame(x: Float[Tensor, "B T H W D"], side: int) -> Float[Tensor, "B N D"]:
    # Frame by frame: torch pools three axes of bfloat16 numbers on a GPU only.
    later = F.avg_pool2d(x[:, 1:].flatten(0, 1).movedim(-1, 1), side, ceil_mode=True).movedim(1, -1)
    return torch.cat([x[:, :1].flatten(1, 3), later.unflatten(0, (len(x), -1)).flatten(1, 3)], dim=1)


def grid_sinusoid(grid: tuple[int, int, int], width: int) -> Float[Tensor, "T H W D"]:
    """Return sines and cosines of a grid's three coordinates, of the magnitude of normalised hidden states.

    Each axis takes a third of the width, rounded down to a multiple of 2. The lowest frequency is half a wave per axis.
    """
    axis_width = width // 6 * 2
    out = torch.zeros(*grid, width)
    for axis, size in enumerate(grid):
        waves = torch.pi * torch.logspace(0, 3, axis_width // 2, base=2) / max(size, 2)
        angles = torch.arange(size)[:, None] * waves
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        shape = [1, 1, 1, axis_width]
        shape[axis] = size
        out[..., axis * axis_width : (axis + 1) * axis_width] = features.view(shape)
    return out


class SelfAttentionBlock(nn.Module):
    """A pre-norm transformer block of GR00T-N1.5's vision-language self-attention: affine norms, tanh GELU, biases."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.width, config.num_heads, config.head_dim, config.dropout)
        self.final_dropout = nn.Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(config.width)
        self.ff = FeedForward(config.width, config.dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Run self-attention and feed-forward, each with a residual connection.

        Dropout is applied to the attention's result twice, as in N1.5 (docs/paper.md #46).
        """
        h = self.norm1(x)
        x = x + self.final_dropout(self.attn(h, h))
        return x + self.ff(self.norm2(x))


class Attention(nn.Module):
    """Multi-head attention with biases. The context may have another width than the queries."""

    def __init__(self, width: int, context_width: int, num_heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.to_out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B Q D"], context: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B Q D"]:
        """Attend from `x` to `context`, or to those of its tokens that `mask` keeps."""
        return self.attend(x, self.keys_values(context), mask)

    def keys_values(self, context: Float[Tensor, "B N C"]) -> tuple[Tensor, Tensor]:
        """Compute the context's keys and values for `attend`, (B, heads, N, head width) each."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def attend(
        self, x: Float[Tensor, "B Q D"], keys_values: tuple[Tensor, Tensor], mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B Q D"]:
        """Run `forward` with given keys and values of the context, of which only those in `mask` are read."""
        read = None if mask is None else mask[:, None, None]
        return self._out(F.scaled_dot_product_attention(self._split(self.to_q(x)), *keys_values, attn_mask=read))

    def with_weights(
        self, x: Float[Tensor, "B Q D"], context: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B heads Q N"]]:
        """Return the result of `forward` and its attention weights."""
        query, (key, value) = self._split(self.to_q(x)), self.keys_values(context)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        weights = scores.softmax(dim=-1)
        return self._out(weights @ value), weights

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _out(self, x: Tensor) -> Tensor:
        return self.dropout(self.to_out(x.transpose(1, 2).flatten(2)))


class FeedForward(nn.Sequential):
    """Linear layer, tanh GELU, linear layer, with an inner width of four times the width."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )
