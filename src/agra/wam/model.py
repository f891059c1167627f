"""The world action model: video DiT, bridge and action DiT, and the three things that one asks of it.     Fig. 7"""

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
    """Everything that decides the model's shape and what it eats; the defaults are the paper's, C.1."""

    frame_size: tuple[int, int] = (192, 336)  # H, W
    num_frames: int = 17
    condition_noise_level: float | None = 1e-4
    """What the video DiT is told about the condition frame: 1e-4 for Cosmos's post-trained checkpoint; None tells it
    the other frames' level, as the pre-trained one was trained (docs/paper.md #10)."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    video_dit: VideoDiTConfig = field(default_factory=VideoDiTConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    action_dit: ActionDiTConfig = field(default_factory=ActionDiTConfig)

    def __post_init__(self) -> None:
        video, bridge, action = self.video_dit, self.bridge, self.action_dit
        if len(bridge.layers) != action.num_blocks:
            raise ValueError(
                f"bridge.layers: expected {action.num_blocks} layers, one for each cross-attention block "
                f"of the action DiT, got {len(bridge.layers)}: {bridge.layers}"
            )
        if any(not 0 <= layer < video.num_layers for layer in bridge.layers):
            raise ValueError(f"bridge.layers: expected layers 0..{video.num_layers - 1}, got {bridge.layers}")
        if not bridge.width == video.width == action.guidance_dim:
            raise ValueError(
                f"bridge width {bridge.width}, video DiT width {video.width} and action_dit.guidance_dim "
                f"{action.guidance_dim} must agree"
            )
        if self.codec.channels != video.latent_channels:
            raise ValueError(
                f"codec.channels {self.codec.channels} and video_dit.latent_channels {video.latent_channels} must agree"
            )
        if (self.num_frames - 1) % 4:
            raise ValueError(f"num_frames: a causal 4x codec takes 1 + 4n frames, got {self.num_frames}")
        step = 8 * video.patch_size[1], 8 * video.patch_size[2]
        if self.frame_size[0] % step[0] or self.frame_size[1] % step[1]:
            raise ValueError(f"frame_size: expected multiples of {step}, got {self.frame_size}")
        largest = max(video.max_size[i] // video.patch_size[i] for i in range(3))  # rows of the rotary table
        if max(self.token_grid) > largest:
            raise ValueError(f"video_dit.max_size {video.max_size} is too small for the token grid {self.token_grid}")

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
    """The trainable model. Frames become latents, and instructions tokens, before they get here."""

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
        """The denoising pass at the sampled noise level: velocity (Eq. 9) and hidden states of `layers`.

        Latent frame 0 is the observation: it enters clean, and the velocity there means nothing.
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
        """The conditioning pass, noise level exactly 1 and pure noise after the observation.             Eqs. 16, 19

        Returns the hidden states of the bridged layers and of `layers`, with the graph attached.
        """
        level = noise.new_ones(len(noise), dtype=torch.float32)
        wanted = sorted({*self.bridged_layers, *layers})
        return self._video_pass(noise, observation_latent, level, instruction, wanted, velocity=False).hidden

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
        """`denoise` of the first Bd samples and `condition` of all of them: one forward, where both run to the last block.

        On a mesh every block is then gathered once for both.
        """
        count, wanted = len(noise), {*self.bridged_layers, *condition_layers}
        if max(wanted) < self.config.video_dit.num_layers - 1:  # the conditioning pass ends earlier
            output = self.denoise(latents[:count], noise, noise_level, instruction[:count], layers=layers)
            return output, self.condition(latents[:, :, :1], condition_noise, instruction, layers=condition_layers)
        output = self._video_pass(
            torch.cat([interpolate(latents[:count], noise, noise_level), condition_noise]),
            torch.cat([latents[:count, :, :1], latents[:, :, :1]]),
            torch.cat([noise_level, noise_level.new_ones(len(latents))]),
            torch.cat([instruction[:count], instruction]),
            sorted({*layers, *wanted}),
            velocity=True,
        )
        assert output.velocity is not None
        denoised = {layer: output.hidden[layer][:count] for layer in layers}
        return VideoOutput(velocity=output.velocity[:count], hidden=denoised), {
            layer: output.hidden[layer][count:] for layer in sorted(wanted)
        }

    def text_attention(
        self,
        observation_latent: Float[Tensor, "B C 1 h w"],
        noise: Float[Tensor, "B C T h w"],
        instruction: Float[Tensor, "B L E"],
        *,
        layers: Sequence[int],
    ) -> dict[int, Float[Tensor, "B T H W L"]]:
        """How much every video token of `layers` reads each instruction token in the conditioning pass.        Fig. 14"""
        level = noise.new_ones(len(noise), dtype=torch.float32)
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
        """The video that the video DiT expects, as latents: `steps` equal Euler steps from pure noise.        Eqs. 8, 9

        The policy never does this; it shows what the hidden states that it reads are about.
        """

        def predict(latents: Tensor, level: Tensor) -> Tensor:
            output = self._video_pass(latents, observation_latent, level, instruction, (), velocity=True)
            assert output.velocity is not None
            return output.velocity

        return torch.cat([observation_latent, euler(predict, noise, steps)[:, :, 1:]], dim=2)

    def guide(self, hidden: Mapping[int, Float[Tensor, "B T H W D"]]) -> tuple[Float[Tensor, "B N D"], ...]:
        """The guidance of every cross-attention block.                                           Eqs. 15, 17, 20"""
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
        """Denoise an action chunk from pure noise in `steps` Euler steps under fixed guidance.                 A.2

        `continuation` holds the chunk to (previous actions, weights), see `agra.flow.continue_chunk`. It needs a graph:
        not under `torch.inference_mode`.
        """

        def predict(actions: Tensor, level: Tensor) -> Tensor:
            return self.action_dit(actions, state, level, guidance, embodiment).velocity

        return euler(predict if continuation is None else continue_chunk(predict, *continuation), noise, steps)

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
