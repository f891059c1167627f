"""A multimodal diffusion transformer of two streams, as LDA-1B uses it (Lyu et al., arXiv 2602.12215).

Image and action tokens have weights of their own. They meet in the joint self-attention of every block. Each stream
then attends to the instruction. Noise level 1 is pure noise. Time buckets count up to the data, as in the original.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from agra.precision import without_autocast
from agra.wam.action_dit import sinusoid
from agra.wam.bridge import Attention, FeedForward

_GAMMAS, _BETAS = 4, 2
"""Scales and shifts of a stream in a block."""


@dataclass(frozen=True, kw_only=True)
class TwoStreamConfig:
    """Shape of the transformer. The defaults are LDA's with 8 layers, which its released configuration builds."""

    num_layers: int = 8
    num_heads: int = 32
    head_dim: int = 48
    text_dim: int = 2560
    """Width of the instruction tokens."""
    output_dim: int = 2560
    dropout: float = 0.2
    num_time_buckets: int = 1000

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim", "text_dim", "output_dim", "num_time_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.network.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.network.dropout: expected a number in [0, 1), got {self.dropout}")

    @property
    def width(self) -> int:
        """Inner width of both streams."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class TwoStreamOutput:
    """Results of a forward pass."""

    image: Float[Tensor, "B N O"]
    action: Float[Tensor, "B M O"]
    attention: tuple[Float[Tensor, "B heads M N+M"], ...] | None = None
    """With `return_attention`, the action tokens' weights in each block's joint attention, over image tokens and action
    tokens in this order."""


class TwoStreamDiT(nn.Module):
    """Image tokens, action tokens, instruction and time to outputs for every token."""

    def __init__(self, config: TwoStreamConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.time_embedding = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.norm_text = nn.LayerNorm(config.text_dim, elementwise_affine=False)
        self.blocks = nn.ModuleList(TwoStreamBlock(config) for _ in range(config.num_layers))
        self.norm_image, self.norm_action = nn.RMSNorm(width), nn.RMSNorm(width)
        self.image_out, self.action_out = nn.Linear(width, config.output_dim), nn.Linear(width, config.output_dim)

    def forward(
        self,
        image: Float[Tensor, "B N W"],
        action: Float[Tensor, "B M W"],
        text: Float[Tensor, "B L E"],
        noise_level: Float[Tensor, "B"],
        task: Float[Tensor, "B W"],
        *,
        return_attention: bool = False,
    ) -> TwoStreamOutput:
        """Run all blocks. `task` is added to the embedded time. Text tokens of zeros are padding."""
        condition = self.embed_time(noise_level, task.dtype) + task
        kept = text.any(dim=-1)
        text = without_autocast(self.norm_text, text)
        attention: list[Tensor] = []
        for block in self.blocks:
            image, action, weights = block(image, action, text, kept, condition, return_attention)
            if weights is not None:
                attention.append(weights)
        return TwoStreamOutput(
            image=self.image_out(without_autocast(self.norm_image, image)),
            action=self.action_out(without_autocast(self.norm_action, action)),
            attention=tuple(attention) if return_attention else None,
        )

    def bucket(self, noise_level: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Convert noise levels to time buckets: 0 is pure noise and `num_time_buckets` is data."""
        # The epsilon keeps levels such as 0.7 from falling into the bucket below by rounding.
        return ((1 - noise_level) * self.config.num_time_buckets + 1e-4).floor()

    def embed_time(self, noise_level: Float[Tensor, "B"], dtype: torch.dtype) -> Float[Tensor, "B W"]:
        """Embed the time of the noised stream."""
        return self.time_embedding(sinusoid(self.bucket(noise_level), 256, shift=1.0, cosine_first=True).to(dtype))


class TwoStreamBlock(nn.Module):
    """Joint self-attention, cross-attention of each stream to the instruction, feed-forward of each stream.

    The modulation scales and shifts the inputs of self-attention and feed-forward, and scales the whole stream after
    the cross-attention and the feed-forward's result. All scales begin at 1 and all shifts at 0.
    """

    def __init__(self, config: TwoStreamConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.modulation = nn.Linear(config.width, 2 * (_GAMMAS + _BETAS) * config.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.ones_(self.modulation.bias[: 2 * _GAMMAS * config.width])
        self.image, self.action = StreamLayers(config), StreamLayers(config)

    def forward(
        self,
        image: Float[Tensor, "B N W"],
        action: Float[Tensor, "B M W"],
        text: Float[Tensor, "B L E"],
        kept: Bool[Tensor, "B L"],
        condition: Float[Tensor, "B W"],
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return both streams, and the action tokens' attention weights with `return_attention`."""
        modulation = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2 * (_GAMMAS + _BETAS), dim=-1)
        gammas, betas = modulation[: 2 * _GAMMAS], modulation[2 * _GAMMAS :]
        streams = (
            (self.image, image, gammas[:_GAMMAS], betas[:_BETAS]),
            (self.action, action, gammas[_GAMMAS:], betas[_BETAS:]),
        )
        parts = [layers.queries_keys_values(x, gamma[0], beta[0]) for layers, x, gamma, beta in streams]
        query, key, value = (self._heads(torch.cat(both, dim=1)) for both in zip(*parts, strict=True))
        weights = None
        if return_attention:
            all_weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
            attended, weights = all_weights @ value, all_weights[:, :, image.shape[1] :]
        else:
            attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).flatten(2).split([image.shape[1], action.shape[1]], dim=1)
        image, action = (
            layers.finish(x, update, text, kept, gamma, beta[1])
            for (layers, x, gamma, beta), update in zip(streams, attended, strict=True)
        )
        return image, action, weights

    def _heads(self, x: Float[Tensor, "B N W"]) -> Float[Tensor, "B heads N d"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class StreamLayers(nn.Module):
    """The weights of one stream in a block. The projections of the joint attention have no biases."""

    def __init__(self, config: TwoStreamConfig) -> None:
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.cross_attn = Attention(width, config.text_dim, config.num_heads, config.head_dim, config.dropout)
        self.ff = FeedForward(width, config.dropout)

    def queries_keys_values(self, x: Float[Tensor, "B N W"], gamma: Tensor, beta: Tensor) -> Sequence[Tensor]:
        """Compute queries, keys and values of the joint attention, (B, N, W) each."""
        return self.to_qkv(gamma * self._norm(x) + beta).chunk(3, dim=-1)

    def finish(
        self, x: Tensor, attended: Tensor, text: Tensor, kept: Tensor, gammas: Sequence[Tensor], beta: Tensor
    ) -> Float[Tensor, "B N W"]:
        """Add the joint attention's result, the cross-attention and the feed-forward. `gammas` are the block's four."""
        x = x + self.to_out(attended)
        x = gammas[1] * (x + self.cross_attn(self._norm(x), text, kept))
        return x + gammas[3] * self.ff(gammas[2] * self._norm(x) + beta)

    def _norm(self, x: Tensor) -> Tensor:
        return without_autocast(self.norm, x)
