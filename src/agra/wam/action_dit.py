"""The action DiT f_phi (Eqs. 11-13): GR00T-N1.5's flow-matching head in the paper's time convention.

Sub-blocks alternate cross-attention to the guidance and self-attention over [state | action] tokens. Cross-attention
comes first as in GR00T-N1.5, so that its weights fit. The paper lists self-attention first (docs/paper.md #6). State
encoder, action encoder and decoder have one set of weights per embodiment. GR00T's time runs from 0 (noise) to 1
(data). Only this module converts noise levels to GR00T's time buckets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from agra.precision import without_autocast
from agra.rng import sample_shard
from agra.wam.bridge import Attention, FeedForward


@dataclass(frozen=True, kw_only=True)
class ActionDiTConfig:
    """Shape of the action head. The defaults are GR00T-N1.5's, which C.1 describes (docs/paper.md #4, #5)."""

    state_dim: int = 64  # numbers of a state, of the widest embodiment
    action_dim: int = 32  # numbers of an action, of the widest embodiment
    horizon: int = 16  # actions of a chunk
    num_embodiments: int = 1  # rows of the embodiment banks
    num_blocks: int = 8  # pairs of one cross-attention and one self-attention sub-block
    num_heads: int = 32  # attention heads. Their number times head_dim is the inner width
    head_dim: int = 48  # width of an attention head
    guidance_dim: int = 2048  # width of the guidance: the video DiT's
    hidden_dim: int = 1024  # of the encoders and of the output
    future_tokens: int = 0  # learned tokens between state and actions: 32 in N1.5, none in the paper
    dropout: float = 0.2  # in training
    state_dropout: float = 0.0
    """Probability of replacing a sample's whole state by zeros in training. Not in the paper."""
    bank_init_std: float | None = 0.02
    """Standard deviation of the banks' initial weights, by default GR00T's (docs/paper.md #45). None means
    1 / sqrt(inputs), which suits a head trained from scratch on little data."""
    self_attention_first: bool = False  # the order that the paper lists (docs/paper.md #6)
    time_grows_with_noise: bool = False  # time bucket 0 is data, as in DiT4DiT
    num_time_buckets: int = 1000  # steps into which the noise level is rounded
    max_horizon: int = 1024  # rows of the position table

    def __post_init__(self) -> None:
        if not 1 <= self.horizon <= self.max_horizon:
            raise ValueError(f"ActionDiTConfig.horizon: expected 1..{self.max_horizon}, got {self.horizon}")
        if not 0 <= self.state_dropout <= 1:
            raise ValueError(f"ActionDiTConfig.state_dropout: expected a probability, got {self.state_dropout}")
        if self.bank_init_std is not None and not self.bank_init_std > 0:
            raise ValueError(
                f"ActionDiTConfig.bank_init_std: expected a positive number or None, got {self.bank_init_std}"
            )

    @property
    def width(self) -> int:
        """Inner width of the sub-blocks."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class ActionOutput:
    """Result of one forward pass of the action DiT."""

    velocity: Float[Tensor, "B K D"]
    attention: tuple[Float[Tensor, "B heads Q N"], ...] | None = None
    """Cross-attention weights of each block with `return_attention`. Queries are [state | future tokens | K
    actions]."""
    future: Float[Tensor, "B F W"] | None = None
    """States of the future tokens after the sub-block that `future_after` counts to."""


class ActionDiT(nn.Module):
    """The network f_phi: from noisy actions, state, noise level and guidance to the action velocity."""

    def __init__(self, config: ActionDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden, n, std = config.width, config.hidden_dim, config.num_embodiments, config.bank_init_std
        self.state_encoder = EmbodimentMLP(n, config.state_dim, hidden, width, std)
        self.action_encoder = ActionEncoder(n, config.action_dim, width, std)
        self.action_decoder = EmbodimentMLP(n, hidden, hidden, config.action_dim, std)
        self.position_embedding = nn.Embedding(config.max_horizon, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.future = nn.Embedding(config.future_tokens, width) if config.future_tokens else None
        if self.future is not None:
            nn.init.normal_(self.future.weight, std=0.02)
        self.time_embedding = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            SubBlock(config, config.guidance_dim if cross else width)
            for _ in range(config.num_blocks)
            for cross in ((False, True) if config.self_attention_first else (True, False))
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.project_out = nn.Linear(width, hidden)

    def forward(
        self,
        noisy_actions: Float[Tensor, "B K D"],
        state: Float[Tensor, "B S"],
        noise_level: Float[Tensor, "B"],
        guidance: Sequence[Float[Tensor, "Bg N G"]],
        embodiment: Int[Tensor, "B"],
        *,
        masks: Sequence[Bool[Tensor, "Bg N"] | None] | None = None,
        return_attention: bool = False,
        future_after: int | None = None,
    ) -> ActionOutput:
        """Predict the velocity noise - actions (Eq. 13), given one guidance for each cross-attention block.

        `future_after` is a number of sub-blocks, after which the future tokens' states are returned as well.

        A guidance of B / n samples serves n consecutive rows each, so that several draws of noise share the keys and
        values of one conditioning pass. `masks` are False at the tokens of each guidance that are not read, such as
        padding, and leave at least one. Raises ValueError if the numbers do not fit.
        """
        if len(guidance) != self.config.num_blocks:
            raise ValueError(
                f"guidance: expected {self.config.num_blocks}, one per cross-attention block, got {len(guidance)}"
            )
        if any(len(noisy_actions) % len(tokens) for tokens in guidance):
            raise ValueError(
                f"guidance: expected a number of samples that divides {len(noisy_actions)}, the number of action "
                f"chunks, got {[len(tokens) for tokens in guidance]}"
            )
        bucket = self.bucket(noise_level)
        x = self._tokens(noisy_actions, state, bucket, embodiment)
        time = self.embed_time(bucket, x.dtype)
        attention: list[Tensor] = []
        future: Tensor | None = None
        for index, block in enumerate(self.blocks):
            context = guidance[index // 2] if self.reads_guidance(index) else None
            mask = masks[index // 2] if masks is not None and context is not None else None
            x, weights = block(x, context, time, return_attention and context is not None, mask)
            if weights is not None:
                attention.append(weights)
            if index + 1 == future_after:
                future = x[:, 1 : 1 + self.config.future_tokens]
        velocity = self.project(x, self.modulate_out(time), noisy_actions.shape[1], embodiment)
        shown = tuple(attention) if return_attention else None
        return ActionOutput(velocity=velocity, attention=shown, future=future)

    def reads_guidance(self, index: int) -> bool:
        """Whether sub-block `index` is a cross-attention block. Guidance `index // 2` is its own."""
        return (index % 2 == 1) == self.config.self_attention_first

    def bucket(self, noise_level: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Convert noise levels to time buckets. GR00T's 0 is pure noise and `num_time_buckets` is data."""
        time = noise_level if self.config.time_grows_with_noise else 1 - noise_level
        # The epsilon keeps levels such as 0.7 from falling into the bucket below by rounding.
        return (time * self.config.num_time_buckets + 1e-4).floor()

    def embed_time(self, bucket: Float[Tensor, "B"], dtype: torch.dtype) -> Float[Tensor, "B W"]:
        """Embed the time for the modulation of every sub-block."""
        return self.time_embedding(sinusoid(bucket, 256, shift=1.0, cosine_first=True).to(dtype))

    def modulate_out(self, time: Float[Tensor, "B W"]) -> tuple[Tensor, Tensor]:
        """Compute shift and scale of the final norm, (B, 1, W) each."""
        shift, scale = self.modulation_out(F.silu(time)).unsqueeze(1).chunk(2, dim=-1)
        return shift, scale

    def project(
        self, x: Float[Tensor, "B N W"], modulation: tuple[Tensor, Tensor], horizon: int, embodiment: Int[Tensor, "B"]
    ) -> Float[Tensor, "B K D"]:
        """Project the last `horizon` tokens to velocities."""
        shift, scale = modulation
        x = self.project_out(without_autocast(self.norm_out, x) * (1 + scale) + shift)
        return self.action_decoder(x[:, -horizon:], embodiment)

    def _tokens(self, noisy_actions: Tensor, state: Tensor, bucket: Tensor, embodiment: Tensor) -> Tensor:
        if self.training and self.config.state_dropout > 0:
            kept = sample_shard(lambda n: torch.rand(n, 1, device=state.device), len(state))
            state = state * (kept >= self.config.state_dropout)
        time = self.action_encoder.time_features(bucket)
        return self.join(self.encode_state(state, embodiment), self.encode_actions(noisy_actions, time, embodiment))

    def encode_actions(
        self, actions: Float[Tensor, "B K D"], time: Float[Tensor, "B W"], embodiment: Int[Tensor, "B"]
    ) -> Float[Tensor, "B K W"]:
        """Encode each action of the chunk as a token, in the data type of the weights."""
        return self.action_encoder(actions.to(self.dtype), time, embodiment)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.project_out.weight.dtype

    def encode_state(self, state: Float[Tensor, "B S"], embodiment: Int[Tensor, "B"]) -> Float[Tensor, "B F W"]:
        """Return the tokens before the actions: the state's token and the learned future tokens."""
        token = self.state_encoder(state.to(self.dtype).unsqueeze(1), embodiment)
        if self.future is None:
            return token
        return torch.cat([token, self.future.weight.expand(len(state), -1, -1)], dim=1)

    def join(self, before: Float[Tensor, "B F W"], actions: Float[Tensor, "B K W"]) -> Float[Tensor, "B N W"]:
        """Return the input sequence of the sub-blocks. The encoded actions get position embeddings."""
        return torch.cat([before, actions + self.position_embedding.weight[: actions.shape[1]]], dim=1)


