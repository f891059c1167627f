"""Diffusion Policy (Chi et al., arXiv 2303.04137): a U-Net over time denoises actions, given two observations.

A ResNet-18 with group norm turns each frame into a vector. The vectors and states of all observations make one
condition, which scales and shifts the features of every residual block of the U-Net (FiLM). The network predicts the
noise of a squared-cosine DDPM. There is no video and, by default, no language. docs/methods.md names what differs from
the original.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from agra.batch import Batch, PolicyInputs
from agra.methods.ddim import add_noise, ddim
from agra.methods.method import Continuation, LossDenominators, Losses, Method, MethodConfig, Needs, Noise, Shapes
from agra.rng import noise_like, sample_shard
from agra.wam.frame_encoder import FrameEncoder, Pooling, crop, frame_width
from agra.wam.joint_transformer import sinusoid
from agra.wam.text import TextConfig, mean_token

# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiffusionPolicyConfig(MethodConfig):
    """Sizes and sampler. The defaults are those of the published image U-Net, for GR1's states, actions and frames."""

    kind: Literal["diffusion_policy"] = "diffusion_policy"
    num_observations: int = 2
    """Observations of the condition: the present one, and those of the control steps before it."""
    frame_size: tuple[int, int] = (192, 336)
    crop_size: tuple[int, int] = (174, 304)
    """(H, W) that the encoder sees: cut at random in training, from the centre else. 76 of 84 pixels in the
    original."""
    encoder_channels: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of the ResNet's stages, two blocks each. Multiples of 16."""
    pooling: Pooling = "mean"
    """Summary of a frame's feature map: its mean, or the mean positions of `num_keypoints` learned maps."""
    num_keypoints: int = 32
    language: Literal["none", "film"] = "none"
    """`film` adds the mean of the instruction's frozen tokens to the condition. The original has no language."""
    text_encoder: TextConfig = field(default_factory=lambda: TextConfig(kind="minilm", length=32))
    text_dim: int = 384
    state_dim: int = 58
    action_dim: int = 29
    horizon: int = 16
    unet_channels: tuple[int, ...] = (512, 1024, 2048)
    """Channels of the U-Net's levels. Multiples of `num_groups`. Each level halves the time axis of the one before."""
    kernel_size: int = 5
    num_groups: int = 8
    step_dim: int = 128
    """Width of the diffusion step's embedding."""
    num_steps: int = 100
    """Diffusion steps of training."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    sampling_steps: int = 100
    """Denoising steps of an answer, evenly spread over the diffusion steps."""

    def __post_init__(self) -> None:
        if self.num_observations < 1:
            raise ValueError(f"method.num_observations: expected at least 1, got {self.num_observations}")
        if any(not 0 < cut <= size for cut, size in zip(self.crop_size, self.frame_size, strict=True)):
            raise ValueError(f"method.crop_size: expected at most {self.frame_size}, got {self.crop_size}")
        frame_width(self.encoder_channels, self.pooling, self.num_keypoints)  # checks the channels
        if any(channels % self.num_groups for channels in self.unet_channels):
            raise ValueError(
                f"method.unet_channels: expected multiples of {self.num_groups} groups, got {self.unet_channels}"
            )
        halvings = 2 ** (len(self.unet_channels) - 1)
        if self.horizon % halvings:
            raise ValueError(
                f"method.horizon: {len(self.unet_channels)} levels need a multiple of {halvings}, got {self.horizon}"
            )
        if not 1 <= self.sampling_steps <= self.num_steps:
            raise ValueError(f"method.sampling_steps: expected 1 to {self.num_steps}, got {self.sampling_steps}")

    @property
    def shapes(self) -> Shapes:
        """Sizes of the frames, states and actions. All embodiments share the network, so there is one."""
        return Shapes(
            frame_size=self.frame_size,
            horizon=self.horizon,
            state_dim=self.state_dim,
            action_dim=self.action_dim,
            num_embodiments=1,
            instruction=(0, 0) if self.text is None else (self.text.length, self.text_dim),
        )

    @property
    def observations(self) -> tuple[int, ...]:
        """The observations' frames, the present one last."""
        return tuple(range(1 - self.num_observations, 1))

    def needs(self) -> Needs:
        """Frames and states of the observations, and the instruction where it is read."""
        return Needs(frames=self.observations, states=self.observations, instruction=self.language == "film")

    def needs_to_act(self) -> Needs:
        """Content of an observation, equal to `needs`."""
        return self.needs()

    @property
    def text(self) -> TextConfig | None:
        """The text encoder, where the instruction is read."""
        return self.text_encoder if self.language == "film" else None

    @property
    def clips_actions(self) -> bool:
        """True, because the sampler clips to [-1, 1]."""
        return True

    @property
    def acts_on_average(self) -> bool:
        """The original evaluates averaged weights."""
        return True

    @property
    def part_names(self) -> tuple[str, ...]:
        """The two networks."""
        return "encoder", "unet"

    @property
    def frame_dim(self) -> int:
        """Width of a frame's features."""
        return frame_width(self.encoder_channels, self.pooling, self.num_keypoints)

    @property
    def condition_dim(self) -> int:
        """Width of the condition, without the diffusion step."""
        text = self.text_dim if self.language == "film" else 0
        return self.num_observations * (self.frame_dim + self.state_dim) + text

    def build(self) -> "DiffusionPolicy":
        """The policy with fresh weights."""
        return DiffusionPolicy(self)

    def describe(self) -> str:
        """The sizes that the original's variants differ in."""
        return (
            f"Diffusion Policy: U-Net of {'/'.join(map(str, self.unet_channels))} channels, {self.num_observations}"
            f" observations, {self.sampling_steps} {self.sampler.upper()} steps of {self.num_steps}, language"
            f" {self.language}"
        )


