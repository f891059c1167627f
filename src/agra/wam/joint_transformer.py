"""UWM's transformer (Zhu et al., arXiv 2504.02792): it predicts the noise of actions and of images together.

Its tokens are the actions, the patches of the image latents, and learned registers, with learned positions. The two
diffusion steps and the observation reach it through adaptive layer norms whose gates start at zero (adaLN-Zero, Peebles
and Xie, arXiv 2212.09748), so that every block starts as the identity.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class JointTransformerConfig:
    """Sizes of the transformer. The defaults are UWM's."""

    width: int = 768
    num_blocks: int = 12
    num_heads: int = 12
    num_registers: int = 8
    patch_size: tuple[int, int] = (4, 4)
    """(H, W) of a token's latent patch. A token holds the patch of all predicted frames."""
    step_dim: int = 512
    """Width of each diffusion step's sinusoid, and of the embedding of both."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"method.transformer.width: expected a multiple of {self.num_heads} heads, got {self.width}"
            )
        if self.step_dim % 2 or self.step_dim < 4:
            raise ValueError(f"method.transformer.step_dim: expected an even number of at least 4, got {self.step_dim}")
        if self.num_registers < 0:
            raise ValueError(f"method.transformer.num_registers: expected at least 0, got {self.num_registers}")

    def token_grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the image tokens. Raises ValueError for latents that do not divide into patches."""
        if latent_size[0] % self.patch_size[0] or latent_size[1] % self.patch_size[1]:
            raise ValueError(
                f"method.transformer.patch_size: latents of {latent_size} do not divide into patches of "
                f"{self.patch_size}"
            )
        return latent_size[0] // self.patch_size[0], latent_size[1] // self.patch_size[1]


class JointBlock(nn.Module):
    """Self-attention and an MLP, each between an adaptive norm and a gate."""

    def __init__(self, config: JointTransformerConfig, condition_dim: int) -> None:
        super().__init__()
        width, self.num_heads = config.width, config.num_heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(condition_dim, 6 * width)

    def forward(self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B E"]) -> Float[Tensor, "B N D"]:
        """Add the gated attention, then the gated MLP."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        x = x + gate * self._attend(self.norm(x) * (1 + scale) + shift)
        return x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift)

    def _attend(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class JointTransformer(nn.Module):
    """Noisy actions and noisy image latents, each at a diffusion step of its own, to the noise in both."""

    def __init__(
        self,
        config: JointTransformerConfig,
        *,
        actions: tuple[int, int],
        images: tuple[int, int, int, int],
        condition_dim: int,
    ) -> None:
        """`actions` is (K, D) of a chunk, `images` (F, C, h, w) of the latents."""
        super().__init__()
        self.config, self.num_actions, self.image_shape = config, actions[0], images
        self.grid = config.token_grid(images[2:])
        self.num_images = self.grid[0] * self.grid[1]
        width, patch = config.width, images[0] * images[1] * config.patch_size[0] * config.patch_size[1]
        hidden = 4 * max(actions[1], width)
        self.step_encoder = nn.Sequential(
            nn.Linear(2 * config.step_dim, 4 * config.step_dim),
            nn.Mish(),
            nn.Linear(4 * config.step_dim, config.step_dim),
        )
        self.action_encoder = nn.Sequential(nn.Linear(actions[1], hidden), nn.Mish(), nn.Linear(hidden, width))
        self.action_decoder = nn.Sequential(nn.Linear(width, hidden), nn.Mish(), nn.Linear(hidden, actions[1]))
        self.image_encoder, self.image_decoder = nn.Linear(patch, width), nn.Linear(width, patch)
        self.registers = nn.Parameter(torch.empty(config.num_registers, width))
        self.positions = nn.Parameter(torch.empty(self.num_actions + self.num_images + config.num_registers, width))
        condition_dim += config.step_dim
        self.blocks = nn.ModuleList(JointBlock(config, condition_dim) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(condition_dim, 2 * width)
        self.head = nn.Linear(width, width)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, JointBlock | JointTransformer):
                nn.init.zeros_(module.modulation.weight)
        for tokens in (self.registers, self.positions):
            nn.init.normal_(tokens, std=0.02)

    def forward(
        self,
        actions: Float[Tensor, "B K D"],
        images: Float[Tensor, "B F C h w"],
        action_step: Int[Tensor, "B"],
        image_step: Int[Tensor, "B"],
        condition: Float[Tensor, "B E"],
    ) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B F C h w"]]:
        """Return the predicted noise of the actions and of the images."""
        steps = torch.cat([sinusoid(step, self.config.step_dim) for step in (action_step, image_step)], dim=-1)
        condition = torch.cat([condition, self.step_encoder(steps)], dim=-1)
        registers = self.registers.expand(len(actions), -1, -1)
        x = torch.cat([self.action_encoder(actions), self.image_encoder(self.patches(images)), registers], dim=1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        chunk, image, _ = x.split([self.num_actions, self.num_images, self.config.num_registers], dim=1)
        return self.action_decoder(chunk), self.unpatch(self.image_decoder(image))

    def patches(self, images: Float[Tensor, "B F C h w"]) -> Float[Tensor, "B N P"]:
        """Cut the latents of all frames into one row for each patch, in the order (frame, channel, y, x)."""
        (rows, columns), (height, width) = self.grid, self.config.patch_size
        split = images.unflatten(4, (columns, width)).unflatten(3, (rows, height))  # (B, F, C, H, y, W, x)
        return split.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)

    def unpatch(self, rows: Float[Tensor, "B N P"]) -> Float[Tensor, "B F C h w"]:
        """Invert `patches`."""
        split = rows.unflatten(1, self.grid).unflatten(-1, (*self.image_shape[:2], *self.config.patch_size))
        return split.permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)


def sinusoid(step: Int[Tensor, "B"], width: int) -> Float[Tensor, "B E"]:
    """Sines, then cosines, of the diffusion step at wavelengths of 2 pi to 20,000 pi."""
    half = width // 2
    frequencies = 10_000 ** (-torch.arange(half, device=step.device) / (half - 1))
    angles = step[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
