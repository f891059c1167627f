"""The model in the way of the public code, with our weights: what the speed claims compare with.

diffusers' own `CosmosTransformer3DModel.forward`, called as its pipeline calls it, runs to its end whatever is wanted of it;
forward hooks catch the hidden states, noise levels are spread over tokens before the modulation, each layer is bridged by
itself, every draw of noise brings its own copy of the guidance, and a policy makes its guidance anew for each denoising
step. The one thing taken from it is torchvision's nearest resize of the padding mask, replaced by torch's, so that it runs
without torchvision.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import diffusers.models.transformers.transformer_cosmos as cosmos
import torch
from diffusers import CosmosTransformer3DModel
from torch import Tensor
from torch.nn.functional import interpolate

from agra.policies.instructions import Instructions
from agra.policies.load import load_policy
from agra.types import ActionChunk, Observation
from agra.wam.action_dit import ActionDiT, ActionOutput
from agra.wam.model import WAM
from agra.wam.video_dit import VideoDiTConfig, VideoOutput

cosmos.transforms = SimpleNamespace(  # type: ignore[attr-defined]
    functional=SimpleNamespace(
        resize=lambda mask, size, interpolation: interpolate(mask, size=size, mode=interpolation)
    ),
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
)


def stock_transformer(config: VideoDiTConfig, like: CosmosTransformer3DModel) -> CosmosTransformer3DModel:
    """diffusers' own transformer with the weights of `like`."""
    model = config.build()
    model.load_state_dict(like.state_dict())
    return model


class StockWAM(WAM):
    """`wam` again, computed the stock way."""

    def __init__(self, wam: WAM) -> None:
        super().__init__(wam.config)
        self.load_state_dict(wam.state_dict())
        self.video_dit.transformer = stock_transformer(wam.config.video_dit, wam.video_dit.transformer)
        self.action_dit.__class__ = StockActionDiT

    def guide(self, hidden: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Each layer by itself."""
        return tuple(self.bridge._project(hidden[layer]) for layer in self.bridged_layers)

    def denoise_and_condition(
        self,
        latents: Tensor,
        noise: Tensor,
        noise_level: Tensor,
        condition_noise: Tensor,
        instruction: Tensor,
        *,
        layers: Sequence[int] = (),
        condition_layers: Sequence[int] = (),
    ) -> tuple[VideoOutput, dict[int, Tensor]]:
        """Two forwards."""
        count = len(noise)
        output = self.denoise(latents[:count], noise, noise_level, instruction[:count], layers=layers)
        return output, self.condition(latents[:, :, :1], condition_noise, instruction, layers=condition_layers)

    def _video_pass(
        self,
        noisy: Tensor,
        latents: Tensor,
        noise_level: Tensor,
        instruction: Tensor,
        layers: Sequence[int],
        *,
        velocity: bool,
    ) -> VideoOutput:
        latents = torch.cat([latents, noisy[:, :, 1:]], dim=2)
        condition_mask = torch.zeros_like(latents[:, :1])
        condition_mask[:, :, 0] = 1
        levels = noise_level[:, None].repeat(1, latents.shape[2])
        levels[:, 0] = self.config.condition_noise_level
        transformer, hidden = self.video_dit.transformer, {}

        def keep(layer: int):
            def hook(block, arguments, output):
                hidden[layer] = output.unflatten(1, self.config.token_grid)

            return hook

        hooks = [transformer.transformer_blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        try:
            output = transformer(
                latents,
                levels[:, None, :, None, None],
                instruction,
                condition_mask=condition_mask,
                padding_mask=latents.new_zeros(1, 1, *latents.shape[3:]),
                return_dict=False,
            )[0]
        finally:
            for hook in hooks:
                hook.remove()
        return VideoOutput(velocity=output, hidden=hidden)


class StockActionDiT(ActionDiT):
    """Guidance as long as the batch: each draw has keys and values of its own."""

    def forward(
        self, noisy_actions: Tensor, state: Tensor, noise_level: Tensor, guidance, embodiment, **options
    ) -> ActionOutput:  # type: ignore[override]
        """With the guidance repeated for every draw."""
        own = [one.repeat_interleave(len(noisy_actions) // len(one), dim=0) for one in guidance]
        return super().forward(noisy_actions, state, noise_level, own, embodiment, **options)


class StockPolicy(MethodPolicy):
    """`policy` again, the stock way: text, video pass and guidance anew for every denoising step."""

    def __init__(self, policy: MethodPolicy) -> None:
        model = StockWAM(policy.model)
        instructions = Instructions(lambda: policy.text)
        instructions.tokens = instructions._tokens  # encoded anew at every call
        parts = {"codec": policy.codec, "instructions": instructions, "stats": policy.stats}
        super().__init__(name="stock", config=policy.config, model=model, fast=False, **parts)

    @torch.inference_mode()
    def act(self, observation: Observation, **options) -> ActionChunk:
        """The next chunk of actions."""
        inputs = self.prepare([observation])
        video_noise, actions = self._draw(1, self._episode)
        for step in range(self.action_steps):
            guidance = self.model.guide(
                self.model.condition(inputs.latents, video_noise, inputs.instruction)
            )
            level = torch.full((1,), 1 - step / self.action_steps)
            velocity = self.model.action_dit(actions, inputs.state, level, guidance, inputs.embodiment).velocity
            actions = actions - velocity / self.action_steps
        return ActionChunk(actions=self.unnormalize(actions, observation.embodiment)[0], timings={})
