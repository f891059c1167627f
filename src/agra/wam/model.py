"""The world action model (Fig. 7): video DiT, bridge and action DiT, with the denoising and the conditioning pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from agra.flow import continue_chunk, euler, interpolate
from agra.wam.action_dit import ActionDiT, ActionDiTConfig
from agra.wam.bridge import Bridge, BridgeConfig
from agra.wam.codec import CodecConfig, latent_shape
from agra.wam.text import TextConfig
from agra.wam.video_dit import VideoDiT, VideoDiTConfig, VideoOutput


@dataclass(frozen=True, kw_only=True)
class WAMConfig:
    """Shape and inputs of the model. The defaults are the paper's (C.1)."""

    frame_size: tuple[int, int] = (192, 336)  # H, W
    num_frames: int = 17  # frames of a clip, the observation first
    condition_noise_level: float | None = 1e-4
    """Noise level of the condition frame as an input of the video DiT: 1e-4 for Cosmos's post-trained checkpoint. None
    gives it the level of the other frames, as in training of the pre-trained checkpoint (docs/paper.md #10)."""
    guidance_noise_level: float = 1.0
    """Noise level of the conditioning pass as an input of the video DiT. Its latents are pure noise at any level."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    video_dit: VideoDiTConfig = field(default_factory=VideoDiTConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    action_dit: ActionDiTConfig = field(default_factory=ActionDiTConfig)

    def __post_init__(self) -> None:
        video, bridge, action = self.video_dit, self.bridge, self.action_dit
        if not 0 < self.guidance_noise_level <= 1:
            raise ValueError(f"guidance_noise_level: expected a number in (0, 1], got {self.guidance_noise_level}")
        if len(bridge.layers) != action.num_blocks:
            raise ValueError(
                f"bridge.layers: expected {action.num_blocks} layers, one for each cross-attention block of the action "
                f"DiT, got {len(bridge.layers)}: {bridge.layers}"
            )
        if any(not 0 <= layer < video.num_layers for layer in bridge.layers):
            raise ValueError(f"bridge.layers: expected layers 0..{video.num_layers - 1}, got {bridge.layers}")
        if not bridge.width == video.width == action.guidance_dim:
            raise ValueError(
                f"expected equal widths of bridge, video DiT and guidance, got bridge {bridge.width}, video_dit "
                f"{video.width} and action_dit.guidance_dim {action.guidance_dim}"
            )
        if self.codec.channels != video.latent_channels:
            raise ValueError(
                f"codec.channels: expected {video.latent_channels}, which is video_dit.latent_channels, got "
                f"{self.codec.channels}"
            )
        time_stride, space_stride = self.codec.time_stride, self.codec.space_stride
        if (self.num_frames - 1) % time_stride:
            raise ValueError(f"num_frames: expected 1 + {time_stride}n for the causal codec, got {self.num_frames}")
        step = space_stride * video.patch_size[1], space_stride * video.patch_size[2]
        if self.frame_size[0] % step[0] or self.frame_size[1] % step[1]:
            raise ValueError(f"frame_size: expected multiples of {step}, got {self.frame_size}")
        largest = max(video.max_size[i] // video.patch_size[i] for i in range(3))  # rows of the rotary table
        if max(self.token_grid) > largest:
            raise ValueError(
                f"video_dit.max_size: {video.max_size} is too small for the token grid {self.token_grid}; its largest "
                f"side may be {largest}"
            )
        if bridge.position_grid not in (None, self.token_grid):
            raise ValueError(
                f"bridge.position_grid: expected the token grid {self.token_grid} of frame_size {self.frame_size} and "
                f"num_frames {self.num_frames}, or None, got {bridge.position_grid}"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a window's latents."""
        return latent_shape(self.codec, self.frame_size, self.num_frames)

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(T, H, W) of the hidden states."""
        _, frames, height, width = self.latent_shape
        return frames, height // self.video_dit.patch_size[1], width // self.video_dit.patch_size[2]


class WAM(nn.Module):
    """The trainable model. Its inputs are latents of the frames and tokens of the instructions."""

    def __init__(self, config: WAMConfig) -> None:
        super().__init__()
        self.config = config
        self.video_dit = VideoDiT(config.video_dit)
        self.bridge = Bridge(config.bridge)
        self.action_dit = ActionDiT(config.action_dit)

    @property
    def bridged_layers(self) -> tuple[int, ...]:
        """The video layer that each action cross-attention block reads."""
        return self.config.bridge.layers

    def denoise(
        self,
        latents: Float[Tensor, "B C T h w"],
        noise: Float[Tensor, "B C T h w"],
        noise_level: Float[Tensor, "B"],
        instruction: Float[Tensor, "B L E"],
        *,
        layers: Sequence[int] = (),
    ) -> VideoOutput:
        """Run the denoising pass at the sampled noise level: velocity (Eq. 9) and hidden states of `layers`.

        Latent frame 0 is the observation. It enters without noise, and its velocity has no meaning.
        """
        return self._video_pass(
            interpolate(latents, noise, noise_level), latents[:, :, :1], noise_level, instruction, layers, velocity=True
        )

    def condition(
        self,
        observation_latent: Float[Tensor, "B C 1 h w"],
        noise: Float[Tensor, "B C T h w"],
        instruction: Float[Tensor, "B L E"],
        *,
        layers: Sequence[int] = (),
    ) -> dict[int, Float[Tensor, "B T H W D"]]:
        """Run the conditioning pass: pure noise after the observation (Eqs. 16, 19), at `guidance_noise_level`.

        Returns the hidden states of the bridged layers and of `layers`, with the graph attached.
        """
        level = self._guidance_levels(len(noise), noise.device)
        layers = sorted({*self.bridged_layers, *layers})
        return self._video_pass(noise, observation_latent, level, instruction, layers, velocity=False).hidden

    def denoise_and_condition(
        self,
        latents: Float[Tensor, "B C T h w"],
        noise: Float[Tensor, "Bd C T h w"],
        noise_level: Float[Tensor, "Bd"],
        condition_noise: Float[Tensor, "B C T h w"],
        instruction: Float[Tensor, "B L E"],
        *,
        layers: Sequence[int] = (),
        condition_layers: Sequence[int] = (),
    ) -> tuple[VideoOutput, dict[int, Float[Tensor, "B T H W D"]]]:
        """Run `denoise` on the first Bd samples and `condition` on all samples, as one forward pass if both need all
        blocks.

        A sharded model then gathers every block once for both.
        """
        count, condition_layers = len(noise), sorted({*self.bridged_layers, *condition_layers})
        if condition_layers[-1] < self.config.video_dit.num_layers - 1:  # the conditioning pass ends earlier
            output = self.denoise(latents[:count], noise, noise_level, instruction[:count], layers=layers)
            return output, self.condition(latents[:, :, :1], condition_noise, instruction, layers=condition_layers)
        output = self._video_pass(
            torch.cat([interpolate(latents[:count], noise, noise_level), condition_noise]),
            torch.cat([latents[:count, :, :1], latents[:, :, :1]]),
            torch.cat([noise_level, self._guidance_levels(len(latents), noise_level.device)]),
            torch.cat([instruction[:count], instruction]),
            sorted({*layers, *condition_layers}),
            velocity=True,
        )
        assert output.velocity is not None
        denoised = {layer: output.hidden[layer][:count] for layer in layers}
        return VideoOutput(velocity=output.velocity[:count], hidden=denoised), {
            layer: output.hidden[layer][count:] for layer in condition_layers
        }

    def text_attention(
        self,
        observation_latent: Float[Tensor, "B C 1 h w"],
        noise: Float[Tensor, "B C T h w"],
        instruction: Float[Tensor, "B L E"],
        *,
        layers: Sequence[int],
    ) -> dict[int, Float[Tensor, "B T H W L"]]:
        """Return the attention of each video token of `layers` to each instruction token, conditioning pass
        (Fig. 14).
        """
        level = self._guidance_levels(len(noise), noise.device)
        return self._video_pass(
            noise, observation_latent, level, instruction, (), velocity=False, text_layers=layers
        ).text_attention

    def imagine(
        self,
        observation_latent: Float[Tensor, "B C 1 h w"],
        noise: Float[Tensor, "B C T h w"],
        instruction: Float[Tensor, "B L E"],
        *,
        steps: int = 10,
    ) -> Float[Tensor, "B C T h w"]:
        """Predict the video as latents, in `steps` equal Euler steps from pure noise (Eqs. 8, 9).

        The policy never runs this. It shows what the hidden states represent.
        """

        def predict(latents: Tensor, level: Tensor) -> Tensor:
            output = self._video_pass(latents, observation_latent, level, instruction, (), velocity=True)
            assert output.velocity is not None
            return output.velocity

        return torch.cat([observation_latent, euler(predict, noise, steps)[:, :, 1:]], dim=2)

    def guide(self, hidden: Mapping[int, Float[Tensor, "B T H W D"]]) -> tuple[Float[Tensor, "B N D"], ...]:
        """Return the guidance of every cross-attention block (Eqs. 15, 17, 20)."""
        return self.bridge(hidden)

    def act(
        self,
        guidance: Sequence[Float[Tensor, "B N D"]],
        state: Float[Tensor, "B S"],
        embodiment: Int[Tensor, "B"],
        noise: Float[Tensor, "B K D"],
        *,
        steps: int = 4,
        continuation: tuple[Float[Tensor, "B K D"], Float[Tensor, "B K D"]] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Denoise an action chunk from pure noise in `steps` Euler steps with fixed guidance (A.2).

        `continuation` is (previous actions, weights) for `agra.flow.continue_chunk`. It needs gradients, so it cannot
        run under `torch.inference_mode`.
        """

        def predict(actions: Tensor, level: Tensor) -> Tensor:
            return self.action_dit(actions, state, level, guidance, embodiment).velocity

        return euler(predict if continuation is None else continue_chunk(predict, *continuation), noise, steps)

    def _guidance_levels(self, count: int, device: torch.device) -> Float[Tensor, "count"]:
        return torch.full((count,), self.config.guidance_noise_level, device=device)

    def _video_pass(
        self,
        noisy: Tensor,
        observation_latent: Tensor,
        noise_level: Tensor,
        instruction: Tensor,
        layers: Sequence[int],
        *,
        velocity: bool,
        text_layers: Sequence[int] = (),
    ) -> VideoOutput:
        latents = torch.cat([observation_latent, noisy[:, :, 1:]], dim=2)
        condition_mask = torch.zeros_like(latents[:, :1])
        condition_mask[:, :, 0] = 1
        levels = noise_level
        if self.config.condition_noise_level is not None:
            levels = noise_level[:, None].repeat(1, latents.shape[2])
            levels[:, 0] = self.config.condition_noise_level
        return self.video_dit(
            latents,
            levels,
            instruction,
            condition_mask=condition_mask,
            layers=layers,
            text_layers=text_layers,
            velocity=velocity,
        )
