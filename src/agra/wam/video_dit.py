"""The video DiT f_theta (Eqs. 8-10): diffusers' Cosmos transformer with a forward pass of its own.

The parameters belong to a stock `CosmosTransformer3DModel`, so names, shapes and config are those of the public
checkpoints. The forward pass differs from the stock one in three ways that do not change the result:

- It returns the hidden states of any set of layers as values, with the graph attached, and stops after the last layer
  that the caller needs.
- It computes the adaLN modulation once per latent frame, not once per token. A clip has two noise levels, the condition
  frame's and that of the other frames.
- It builds the padding mask at latent resolution, so torchvision is not needed.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from agra.hub import model_folder, weight_files
from agra.precision import without_autocast
from agra.weights import read_into, under


@dataclass(frozen=True, kw_only=True)
class VideoDiTConfig:
    """Shape of the Cosmos transformer. The defaults are Cosmos-Predict2.5-2B."""

    latent_channels: int = 16  # of the codec
    num_layers: int = 28  # transformer blocks
    num_heads: int = 16  # attention heads. Their number times head_dim is the width of the hidden states
    head_dim: int = 128  # width of an attention head
    mlp_ratio: float = 4.0  # width of the feed-forward layers over the width of the hidden states
    adaln_lora_dim: int = 256  # rank of the adaptive layer norms' modulation
    text_dim: int = 1024  # width of the tokens that cross-attention reads
    text_projection_dim: int | None = 100352  # width before the frozen projection; None: no projection
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (T, H, W) latent positions of a token
    max_size: tuple[int, int, int] = (128, 240, 240)  # (T, H, W) of the largest latents, for the rotary embedding
    rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0)  # (T, H, W) extrapolation of the rotary embedding
    learned_positions: bool = False
    """Add Cosmos's optional learned position embedding at every block. Not in the paper."""

    def __post_init__(self) -> None:
        if self.patch_size[0] != 1:
            raise ValueError(
                "VideoDiTConfig.patch_size: expected 1 as the first entry, because every latent frame has its own "
                f"noise level, got {self.patch_size}"
            )
        if self.num_layers < 1:
            raise ValueError(f"VideoDiTConfig.num_layers: expected at least 1, got {self.num_layers}")

    @property
    def width(self) -> int:
        """Width of the hidden states, d_v (Eq. 10)."""
        return self.num_heads * self.head_dim

    def build(self) -> CosmosTransformer3DModel:
        """Build the stock transformer with fresh weights."""
        return CosmosTransformer3DModel(
            in_channels=self.latent_channels + 1,  # and the condition mask
            out_channels=self.latent_channels,
            num_attention_heads=self.num_heads,
            attention_head_dim=self.head_dim,
            num_layers=self.num_layers,
            mlp_ratio=self.mlp_ratio,
            text_embed_dim=self.text_dim,
            adaln_lora_dim=self.adaln_lora_dim,
            max_size=self.max_size,
            patch_size=self.patch_size,
            rope_scale=self.rope_scale,
            concat_padding_mask=True,
            extra_pos_embed_type="learnable" if self.learned_positions else None,  # type: ignore[arg-type]
            use_crossattn_projection=self.text_projection_dim is not None,
            crossattn_proj_in_channels=self.text_projection_dim or self.text_dim,
            encoder_hidden_states_channels=self.text_dim,
        )


@dataclass(frozen=True, kw_only=True)
class VideoOutput:
    """Result of one forward pass of the video DiT."""

    velocity: Float[Tensor, "B C T h w"] | None  # None with `velocity=False`
    hidden: dict[int, Float[Tensor, "B T H W D"]] = field(default_factory=dict)  # output after block l, 0-based
    text_attention: dict[int, Float[Tensor, "B T H W L"]] = field(default_factory=dict)
    """Cross-attention weights of every video token over the instruction tokens in block l, mean over heads."""


