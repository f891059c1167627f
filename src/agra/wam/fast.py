"""Inference without doing anything twice: the same results as `WAM.condition` and `WAM.act`, up to rounding.

At inference the noise levels are fixed, the instruction changes once an episode and the guidance once a chunk. So the
modulation of every block and the rotary table are computed once, the instruction's keys and values in every video block
once an instruction, and the guidance's keys and values in every action block once a chunk instead of once a step.
The blocks are those of training (`VideoBlock.run`, `SubBlock.run`). For weights that do not change any more.

Two options go further: `compiled` has torch compile the three parts, on a GPU as CUDA graphs; `pool_future` is an
approximation (`Bridge.forward`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agra.flow import Predict, continue_chunk, euler
from agra.wam.action_dit import SubBlock
from agra.wam.model import WAM
from agra.wam.video_dit import VideoBlock

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Level:
    """What an action step needs of its noise level."""

    features: Float[Tensor, "1 W"]
    modulation: tuple[tuple[Tensor, Tensor], ...]  # scale and shift of every sub-block
    modulation_out: tuple[Tensor, Tensor]


class FastWAM:
    """A frozen WAM prepared for chunks of `action_steps` Euler steps.

    Raises ValueError where a number below 1 is given. Compiled, each new batch size takes a minute or more at its first
    call, and on a GPU results live until the next call (call `begin` before each).
    """

    @torch.no_grad()
    def __init__(self, model: WAM, *, action_steps: int = 4, pool_future: int = 1, compiled: bool = False) -> None:
        for name, number in (("action_steps", action_steps), ("pool_future", pool_future)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.model, self.action_steps, self.pool_future = model, action_steps, pool_future
        if compiled:
            for part in ("condition", "guide", "_act"):
                setattr(self, part, torch.compile(getattr(self, part), mode="reduce-overhead", dynamic=False))
        config, parameter = model.config, next(model.parameters())
        self._blocks = cast(
            Sequence[VideoBlock], model.video_dit.transformer.transformer_blocks[: max(config.bridge.layers) + 1]
        )
        self._head_blocks = cast(Sequence[SubBlock], model.action_dit.blocks)
        channels, *grid = config.latent_shape
        self._mask = torch.zeros(1, 1, *grid, dtype=parameter.dtype, device=parameter.device)
        self._mask[:, :, 0] = 1
        padded = model.video_dit.pad(self._mask.expand(1, channels, *grid), self._mask)
        transformer = model.video_dit.transformer
        self._rope = transformer.rope(padded)
        self._positions = None if transformer.learnable_pos_embed is None else transformer.learnable_pos_embed(padded)
        levels = torch.ones(1, grid[0], device=parameter.device)
        if config.condition_noise_level is not None:
            levels[:, 0] = config.condition_noise_level
        temb, embedded = model.video_dit.embed_levels(levels, parameter)
        self._modulation = [block.modulate(embedded, temb) for block in self._blocks]
        self._levels = [self._level(1 - step / action_steps, parameter) for step in range(action_steps)]

    @torch.no_grad()
    def instruction(self, tokens: Float[Tensor, "L E"]) -> tuple[KeysValues, ...]:
        """An instruction's keys and values in every video block that is run, (1, heads, L, head width) each."""
        text = self.model.video_dit.project_text(tokens[None])
        return tuple(block.text_keys_values(text) for block in self._blocks)

    def condition(
        self,
        observation_latent: Float[Tensor, "B C 1 h w"],
        noise: Float[Tensor, "B C T h w"],
        instructions: Sequence[tuple[KeysValues, ...]],
    ) -> dict[int, Float[Tensor, "B T H W D"]]:
        """The conditioning pass at noise level 1, hidden states of the bridged layers.                   Eqs. 16, 19"""
        latents = torch.cat([observation_latent, noise[:, :, 1:]], dim=2)
        x, grid = self.model.video_dit.patchify(
            self.model.video_dit.pad(latents, self._mask.expand(len(latents), -1, -1, -1, -1))
        )
        hidden = {}
        for index, (block, modulation) in enumerate(zip(self._blocks, self._modulation, strict=True)):
            text = _rows([one[index] for one in instructions])
            x = block.run(x, text, modulation, self._rope, self._positions)
            if index in self.model.bridged_layers:
                hidden[index] = x.unflatten(2, grid[1:])
        return hidden

    def begin(self) -> None:
        """A new answer begins: what compiled parts gave for the last one may be overwritten."""
        torch.compiler.cudagraph_mark_step_begin()

    def guide(self, hidden: Mapping[int, Float[Tensor, "B T H W D"]]) -> tuple[Float[Tensor, "B N D"], ...]:
        """The guidance of every cross-attention block.                                           Eqs. 15, 17, 20"""
        return self.model.bridge(hidden, pool_future=self.pool_future)

    def act(
        self,
        guidance: Sequence[Float[Tensor, "B N D"]],
        state: Float[Tensor, "B S"],
        embodiment: Int[Tensor, "B"],
        noise: Float[Tensor, "B K D"],
        *,
        continuation: tuple[Float[Tensor, "B K D"], Float[Tensor, "B K D"]] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """`WAM.act` in `action_steps` steps; with a `continuation`, which needs a graph, never compiled."""
        if continuation is None:
            return self._act(guidance, state, embodiment, noise)
        previous, weights = continuation
        predict = self._predict(guidance, state, embodiment)
        return euler(continue_chunk(predict, previous, weights), noise, self.action_steps)

    def _act(self, guidance: Sequence[Tensor], state: Tensor, embodiment: Tensor, noise: Tensor) -> Tensor:
        return euler(self._predict(guidance, state, embodiment), noise, self.action_steps)

    def _predict(self, guidance: Sequence[Tensor], state: Tensor, embodiment: Tensor) -> Predict:
        head = self.model.action_dit
        # A layer that several blocks read still has keys and values of its own in each.
        known = [self._head_blocks[2 * index].attn.keys_values(one) for index, one in enumerate(guidance)]
        before = head.encode_state(state, embodiment)

        levels = iter(self._levels)

        def predict(actions: Tensor, _: Tensor) -> Tensor:
            level = next(levels)  # Euler's levels, in its order
            time = level.features.expand(len(actions), -1)
            x = head.join(before, head.action_encoder.run(actions, time, embodiment))
            for index, (block, modulation) in enumerate(zip(self._head_blocks, level.modulation, strict=True)):
                x = block.run(x, known[index // 2] if index % 2 == 0 else None, modulation)
            return head.project(x, level.modulation_out, actions.shape[1], embodiment)

        return predict

    def _level(self, noise_level: float, like: Tensor) -> _Level:
        head = self.model.action_dit
        bucket = head.bucket(torch.tensor([noise_level], device=like.device))
        time = head.embed_time(bucket, like.dtype)
        return _Level(
            features=head.action_encoder.time_features(bucket),
            modulation=tuple(block.modulate(time) for block in self._head_blocks),
            modulation_out=head.modulate_out(time),
        )


def _rows(parts: Sequence[KeysValues]) -> KeysValues:
    """Keys and values of several samples as one batch; without copies where they are all the same."""
    first = parts[0]
    if all(one is first for one in parts):
        return first[0].expand(len(parts), -1, -1, -1), first[1].expand(len(parts), -1, -1, -1)
    return torch.cat([one[0] for one in parts]), torch.cat([one[1] for one in parts])
