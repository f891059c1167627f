"""Fast inference: the same results as `WAM.condition` and `WAM.act` up to rounding, with nothing computed twice.

At inference the noise levels are fixed, the instruction changes once an episode and the guidance once a chunk. The
modulation of every block and the rotary table are therefore computed once, the instruction's keys and values in every
video block once an instruction, and the guidance's keys and values in every action block once a chunk instead of once a
step. The blocks are those of training (`VideoBlock.run`, `SubBlock.run`). Only `update` may change the weights.

Two options go further. `compiled` compiles the three parts with torch, on a GPU as CUDA graphs. `pool_future` is an
approximation (`Bridge.forward`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch._dynamo
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from agra.flow import Predict, continue_chunk, euler
from agra.precision import prepare_compilation
from agra.wam.action_dit import SubBlock
from agra.wam.model import WAM
from agra.wam.video_dit import VideoBlock

KeysValues = tuple[Tensor, Tensor]
BATCH_SIZES = (1, 2, 4, 8, 16)
"""Batch sizes of compiled inference. Other batches are padded to the next size, so that few graphs are compiled."""


def padded_size(count: int) -> int:
    """Return the batch size for `count` requests: the next of `BATCH_SIZES`, or the next multiple of the largest."""
    largest = BATCH_SIZES[-1]
    return next((size for size in BATCH_SIZES if size >= count), -(-count // largest) * largest)


class _Level(NamedTuple):
    """Constants of one Euler step of the action head, which follow from its noise level."""

    features: Float[Tensor, "1 W"]
    modulation: tuple[tuple[Tensor, Tensor], ...]  # scale and shift of every sub-block
    modulation_out: tuple[Tensor, Tensor]


class FastWAM:
    """A frozen WAM prepared for chunks of `action_steps` Euler steps.

    With `compiled` the three parts run in the batch sizes of `padded_size`. They run uncompiled until `compile` is
    called. After that, the first call of each size compiles it without graph breaks, which takes a minute or more. On a
    GPU the results are valid until the next call. Call `begin` before each answer. Raises ValueError for numbers
    below 1.
    """

    @torch.no_grad()
    def __init__(self, model: WAM, *, action_steps: int = 4, pool_future: int = 1, compiled: bool = False) -> None:
        for name, number in (("action_steps", action_steps), ("pool_future", pool_future)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        self.model, self.action_steps, self.pool_future, self.compiled = model, action_steps, pool_future, compiled
        config = model.config
        self._blocks = cast(
            Sequence[VideoBlock], model.video_dit.transformer.transformer_blocks[: max(config.bridge.layers) + 1]
        )
        self._head_blocks = cast(Sequence[SubBlock], model.action_dit.blocks)
        parameter = next(model.parameters())
        channels, *grid = config.latent_shape
        self._mask = torch.zeros(1, 1, *grid, dtype=parameter.dtype, device=parameter.device)
        self._mask[:, :, 0] = 1
        padded = model.video_dit.pad(self._mask.expand(1, channels, *grid), self._mask)
        self._rope = model.video_dit.transformer.rope(padded)
        self._positions, self._modulation, self._levels = self._constants(padded)
        self._parts: dict[str, Any] = {"condition": self._condition, "guide": self._guide, "act": self._act}
        self._runs_compiled = False

    def compile(self) -> None:
        """Compile the three parts at their first call of each batch size. Without `compiled` do nothing."""
        if self.compiled:
            prepare_compilation(self._mask.device)
            options: Any = {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}
            self._parts = {name: torch.compile(part, **options) for name, part in self._parts.items()}
            self._runs_compiled = True

    def _constants(self, padded: Tensor) -> tuple[Tensor | None, list[tuple[Tensor, ...]], list[_Level]]:
        """Compute what the weights alone decide: learned positions, video blocks' modulation, the head's levels."""
        config, video = self.model.config, self.model.video_dit
        parameter = next(self.model.parameters())
        learned = video.transformer.learnable_pos_embed
        levels = torch.full((1, config.latent_shape[1]), config.guidance_noise_level, device=parameter.device)
        if config.condition_noise_level is not None:
            levels[:, 0] = config.condition_noise_level
        temb, embedded = video.embed_levels(levels, parameter)
        return (
            None if learned is None else learned(padded),
            [block.modulate(embedded, temb) for block in self._blocks],
            [self._level(1 - step / self.action_steps, parameter) for step in range(self.action_steps)],
        )

    @torch.no_grad()
    def update(self, weights: WAM) -> None:
        """Copy the weights of another WAM of the same config in place, so that compiled graphs stay valid.

        Call it only between two answers, in the thread that computes them.
        """
        for name, value in weights.state_dict().items():
            self.model.get_parameter(name).copy_(value)
        channels, *grid = self.model.config.latent_shape
        padded = self.model.video_dit.pad(self._mask.expand(1, channels, *grid), self._mask)
        constants = tree_leaves((self._positions, self._modulation, self._levels))
        for old, new in zip(constants, tree_leaves(self._constants(padded)), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    @torch.no_grad()
    def instruction(self, tokens: Float[Tensor, "L E"]) -> tuple[KeysValues, ...]:
        """Compute an instruction's keys and values in each video block that runs, (1, heads, L, head width) each."""
        text = self.model.video_dit.project_text(tokens[None])
        return tuple(block.text_keys_values(text) for block in self._blocks)

    def condition(
        self,
        observation_latent: Float[Tensor, "B C 1 h w"],
        noise: Float[Tensor, "B C T h w"],
        instructions: Sequence[tuple[KeysValues, ...]],
    ) -> dict[int, Float[Tensor, "P T H W D"]]:
        """Run the conditioning pass and return the bridged layers' hidden states (Eqs. 16, 19).

        P is B, or `padded_size(B)` with `compiled`.
        """
        size = padded_size(len(noise)) if self.compiled else len(noise)
        rows = [*instructions, *[instructions[-1]] * (size - len(instructions))]
        text = tuple(_joined([row[index] for row in rows]) for index in range(len(self._blocks)))
        return self._parts["condition"](_padded(observation_latent, size), _padded(noise, size), text)

    def _condition(
        self, observation_latent: Tensor, noise: Tensor, text: Sequence[KeysValues]
    ) -> dict[int, Float[Tensor, "P T H W D"]]:
        latents = torch.cat([observation_latent, noise[:, :, 1:]], dim=2)
        x, grid = self.model.video_dit.patchify(
            self.model.video_dit.pad(latents, self._mask.expand(len(latents), -1, -1, -1, -1))
        )
        hidden = {}
        for index, (block, keys_values, modulation) in enumerate(
            zip(self._blocks, text, self._modulation, strict=True)
        ):
            x = block.run(x, keys_values, modulation, self._rope, self._positions)
            if index in self.model.bridged_layers:
                hidden[index] = x.unflatten(2, grid[1:])
        return hidden

    def begin(self) -> None:
        """Begin a new answer: the compiled parts may overwrite the results of the last one.

        Before `compile` this does nothing. Below torch 2.13 the first mark of a process ties CUDA graphs to its thread,
        and a server tests a policy in another thread than it compiles in.
        """
        if self._runs_compiled:
            torch.compiler.cudagraph_mark_step_begin()

    def guide(self, hidden: Mapping[int, Float[Tensor, "P T H W D"]]) -> tuple[Float[Tensor, "P N D"], ...]:
        """Return the guidance of every cross-attention block (Eqs. 15, 17, 20)."""
        return self._parts["guide"](hidden)

    def _guide(self, hidden: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        return self.model.bridge(hidden, pool_future=self.pool_future)

    def act(
        self,
        guidance: Sequence[Float[Tensor, "P N D"]],
        state: Float[Tensor, "B S"],
        embodiment: Int[Tensor, "B"],
        noise: Float[Tensor, "B K D"],
        *,
        continuation: tuple[Float[Tensor, "B K D"], Float[Tensor, "B K D"]] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Run `WAM.act` in `action_steps` steps. A `continuation` needs gradients, so it always runs uncompiled."""
        count, size = len(noise), len(guidance[0])
        if continuation is None:
            arguments = (_padded(state, size), _padded(embodiment, size), _padded(noise, size))
            return self._parts["act"](guidance, *arguments)[:count]
        previous, weights = continuation
        steps = self._steps([rows[:count] for rows in guidance], state, embodiment)
        return euler([continue_chunk(step, previous, weights) for step in steps], noise, self.action_steps)

    def _act(self, guidance: Sequence[Tensor], state: Tensor, embodiment: Tensor, noise: Tensor) -> Tensor:
        return euler(self._steps(guidance, state, embodiment), noise, self.action_steps)

    def _steps(self, guidance: Sequence[Tensor], state: Tensor, embodiment: Tensor) -> list[Predict]:
        """Return the velocity function of each Euler step, with the step's constants."""
        head = self.model.action_dit
        # Each block has its own keys and values, also where several blocks read one layer.
        keys_values = [
            block.attn.keys_values(guidance[index // 2]) if head.reads_guidance(index) else None
            for index, block in enumerate(self._head_blocks)
        ]
        before = head.encode_state(state, embodiment)

        def predict(constants: _Level, actions: Tensor, noise_level: Tensor) -> Tensor:
            time = constants.features.expand(len(actions), -1)
            x = head.join(before, head.encode_actions(actions, time, embodiment))
            for block, context, modulation in zip(self._head_blocks, keys_values, constants.modulation, strict=True):
                x = block.run(x, context, modulation)
            return head.project(x, constants.modulation_out, actions.shape[1], embodiment)

        return [partial(predict, constants) for constants in self._levels]

    def _level(self, noise_level: float, like: Tensor) -> _Level:
        head = self.model.action_dit
        bucket = head.bucket(torch.tensor([noise_level], device=like.device))
        time = head.embed_time(bucket, like.dtype)
        return _Level(
            features=head.action_encoder.time_features(bucket),
            modulation=tuple(block.modulate(time) for block in self._head_blocks),
            modulation_out=head.modulate_out(time),
        )


def _joined(rows: Sequence[KeysValues]) -> KeysValues:
    """Concatenate the keys and values of several samples into one batch."""
    if len(rows) == 1:
        return rows[0]
    return torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])


def _padded(rows: Tensor, size: int) -> Tensor:
    """Repeat the last of `rows` until there are `size`."""
    missing = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
