"""The model as the public code computes it, with our weights: the alternative of the speed claims.

It calls diffusers' own `CosmosTransformer3DModel.forward` as the diffusers pipeline does. That forward pass always runs to its
end. Forward hooks store the hidden states, noise levels are expanded to all tokens before the modulation, each layer passes the
bridge separately, every draw of noise has its own copy of the guidance, and a policy computes its guidance again for each
denoising step. The only change is torchvision's nearest resize of the padding mask, replaced by torch's, so that torchvision is
not needed.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import diffusers.models.transformers.transformer_cosmos as cosmos
import torch
from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from agra.batch import PolicyInputs
from agra.methods.method import Continuation, Lap, Noise, PlainActor
from agra.methods.wam import WAMMethod
from agra.policies.instructions import Instructions
from agra.policies.policy import MethodPolicy
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
    """Build diffusers' own transformer. It shares the weights of `like`."""
    with torch.device("meta"):
        model = config.build()
    model.load_state_dict(like.state_dict(), assign=True)
    return model


class StockWAM(WAM):
    """The stock computation of `wam`, whose weights it shares."""

    def __init__(self, wam: WAM) -> None:
        with torch.device("meta"):
            super().__init__(wam.config)
            self.action_dit = StockActionDiT(wam.config.action_dit)
        self.load_state_dict(wam.state_dict(), assign=True)
        self.video_dit.transformer = stock_transformer(wam.config.video_dit, wam.video_dit.transformer)

    def guide(self, hidden: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Project each layer separately."""
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
        """Run two forward passes."""
        count = len(noise)
        output = self.denoise(latents[:count], noise, noise_level, instruction[:count], layers=layers)
        return output, self.condition(latents[:, :, :1], condition_noise, instruction, layers=condition_layers)

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
        assert not text_layers, "the stock forward pass returns no attention"
        latents = torch.cat([observation_latent, noisy[:, :, 1:]], dim=2).to(self.video_dit.dtype)
        condition_mask = torch.zeros_like(latents[:, :1])
        condition_mask[:, :, 0] = 1
        levels = noise_level[:, None].repeat(1, latents.shape[2])
        if self.config.condition_noise_level is not None:
            levels[:, 0] = self.config.condition_noise_level
        transformer, hidden = self.video_dit.transformer, {}

        def keep(layer: int) -> Any:
            def hook(block: Any, arguments: Any, output: Tensor) -> None:
                hidden[layer] = output.unflatten(1, self.config.token_grid)

            return hook

        hooks = [transformer.transformer_blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        try:
            output = transformer(
                latents,
                levels[:, None, :, None, None],
                self._text(instruction),
                condition_mask=condition_mask,
                padding_mask=latents.new_zeros(1, 1, *latents.shape[3:]),
                return_dict=False,
            )[0]
        finally:
            for hook in hooks:
                hook.remove()
        return VideoOutput(velocity=output, hidden=hidden)

    def _text(self, instruction: Tensor) -> Tensor:
        """Return the tokens in the data type of the weights. Projected tokens turn off the text projection."""
        model = self.video_dit.transformer
        if instruction.shape[-1] == self.config.video_dit.text_dim:
            model.register_to_config(use_crossattn_projection=False)
        return instruction.to(self.video_dit.dtype)


class StockActionDiT(ActionDiT):
    """An action DiT whose guidance is as long as the batch, so that each draw has its own keys and values."""

    def forward(  # type: ignore[override]
        self,
        noisy_actions: Tensor,
        state: Tensor,
        noise_level: Tensor,
        guidance: Sequence[Tensor],
        embodiment: Tensor,
        **options: Any,
    ) -> ActionOutput:
        """Repeat the guidance for every draw and run the action DiT."""
        repeated = [tokens.repeat_interleave(len(noisy_actions) // len(tokens), dim=0) for tokens in guidance]
        return super().forward(noisy_actions, state, noise_level, repeated, embodiment, **options)


class StockMethod(WAMMethod):
    """The stock computation of `method`, whose weights it shares."""

    def __init__(self, method: WAMMethod) -> None:
        with torch.device("meta"):
            super().__init__(method.config)
        self.wam, self.projectors = StockWAM(method.wam), method.projectors

    def actor(self, **options: Any) -> "StockActor":
        """Return the stock actor."""
        return StockActor(self, steps=options.get("action_steps"))


class StockActor(PlainActor):
    """An actor that runs the video pass and computes the guidance again for every denoising step."""

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        instructions: Sequence[Any],
        *,
        continuation: Continuation | None = None,
        lap: Lap = lambda stage: None,
    ) -> Float[Tensor, "B K D"]:
        """Return a chunk of actions."""
        assert isinstance(self.method, StockMethod)
        assert continuation is None, "the stock actor does not continue chunks"
        wam, actions, steps = self.method.wam, noise["action"], self.steps or 4
        for step in range(steps):
            hidden = self.method.hidden(inputs, noise)
            lap("video")
            guidance = wam.guide(hidden)
            lap("bridge")
            level = actions.new_full((len(actions),), 1 - step / steps)
            velocity = wam.action_dit(actions, inputs.state, level, guidance, inputs.embodiment).velocity
            actions = actions - velocity / steps
            lap("action")
        return actions


class StockPolicy(MethodPolicy):
    """The stock computation of a WAM's policy. It also encodes the instruction again for every chunk."""

    def __init__(self, policy: MethodPolicy) -> None:
        method, present = policy.method, policy.instructions
        assert isinstance(method, WAMMethod)
        assert present is not None
        instructions = Instructions(lambda: present.encoder)
        instructions.tokens = lru_cache(maxsize=0)(instructions._tokens)  # encoded every time
        super().__init__(
            name="stock",
            config=policy.config,
            method=StockMethod(method),
            codec=policy.codec,
            instructions=instructions,
            stats=policy.stats,
        )