# --- the denoiser -----------------------------------------------------------------------------------------------------


class ConvBlock(nn.Sequential):
    """Convolution over time, group norm, Mish."""

    def __init__(self, inputs: int, outputs: int, config: DiffusionPolicyConfig) -> None:
        super().__init__(
            nn.Conv1d(inputs, outputs, config.kernel_size, padding=config.kernel_size // 2),
            nn.GroupNorm(config.num_groups, outputs),
            nn.Mish(),
        )


class ConditionedBlock(nn.Module):
    """Two convolutions beside a shortcut. The condition scales and shifts the channels in between (FiLM)."""

    def __init__(self, inputs: int, outputs: int, config: DiffusionPolicyConfig) -> None:
        super().__init__()
        self.conv1 = ConvBlock(inputs, outputs, config)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(config.step_dim + config.condition_dim, 2 * outputs))
        self.conv2 = ConvBlock(outputs, outputs, config)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "B C K"], condition: Float[Tensor, "B E"]) -> Float[Tensor, "B D K"]:
        """The first half of the condition's channels scales, the second shifts."""
        scale, shift = self.film(condition)[..., None].chunk(2, dim=1)
        return self.conv2(scale * self.conv1(x) + shift) + self.shortcut(x)


class ConditionalUNet(nn.Module):
    """Noisy actions, diffusion step and condition to the predicted noise."""

    def __init__(self, config: DiffusionPolicyConfig) -> None:
        super().__init__()
        self.step_dim, width = config.step_dim, config.step_dim
        self.step_encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        channels = config.unet_channels

        def two(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList(
                [ConditionedBlock(inputs, outputs, config), ConditionedBlock(outputs, outputs, config)]
            )

        self.down = nn.ModuleList(two(a, b) for a, b in pairwise((config.action_dim, *channels)))
        self.downsample = nn.ModuleList(nn.Conv1d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.middle = two(channels[-1], channels[-1])
        upwards = channels[::-1]
        self.up = nn.ModuleList(two(2 * a, b) for a, b in pairwise(upwards))
        self.upsample = nn.ModuleList(nn.ConvTranspose1d(c, c, 4, stride=2, padding=1) for c in upwards[1:])
        self.final = ConvBlock(channels[0], channels[0], config)
        self.output = nn.Conv1d(channels[0], config.action_dim, 1)

    def forward(
        self, actions: Float[Tensor, "B K D"], step: Int[Tensor, "B"], condition: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B K D"]:
        """As in the original, the outermost level gives its features downwards alone, not across."""
        condition = torch.cat([self.step_encoder(sinusoid(step, self.step_dim)), condition], dim=-1)
        x, across = actions.transpose(1, 2), []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.downsample[level - 1](x)
            x = _run(blocks, x, condition)
            across.append(x)
        x = _run(self.middle, x, condition)
        for blocks, upsample in zip(self.up, self.upsample, strict=True):
            x = upsample(_run(blocks, torch.cat([x, across.pop()], dim=1), condition))
        return self.output(self.final(x)).transpose(1, 2)


def _run(blocks: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x, condition)
    return x


# --- the method -------------------------------------------------------------------------------------------------------


class DiffusionPolicy(Method):
    """The frame encoder and the denoiser, both trained, on the noise's error alone."""

    config: DiffusionPolicyConfig

    def __init__(self, config: DiffusionPolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FrameEncoder(config.encoder_channels, pooling=config.pooling, num_keypoints=config.num_keypoints)
        self.unet = ConditionalUNet(config)

    def parts(self) -> dict[str, nn.Module]:
        """The two networks."""
        return {"encoder": self.encoder, "unet": self.unet}

    def blocks(self) -> list[nn.Module]:
        """The residual blocks."""
        unet = self.unet
        conditioned = [m for part in (unet.down, unet.middle, unet.up) for m in part.modules()]
        return [*self.encoder.blocks, *(m for m in conditioned if isinstance(m, ConditionedBlock))]

    def condition(self, inputs: Batch | PolicyInputs) -> Float[Tensor, "B E"]:
        """Features and state of each observation, one after the other, then the instruction."""
        assert inputs.frames is not None
        assert inputs.states is not None
        frames = crop(inputs.frames, self.config.crop_size, at_random=self.training)
        features = self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        condition = torch.cat([features, inputs.states], dim=-1).flatten(1)
        if self.config.language == "none":
            return condition
        assert inputs.instruction is not None
        return torch.cat([condition, mean_token(inputs.instruction)], dim=-1)

    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """The squared error of the predicted noise, averaged over the actions that the mask keeps."""
        count, config = len(batch), self.config
        condition = self.condition(batch)
        noise = noise_like(batch.actions)
        step = sample_shard(lambda n: torch.randint(config.num_steps, (n,)), count).to(batch.actions.device)
        noisy = add_noise(batch.actions, noise, step, config.num_steps)
        error = (self.unet(noisy, step, condition) - noise).float().square() * batch.action_mask
        loss = error.sum() / (batch.action_mask.sum() if denominators is None else denominators["actions"])
        return Losses(total=loss, terms={"action": loss})

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Noise that an answer starts from, and the noise that DDPM adds after each step but the last."""
        config, chunk = self.config, (self.config.horizon, self.config.action_dim)
        later = {"later": (config.sampling_steps - 1, *chunk)} if config.sampler == "ddpm" else {}
        return {"action": chunk, **later}

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Denoise a chunk from `noise`. DDPM is DDIM with eta 1 whose noise follows from the clipped estimate.

        Raises ValueError for more DDPM steps than `noise` was made for.
        """
        config, condition = self.config, self.condition(inputs)
        ancestral, steps = config.sampler == "ddpm", steps or config.sampling_steps
        if ancestral and steps > config.sampling_steps:
            raise ValueError(f"DDPM: expected at most sampling_steps = {config.sampling_steps} steps, got {steps}")

        def predict(actions: Tensor, step: Tensor) -> Tensor:
            return self.unet(actions, step, condition)

        later = noise["later"] if ancestral else None
        return ddim(predict, noise["action"], config.num_steps, steps, added=later, continuation=continuation)
