"""UWM (Zhu et al., arXiv 2504.02792): one transformer denoises actions and future frames, at two diffusion steps.

The steps are drawn independently in training. At inference, the diffusion step of a modality says how much of it is
known. The highest step marginalises over the modality. Step 0 conditions on it. One network is therefore a policy,
forward dynamics, inverse dynamics and a video model. The observation enters as one vector through adaptive layer norms.
docs/methods.md names what differs from the original.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agra.batch import Batch, PolicyInputs
from agra.methods.ddim import add_noise, ddim, first_step
from agra.methods.method import Continuation, LossDenominators, Losses, Method, MethodConfig, Needs, Noise, Shapes
from agra.rng import noise_like, sample_shard
from agra.wam.codec import CodecConfig, latent_shape
from agra.wam.frame_encoder import FrameEncoder, Pooling, frame_width
from agra.wam.joint_transformer import JointTransformer, JointTransformerConfig
from agra.wam.text import TextConfig, mean_token


@dataclass(frozen=True, kw_only=True)
class UWMConfig(MethodConfig):
    """Sizes and sampler. The defaults are the published ones, for one camera and GR1's states and actions."""

    kind: Literal["uwm"] = "uwm"
    num_observations: int = 2
    """Observations of the condition: the present one, and those of the control steps before it."""
    frame_size: tuple[int, int] = (224, 224)
    future_frames: tuple[int, ...] = (16, 17)
    """Frames that are predicted, counted at the source's frame stride."""
    image_codec: CodecConfig = field(
        default_factory=lambda: CodecConfig(
            kind="sdxl", source="stabilityai/sdxl-vae", revision=None, channels=4, dtype="float32"
        )
    )
    latent_range: float = 3.0
    """Latents are divided by it, so that this many standard deviations fit into [-1, 1], to which the sampler clips."""
    encoder_channels: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of the ResNet's stages, two blocks each. Multiples of 16."""
    pooling: Pooling = "mean"
    num_keypoints: int = 32
    vector_dim: int = 768
    """Width of a frame's and of the instruction's vector in the condition."""
    language: Literal["none", "pooled"] = "none"
    """`pooled` adds the mean of the instruction's frozen tokens to the condition. The original's config has it off."""
    text_encoder: TextConfig = field(default_factory=lambda: TextConfig(kind="minilm", length=32))
    text_dim: int = 384
    state_dim: int = 58
    action_dim: int = 29
    horizon: int = 16
    transformer: JointTransformerConfig = field(default_factory=JointTransformerConfig)
    num_steps: int = 100
    """Diffusion steps of training."""
    sampling_steps: int = 10
    """Denoising steps of an answer, evenly spread over the diffusion steps."""

    def __post_init__(self) -> None:
        if self.num_observations < 1:
            raise ValueError(f"method.num_observations: expected at least 1, got {self.num_observations}")
        if (
            not self.future_frames
            or min(self.future_frames) < 1
            or list(self.future_frames) != sorted({*self.future_frames})
        ):
            raise ValueError(
                f"method.future_frames: expected ascending frames after the observation, got {self.future_frames}"
            )
        if not self.latent_range > 0:
            raise ValueError(f"method.latent_range: expected a positive number, got {self.latent_range}")
        if not 1 <= self.sampling_steps <= self.num_steps:
            raise ValueError(f"method.sampling_steps: expected 1 to {self.num_steps}, got {self.sampling_steps}")
        frame_width(self.encoder_channels, self.pooling, self.num_keypoints)  # checks the channels
        self.transformer.token_grid(self.image_shape[2:])  # checks the patches

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
        """Frames and states of the observations, latents of the future frames, and the instruction if it is read."""
        return Needs(
            frames=self.observations,
            states=self.observations,
            frame_latents=self.future_frames,
            instruction=self.language == "pooled",
        )

    def needs_to_act(self) -> Needs:
        """Content of an observation: `needs` without the future frames."""
        return Needs(frames=self.observations, states=self.observations, instruction=self.language == "pooled")

    @property
    def codec(self) -> CodecConfig:
        """The codec that encodes the future frames one by one."""
        return self.image_codec

    @property
    def text(self) -> TextConfig | None:
        """The text encoder, where the instruction is read."""
        return self.text_encoder if self.language == "pooled" else None

    @property
    def clips_actions(self) -> bool:
        """True, because the sampler clips to [-1, 1]."""
        return True

    @property
    def part_names(self) -> tuple[str, ...]:
        """The two networks."""
        return "encoder", "transformer"

    @property
    def imagined_frames(self) -> tuple[int, ...]:
        """The observation, and the first of the predicted frames."""
        return (0, self.future_frames[0])

    @property
    def grid_frames(self) -> tuple[int, ...]:
        """Frames that reports show beside each other, equal to `imagined_frames`. There is no token grid."""
        return self.imagined_frames

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """(F, C, h, w) of the future latents."""
        channels, _, *size = latent_shape(self.image_codec, self.frame_size, 1)
        return len(self.future_frames), channels, size[0], size[1]

    @property
    def condition_dim(self) -> int:
        """Width of the condition, without the diffusion steps."""
        text = self.vector_dim if self.language == "pooled" else 0
        return self.num_observations * (self.vector_dim + self.state_dim) + text

    def build(self) -> "UWM":
        """The two networks with fresh weights."""
        return UWM(self)

    def describe(self) -> str:
        """The sizes, the predicted frames and the language."""
        network = self.transformer
        return (
            f"UWM: {network.num_blocks} blocks of width {network.width} over {self.horizon} actions and frames"
            f" {', '.join(f't+{frame}' for frame in self.future_frames)}, {self.sampling_steps} DDIM steps of"
            f" {self.num_steps}, language {self.language}"
        )