class SubBlock(nn.Module):
    """Time-modulated norm, attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ActionDiTConfig, context_dim: int) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-5)
        self.modulation = nn.Linear(width, 2 * width)
        self.attn = Attention(width, context_dim, config.num_heads, config.head_dim, config.dropout)
        self.final_dropout = nn.Dropout(config.dropout)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-5)
        self.ff = FeedForward(width, config.dropout)

    def forward(
        self, x: Tensor, context: Tensor | None, time: Tensor, return_attention: bool, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run cross-attention to the tokens of `context` in `mask` (Eq. 12), or self-attention if it is None."""
        modulation = self.modulate(time)
        if not return_attention:
            return self.run(x, None if context is None else self.attn.keys_values(context), modulation, mask), None
        h = self._norm(x, modulation)
        source = h if context is None else context
        draws, queries = len(h) // len(source), h.shape[1]
        update, weights = self.attn.with_weights(h.unflatten(0, (-1, draws)).flatten(1, 2), source, mask)
        weights = weights.unflatten(2, (draws, queries)).transpose(1, 2).flatten(0, 1)
        return self._add(x, update.unflatten(1, (draws, queries)).flatten(0, 1)), weights

    def modulate(self, time: Float[Tensor, "B W"]) -> tuple[Tensor, Tensor]:
        """Compute scale and shift of the first norm, (B, 1, W) each."""
        scale, shift = self.modulation(F.silu(time)).unsqueeze(1).chunk(2, dim=-1)
        return scale, shift

    def run(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor] | None,
        modulation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "B N W"]:
        """Run `forward` with given keys and values of the context (None: self-attention) and given modulation."""
        h = self._norm(x, modulation)
        keys_values = self.attn.keys_values(h) if keys_values is None else keys_values
        draws, queries = len(h) // len(keys_values[0]), h.shape[1]
        # Rows that share a context become additional queries of that context.
        update = self.attn.attend(h.unflatten(0, (-1, draws)).flatten(1, 2), keys_values, mask)
        return self._add(x, update.unflatten(1, (draws, queries)).flatten(0, 1))

    def _norm(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = modulation
        return without_autocast(self.norm1, x) * (1 + scale) + shift

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        x = x + self.final_dropout(update)
        return x + self.ff(without_autocast(self.norm2, x))


class EmbodimentLinear(nn.Module):
    """A bank of linear layers, one per embodiment: weight (n, in, out), bias (n, out).

    `std` is the standard deviation of the initial weights. None means 1 / sqrt(in).
    """

    def __init__(self, num_embodiments: int, in_dim: int, out_dim: int, std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embodiments, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(num_embodiments, out_dim))
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_dim) if std is None else std)

    def forward(self, x: Float[Tensor, "B N I"], embodiment: Int[Tensor, "B"]) -> Float[Tensor, "B N O"]:
        """Apply to each sample the layer of its embodiment."""
        # The backward pass of index_select adds in a fixed order for any number of threads. That of indexing does not.
        bias, weight = (bank.index_select(0, embodiment) for bank in (self.bias, self.weight))
        return torch.baddbmm(bias.unsqueeze(1), x, weight)