class VideoDiT(nn.Module):
    """The network f_theta: from noisy latents, noise levels per frame and instruction tokens to velocity and hidden
    states.
    """

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = config.build()
        self.transformer.transformer_blocks = nn.ModuleList(map(VideoBlock, self.transformer.transformer_blocks))

    def forward(
        self,
        latents: Float[Tensor, "B C T h w"],
        noise_level: Tensor,
        instruction: Float[Tensor, "B L E"],
        *,
        condition_mask: Float[Tensor, "B 1 T h w"],
        layers: Sequence[int] = (),
        text_layers: Sequence[int] = (),
        velocity: bool = True,
    ) -> VideoOutput:
        """Run the blocks once.

        `noise_level` is in [0, 1]: (B,) for one level per sample, or (B, T) for one per latent frame. `condition_mask`
        is 1 on condition frames. The result holds the outputs of the blocks `layers` and the text attention of the
        blocks `text_layers`. With `velocity=False` the blocks after the last of these, the final norm and the
        projection do not run.
        """
        last = self._check((*layers, *text_layers), noise_level, latents)
        if velocity:
            last = self.config.num_layers - 1
        model = self.transformer
        padded = self.pad(latents, condition_mask)
        rope = model.rope(padded)
        positions = model.learnable_pos_embed(padded) if model.learnable_pos_embed is not None else None
        x, grid = self.patchify(padded)
        temb, embedded = self.embed_levels(noise_level if noise_level.ndim == 2 else noise_level[:, None], x)
        text = self.project_text(instruction)

        hidden: dict[int, Tensor] = {}
        text_attention: dict[int, Tensor] = {}
        for index, block in enumerate(model.transformer_blocks[: last + 1]):
            if index in text_layers:
                x, weights = block(x, text, embedded, temb, rope, positions, return_attention=True)
                text_attention[index] = weights.unflatten(1, grid)
            else:
                x = block(x, text, embedded, temb, rope, positions)
            if index in layers:
                hidden[index] = x.unflatten(2, grid[1:])
        predicted = self._unpatchify(self._project_out(x, embedded, temb), grid) if velocity else None
        return VideoOutput(velocity=predicted, hidden=hidden, text_attention=text_attention)

    def pad(
        self, latents: Float[Tensor, "B C T h w"], condition_mask: Float[Tensor, "B 1 T h w"]
    ) -> Float[Tensor, "B C2 T h w"]:
        """Append the condition mask and the padding mask, which is 0, to the latents' channels."""
        padding = latents.new_zeros(1, 1, 1, 1, 1).expand(len(latents), 1, *latents.shape[2:])
        return torch.cat([latents, condition_mask.to(latents), padding], dim=1)

    def patchify(self, padded: Float[Tensor, "B C2 T h w"]) -> tuple[Float[Tensor, "B T S D"], torch.Size]:
        """Return the tokens frame by frame, so that modulation broadcasts over a frame's S tokens, and the grid
        (T, H, W).
        """
        x = self.transformer.patch_embed(padded.to(self.dtype))
        return x.flatten(2, 3), x.shape[1:4]

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.transformer.proj_out.weight.dtype

    def embed_levels(
        self, noise_level: Float[Tensor, "B F"], like: Tensor
    ) -> tuple[Float[Tensor, "B F M"], Float[Tensor, "B F D"]]:
        """Compute Cosmos's two embeddings of noise levels, (temb, embedded), in the data type of `like`.

        They are computed in float32, also under autocast and with bfloat16 weights, as in Cosmos's own code. diffusers
        rounds them to bfloat16, which moves them about as far as a change of the level by 0.003.
        """
        embed = self.transformer.time_embed
        weights = {name: weight.float() for name, weight in embed.named_parameters()}
        precise = torch.empty(0, device=like.device)  # its data type alone is read
        temb, embedded = without_autocast(
            lambda level: functional_call(embed, weights, (precise, level)), noise_level.flatten().float()
        )
        shape = *noise_level.shape, -1
        return temb.to(like.dtype).view(shape), embedded.to(like.dtype).view(shape)

    def project_text(self, instruction: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E2"]:
        """Apply Cosmos's frozen text projection. Tokens that are already projected, as in a cache, stay unchanged."""
        width, config = instruction.shape[-1], self.config
        instruction = instruction.to(self.dtype)
        if width == config.text_dim:
            return instruction
        if width == config.text_projection_dim:
            return self.transformer.crossattn_proj(instruction)
        expected = (
            config.text_dim
            if config.text_projection_dim is None
            else (f"{config.text_dim} (projected) or {config.text_projection_dim} (raw)")
        )
        raise ValueError(f"instruction tokens: expected width {expected}, got {width}")

    def load_pretrained(self, source: str, *, revision: str | None = None) -> None:
        """Read the weights of a diffusers model's `transformer` from a folder or a hub id, tensor by tensor.

        Raises FileNotFoundError if they cannot be read, ValueError if they belong to another architecture.
        """
        folder = model_folder("video DiT", source=source, revision=revision, subfolder="transformer")
        config, own_settings = folder / "config.json", dict(self.transformer.config)
        if config.is_file():
            for key, value in json.loads(config.read_text()).items():
                expected = own_settings.get(key, value)
                expected = list(expected) if isinstance(expected, tuple) else expected
                if not key.startswith("_") and value != expected:
                    raise ValueError(
                        f"{config}: made for another architecture; {key} is {value} there and {expected} in this recipe"
                    )
        read_into(self.transformer.state_dict(), weight_files(folder), what=f"{source}: its transformer")

    def _check(self, layers: Sequence[int], noise_level: Tensor, latents: Tensor) -> int:
        if any(not 0 <= layer < self.config.num_layers for layer in layers):
            raise ValueError(f"layers: expected 0..{self.config.num_layers - 1}, got {tuple(layers)}")
        if noise_level.shape not in ((len(latents),), (len(latents), latents.shape[2])):
            raise ValueError(
                f"noise_level: expected ({len(latents)},) or ({len(latents)}, {latents.shape[2]}), got "
                f"{tuple(noise_level.shape)}"
            )
        return max(layers, default=-1)

    def _project_out(self, x: Tensor, embedded: Tensor, temb: Tensor) -> Tensor:
        norm = self.transformer.norm_out
        modulation = norm.linear_2(norm.linear_1(F.silu(embedded))) + temb[..., : 2 * x.shape[-1]]
        shift, scale = modulation.unsqueeze(2).chunk(2, dim=-1)
        return self.transformer.proj_out(_modulate(without_autocast(norm.norm, x), shift, scale))

    def _unpatchify(self, x: Tensor, grid: torch.Size) -> Tensor:
        # The order (ph, pw, pt, C) is Cosmos's own and not the inverse of its patchify.
        _, height, width = grid
        _, ph, pw = self.config.patch_size
        x = x.unflatten(-1, (ph, pw, self.config.latent_channels)).unflatten(2, (height, width))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def load_text_projection(config: VideoDiTConfig, source: str, *, revision: str | None = None) -> nn.Module:
    """Load only Cosmos's frozen text projection (100352 -> 1024 and GELU), so that projected tokens can be cached
    (C.1).

    Raises the errors of `VideoDiT.load_pretrained`, and ValueError if the config has no projection.
    """
    if config.text_projection_dim is None:
        raise ValueError(
            "VideoDiTConfig.text_projection_dim: expected a width, got None: this video DiT has no text projection"
        )
    projection = nn.Sequential(nn.Linear(config.text_projection_dim, config.text_dim), nn.GELU())
    folder = model_folder("text projection", source=source, revision=revision, subfolder="transformer")
    what = f"{source}: its text projection"
    read_into(projection.state_dict(), weight_files(folder), what=what, name_of=under("crossattn_proj."))
    return projection


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class VideoBlock(nn.Module):
    """A Cosmos block whose forward takes tokens frame by frame, with the modules of the stock block under their
    names.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.norm1, self.attn1 = stock.norm1, stock.attn1
        self.norm2, self.attn2 = stock.norm2, stock.attn2
        self.norm3, self.ff = stock.norm3, stock.ff

    def forward(
        self,
        x: Float[Tensor, "B T S D"],
        text: Float[Tensor, "B L E"],
        embedded: Float[Tensor, "B F D"],
        temb: Float[Tensor, "B F M"],
        rope: tuple[Tensor, Tensor],
        positions: Tensor | None,
        *,
        return_attention: bool = False,
    ) -> Any:
        """Run self-attention, cross-attention to the text and feed-forward, each gated.

        F is T, or 1 for one level per sample. Returns the tokens (B, T, S, D). With `return_attention` returns the
        tokens and the cross-attention weights (B, T * S, L), mean over heads.
        """
        keys_values = self.text_keys_values(text)
        weights: list[Tensor] = []
        watch = weights.append if return_attention else None
        x = self.run(x, keys_values, self.modulate(embedded, temb), rope, positions, watch)
        return (x, weights[0]) if return_attention else x

    def text_keys_values(self, text: Float[Tensor, "B L E"]) -> tuple[Tensor, Tensor]:
        """Compute the text's keys and values for `run`, (B, heads, L, head width) each."""
        return _keys_values(self.attn2, text)

    def modulate(self, embedded: Float[Tensor, "B F D"], temb: Float[Tensor, "B F M"]) -> tuple[Tensor, ...]:
        """Compute shift, scale and gate of each of the three branches, (B, F, 1, D) each."""
        activated = F.silu(embedded)
        modulations = [norm.linear_2(norm.linear_1(activated)) + temb for norm in (self.norm1, self.norm2, self.norm3)]
        return tuple(part for modulation in modulations for part in modulation.unsqueeze(2).chunk(3, dim=-1))

    def run(
        self,
        x: Float[Tensor, "B T S D"],
        text: tuple[Tensor, Tensor],
        modulation: tuple[Tensor, ...],
        rope: tuple[Tensor, Tensor],
        positions: Tensor | None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Float[Tensor, "B T S D"]:
        """Run `forward` with given keys and values of the text and given modulation.

        `watch` receives the cross-attention weights.
        """
        if positions is not None:
            x = x + positions.view(-1, *x.shape[1:])

        def read(h: Tensor) -> Tensor:
            if watch is not None:
                watch(_attention_weights(self.attn2, h, text[0]))
            return _attend(self.attn2, h, text)

        branches = (
            (self.norm1, lambda h: _attend(self.attn1, h, _keys_values(self.attn1, h, rope), rope)),
            (self.norm2, read),
            (self.norm3, self.ff),
        )
        for index, (norm, branch) in enumerate(branches):
            shift, scale, gate = modulation[3 * index : 3 * index + 3]
            update = branch(_modulate(without_autocast(norm.norm, x), shift, scale).flatten(1, 2))
            x = torch.addcmul(x, gate, update.view_as(x))
        return x


Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding."""


def _query(attn: Any, x: Tensor) -> Tensor:
    """Compute RMS-normalised queries, (B, heads, N, head width)."""
    return attn.norm_q(attn.to_q(x).unflatten(2, (attn.heads, -1)).transpose(1, 2))


def _keys_values(attn: Any, context: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor]:
    """Compute keys, RMS-normalised and with `rope` rotated, and values: (B, heads, N, head width) each."""
    key = attn.norm_k(attn.to_k(context).unflatten(2, (attn.heads, -1)).transpose(1, 2))
    value = attn.to_v(context).unflatten(2, (attn.heads, -1)).transpose(1, 2)
    return key if rope is None else _rotate(key, rope), value


def _attend(attn: Any, x: Tensor, keys_values: tuple[Tensor, Tensor], rope: Rope | None = None) -> Tensor:
    """Apply multi-head attention with RMS-normalised queries and optional rotary embedding, (B, N, D)."""
    query = _query(attn, x)
    query = query if rope is None else _rotate(query, rope)
    out = F.scaled_dot_product_attention(query, *keys_values)
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _attention_weights(attn: Any, x: Tensor, key: Tensor) -> Tensor:
    """Compute the weights of `_attend` without rotary embedding, mean over heads, (B, N, L) float32."""
    query = _query(attn, x).float()
    return (query @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary embedding in float32. The halves of the head dimension are the two components."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)
