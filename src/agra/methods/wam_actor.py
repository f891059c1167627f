"""Actors of a WAM: the forward passes of training, and the fast path that computes nothing twice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Float
from torch import Tensor

from agra.batch import PolicyInputs
from agra.methods.method import Actor, Continuation, Lap, Method, Noise, PlainActor
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
    """Make the actor of a policy. Raises ValueError for an option of the fast path without `fast`."""
    if fast:
        return FastActor(
            FastWAM(method.wam, action_steps=action_steps or 4, pool_future=pool_future, compiled=compiled)
        )
    if compiled or pool_future != 1:
        raise ValueError("the options compiled and pool_future need the fast path; leave out fast=False")
    return TrainingActor(method, steps=action_steps)


class TrainingActor(PlainActor):
    """The forward passes of training, timed stage by stage."""

    def act(
        self,
        inputs: PolicyInputs,
        noise: Noise,
        instructions: Sequence[Any],
        *,
        continuation: Continuation | None = None,
        lap: Lap = lambda stage: None,
    ) -> Float[Tensor, "B K D"]:
        """Run `WAMMethod.act` stage by stage."""
        method = cast("WAMMethod", self.method)
        wam, hidden = method.wam, method.hidden(inputs, noise)
        lap("video")
        guidance = wam.guide(hidden)
        lap("bridge")
        head = (guidance, inputs.state, inputs.embodiment, noise["action"])
        actions = wam.act(*head, steps=self.steps or 4, continuation=continuation)
        lap("action")
        return actions


class FastActor:
    """The fast path (`agra.wam.fast`)."""

    def __init__(self, fast: FastWAM) -> None:
        self.fast, self.compiled = fast, fast.compiled

    def prepare_instruction(self, tokens: Float[Tensor, "L E"]) -> tuple[KeysValues, ...]:
        """Compute the instruction's keys and values in every video block."""
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
        """Compute the actions of the training path, up to rounding."""
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
        """Copy the other WAM's weights. Compiled graphs stay valid."""
        self.fast.update(cast("WAMMethod", weights).wam)

    def compile(self) -> None:
        """Compile the three parts."""
        self.fast.compile()

    def batch_sizes(self, max_batch: int) -> list[int]:
        """List the padded sizes of compiled batches (`agra.wam.fast.padded_size`)."""
        if not self.compiled:
            return [1]
        return sorted({padded_size(count) for count in range(1, max_batch + 1)})