class EmbodimentMLP(nn.Module):
    """Two embodiment layers with a ReLU in between."""

    def __init__(
        self, num_embodiments: int, in_dim: int, hidden_dim: int, out_dim: int, std: float | None = None
    ) -> None:
        super().__init__()
        self.layer1 = EmbodimentLinear(num_embodiments, in_dim, hidden_dim, std)
        self.layer2 = EmbodimentLinear(num_embodiments, hidden_dim, out_dim, std)

    def forward(self, x: Float[Tensor, "B N I"], embodiment: Int[Tensor, "B"]) -> Float[Tensor, "B N O"]:
        """Encode states or decode actions."""
        return self.layer2(F.relu(self.layer1(x, embodiment)), embodiment)


class ActionEncoder(nn.Module):
    """Encoder of noisy actions and their time, one set of weights per embodiment."""

    def __init__(self, num_embodiments: int, action_dim: int, width: int, std: float | None = None) -> None:
        super().__init__()
        self.width = width
        self.layer1 = EmbodimentLinear(num_embodiments, action_dim, width, std)
        self.layer2 = EmbodimentLinear(num_embodiments, 2 * width, width, std)
        self.layer3 = EmbodimentLinear(num_embodiments, width, width, std)

    def time_features(self, bucket: Float[Tensor, "B"]) -> Float[Tensor, "B W"]:
        """Compute the sinusoids of the time that are concatenated with every action."""
        return sinusoid(bucket, self.width, shift=0.0, cosine_first=False)

    def forward(
        self, actions: Float[Tensor, "B K D"], time: Float[Tensor, "B W"], embodiment: Int[Tensor, "B"]
    ) -> Float[Tensor, "B K W"]:
        """Encode each action of the chunk as a token. `time` holds the `time_features`."""
        x = self.layer1(actions, embodiment)
        x = torch.cat([x, time.to(x.dtype).unsqueeze(1).expand_as(x)], dim=-1)
        return self.layer3(F.silu(self.layer2(x, embodiment)), embodiment)


def sinusoid(time: Float[Tensor, "B"], dim: int, *, shift: float, cosine_first: bool) -> Float[Tensor, "B dim"]:
    """Compute sinusoidal features of `time` with frequencies 10000^(-i / (dim / 2 - shift)), in float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=time.device) / (half - shift))
    angles = time.float()[:, None] * frequencies
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)