class ConditionEncoder(nn.Module):
    """Observations and instruction to the vector that conditions the transformer."""

    def __init__(self, config: UWMConfig) -> None:
        super().__init__()
        self.frames = FrameEncoder(config.encoder_channels, pooling=config.pooling, num_keypoints=config.num_keypoints)
        self.project = nn.Linear(self.frames.width, config.vector_dim)
        self.text = nn.Linear(config.text_dim, config.vector_dim) if config.language == "pooled" else None

    def forward(self, inputs: Batch | PolicyInputs) -> Float[Tensor, "B E"]:
        """Vectors of the frames, then the states, then the instruction's vector."""
        assert inputs.frames is not None
        assert inputs.states is not None
        vectors = self.project(self.frames(inputs.frames.flatten(0, 1))).unflatten(0, inputs.frames.shape[:2])
        parts = [vectors.flatten(1), inputs.states.flatten(1)]
        if self.text is not None:
            assert inputs.instruction is not None
            parts.append(self.text(mean_token(inputs.instruction)))
        return torch.cat(parts, dim=-1)


class UWM(Method):
    """The condition's encoder and the transformer, trained on the errors of both predicted noises, 1 : 1.

    `act` is the policy. `forward_dynamics`, `inverse_dynamics` and `predict_video` are the other three modes. A
    modality that a mode does not know is pure noise at the first step of the sampler's schedule, as in the original.
    """

    config: UWMConfig

    def __init__(self, config: UWMConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConditionEncoder(config)
        self.transformer = JointTransformer(
            config.transformer,
            actions=(config.horizon, config.action_dim),
            images=config.image_shape,
            condition_dim=config.condition_dim,
        )

    def parts(self) -> dict[str, nn.Module]:
        """The two networks."""
        return {"encoder": self.encoder, "transformer": self.transformer}

    def blocks(self) -> list[nn.Module]:
        """The residual blocks and the transformer's blocks."""
        return [*self.encoder.frames.blocks, *self.transformer.blocks]

    # --- training -----------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, float]:
        """Add the number of recorded future frames."""
        return super().counts(batch) | {"frames": _recorded(batch).sum().item()}

    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """Add the mean squared error of the actions' noise, where the mask keeps them, and that of the frames' noise.

        Frames past the episode's end do not count. A sample without any action to learn is action-free video: its
        actions are pure noise at the last diffusion step.
        """
        assert batch.frame_latents is not None
        config, images = self.config, batch.frame_latents / self.config.latent_range
        denominators = denominators or _denominators(batch)
        condition = self.encoder(batch)
        action_noise, image_noise = noise_like(batch.actions), noise_like(images)
        drawn, image_step = (
            sample_shard(lambda n: torch.randint(config.num_steps, (n,)), len(batch)).to(images.device)
            for _ in range(2)
        )
        known = batch.action_mask.flatten(1).any(dim=1)
        action_step = torch.where(known, drawn, config.num_steps - 1)
        predicted = self.transformer(
            add_noise(batch.actions, action_noise, action_step, config.num_steps),
            add_noise(images, image_noise, image_step, config.num_steps),
            action_step,
            image_step,
            condition,
        )
        action_error = (predicted[0] - action_noise).float().square() * batch.action_mask
        image_error = (predicted[1] - image_noise).float().square().mean(dim=(2, 3, 4)) * _recorded(batch)
        terms = {
            "action": action_error.sum() / denominators["actions"],
            "dynamics": image_error.sum() / denominators["frames"],
        }
        return Losses(total=terms["action"] + terms["dynamics"], terms=terms)

    # --- the four modes -----------------------------------------------------------------------------------------------

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Noise of the actions and of the future latents. Each starts a chain or stands for an unknown modality."""
        return {"action": (self.config.horizon, self.config.action_dim), "image": self.config.image_shape}

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        *,
        steps: int | None = None,
        continuation: Continuation | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Denoise a chunk whose future is unknown: p(actions | observation)."""
        return self._actions(inputs, noise, noise["image"], None, steps, continuation)

    def inverse_dynamics(
        self,
        inputs: PolicyInputs,
        frame_latents: Float[Tensor, "B F C h w"],
        noise: Noise,
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Denoise the chunk that leads to the future frames: p(actions | observation, frames).

        `frame_latents` are the codec's, as `Batch.frame_latents`.
        """
        return self._actions(inputs, noise, frame_latents / self.config.latent_range, 0, steps, None)

    def forward_dynamics(
        self,
        inputs: PolicyInputs,
        actions: Float[Tensor, "B K D"],
        noise: Noise,
        *,
        steps: int | None = None,
    ) -> Float[Tensor, "B F C h w"]:
        """Denoise the future frames that a normalised chunk leads to: p(frames | observation, actions)."""
        return self._images(inputs, noise, actions, 0, steps)

    def predict_video(
        self, inputs: PolicyInputs, noise: Noise, *, steps: int | None = None
    ) -> Float[Tensor, "B F C h w"]:
        """Denoise the future frames under unknown actions: p(frames | observation)."""
        return self._images(inputs, noise, noise["action"], None, steps)

    def imagine(self, inputs: PolicyInputs, noise: Noise, *, steps: int) -> Float[Tensor, "B C T h w"]:
        """Return the first frame of `predict_video`, the only one of `UWMConfig.imagined_frames` that is predicted."""
        return self.predict_video(inputs, noise, steps=steps)[:, :1].transpose(1, 2)

    def _actions(
        self,
        inputs: PolicyInputs,
        noise: Mapping[str, Tensor],
        images: Tensor,
        image_step: int | None,
        steps: int | None,
        continuation: Continuation | None,
    ) -> Tensor:
        """Denoise actions beside fixed `images` at `image_step`, None for the first of the schedule."""
        condition, steps = self.encoder(inputs), steps or self.config.sampling_steps
        fixed = self._step(image_step, steps, images)

        def predict(actions: Tensor, step: Tensor) -> Tensor:
            return self.transformer(actions, images, step, fixed, condition)[0]

        return ddim(predict, noise["action"], self.config.num_steps, steps, continuation=continuation)

    def _images(
        self,
        inputs: PolicyInputs,
        noise: Mapping[str, Tensor],
        actions: Tensor,
        action_step: int | None,
        steps: int | None,
    ) -> Tensor:
        """Denoise frames beside fixed `actions` at `action_step`, None for the first of the schedule."""
        condition, steps = self.encoder(inputs), steps or self.config.sampling_steps
        fixed = self._step(action_step, steps, actions)

        def predict(images: Tensor, step: Tensor) -> Tensor:
            return self.transformer(actions, images, fixed, step, condition)[1]

        return ddim(predict, noise["image"], self.config.num_steps, steps) * self.config.latent_range

    def _step(self, step: int | None, steps: int, rows: Tensor) -> Tensor:
        value = first_step(self.config.num_steps, steps) if step is None else step
        return torch.full((len(rows),), value, device=rows.device)


def _recorded(batch: Batch) -> Tensor:
    """(B, F) bool: whether each future frame lies within its episode."""
    assert batch.frame_mask is not None
    return batch.frame_mask


def _denominators(batch: Batch) -> dict[str, Tensor]:
    """The loss denominators of a whole step, at least 1."""
    return {"actions": batch.action_mask.sum().clamp(min=1), "frames": _recorded(batch).sum().clamp(min=1)}
