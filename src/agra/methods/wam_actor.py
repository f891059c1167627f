"""A WAM's two ways to act: as in training, and with nothing computed twice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from agra.batch import PolicyInputs
from agra.methods.method import Actor, Continuation, Lap, Method, Noise
from agra.wam.fast import FastWAM, KeysValues, padded_size

if TYPE_CHECKING:
    from agra.methods.wam import WAMMethod


def make_actor(
    method: "WAMMethod",
    *,
    fast: bool = True,
    action_steps: int | None = None,
    pool_future: int = 1,
    compiled: bool = False,
) -> Actor:
    """Raises ValueError where an option of the fast path is given without it."""
    if fast:
        return FastActor(
            FastWAM(method.wam, action_steps=action_steps or 4, pool_future=pool_future, compiled=compiled)
        )
    if compiled or pool_future != 1:
        raise ValueError("compiled and pool_future belong to the fast path")
    return TrainingActor(method, action_steps or 4)


class TrainingActor:
    """The forwards of training."""

    compiled = False

    def __init__(self, method: "WAMMethod", steps: int) -> None:
        self.method, self.steps = method, steps

    def prepare_instruction(self, tokens: Float[Tensor, "L E"]) -> None:
        """Nothing: the video pass reads the tokens."""

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        instructions: Sequence[None],
        *,
        continuation: Continuation | None = None,
        lap: Lap = lambda stage: None,
    ) -> Float[Tensor, "B K D"]:
        """`WAMMethod.act`, stage by stage."""
        wam = self.method.wam
        hidden = self.method.hidden(inputs, noise)
        lap("video")
        guidance = wam.guide(hidden)
        lap("bridge")
        head = (guidance, inputs.state, inputs.embodiment, noise["action"])
        actions = wam.act(*head, steps=self.steps, continuation=continuation)
        lap("action")
        return actions

    @torch.no_grad()
    def update(self, weights: Method) -> None:
        """Copy the other method's parameters."""
        self.method.load_state_dict(weights.state_dict())

    def compile(self) -> None:
        """Nothing."""

    def batch_sizes(self, max_batch: int) -> list[int]:
        """One of any size stands for all."""
        return [1]


class FastActor:
    """`agra.wam.fast`."""

    def __init__(self, fast: FastWAM) -> None:
        self.fast, self.compiled = fast, fast.compiled

    def prepare_instruction(self, tokens: Float[Tensor, "L E"]) -> tuple[KeysValues, ...]:
        """The instruction's keys and values in every video block."""
        return self.fast.instruction(tokens)

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        instructions: Sequence[tuple[KeysValues, ...]],
        *,
        continuation: Continuation | None = None,
        lap: Lap = lambda stage: None,
    ) -> Float[Tensor, "B K D"]:
        """The same answer up to rounding."""
        assert inputs.latents is not None
        self.fast.begin()
        hidden = self.fast.condition(inputs.latents, noise["video"], instructions)
        lap("video")
        guidance = self.fast.guide(hidden)
        lap("bridge")
        actions = self.fast.act(guidance, inputs.state, inputs.embodiment, noise["action"], continuation=continuation)
        lap("action")
        return actions

    def update(self, weights: Method) -> None:
        """Copy the other WAM's weights without invalidating compiled graphs."""
        self.fast.update(cast("WAMMethod", weights).wam)

    def compile(self) -> None:
        """Compile the three parts."""
        self.fast.compile()

    def batch_sizes(self, max_batch: int) -> list[int]:
        """The padded sizes of compiled answers (`agra.wam.fast.padded_size`)."""
        if not self.compiled:
            return [1]
        return sorted({padded_size(count) for count in range(1, max_batch + 1)})
