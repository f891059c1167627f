"""Sanity of a policy and of what goes in and out of it: an answer to a made-up observation, trained ranges, finite numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from agra.serving.protocol.messages import FRAME_SIDES, RequestError
from agra.types import ActionChunk, BatchPolicy, KnowsInstructions, KnowsRanges, Observation, PolicyRequest


class NotFinite(ArithmeticError):
    """An answer with a NaN or an infinity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedRange:
    """The smallest and largest value of every dimension in the training data, each (D,)."""

    low: np.ndarray
    high: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        """(D,) float32."""
        return ((self.low + self.high) / 2).astype(np.float32)

    def check(self, key: str, values: np.ndarray, stretch: float) -> None:
        """Raise RequestError where `values` (..., D) lie more than `stretch` widths outside; constants are not checked."""
        width = self.high - self.low
        beyond = np.maximum(values - self.high, self.low - values) > stretch * width
        odd = np.argwhere(beyond & (width > 0))
        if len(odd):
            where, dimension = tuple(odd[0]), odd[0][-1]
            raise RequestError(
                f"{key}: {values[where]:g} in dimension {dimension} is more than {stretch:g} widths outside the range of "
                f"the training data, {self.low[dimension]:g} to {self.high[dimension]:g}; check units and order, or start "
                "the server with a larger --input-stretch"
            )


def trained_ranges(policy: BatchPolicy) -> Mapping[str, Mapping[str, TrainedRange]]:
    """Embodiment to the ranges of "state" and "action"; none where the policy does not know them."""
    if not isinstance(policy, KnowsRanges):
        return {}
    return {
        name: {
            quantity: TrainedRange(low=np.asarray(values["min"]), high=np.asarray(values["max"]))
            for quantity, values in (("state", stats.state), ("action", stats.action))
        }
        for name, stats in policy.stats.items()
    }


def check_answer(chunk: ActionChunk) -> None:
    """Raise NotFinite for an action that is no number."""
    if not np.isfinite(chunk.actions).all():
        step, dimension = np.argwhere(~np.isfinite(chunk.actions))[0]
        raise NotFinite(f"the answer is {chunk.actions[step, dimension]} in step {step}, dimension {dimension}")


def try_out(policy: BatchPolicy) -> None:
    """Have a policy answer one observation of each embodiment. Raises ValueError for an answer of the wrong shape, or not
    finite, and whatever the policy raises."""
    spec, ranges = policy.spec, trained_ranges(policy)
    if not spec.embodiments:
        raise ValueError(f"policy {spec.name}: it knows no embodiment")
    for name, robot in spec.embodiments.items():
        state = ranges[name]["state"].middle if name in ranges else np.zeros(robot.state_dim, np.float32)
        chunk = _answer(policy, name, state)
        if chunk.actions.shape != (spec.horizon, robot.action_dim):
            raise ValueError(
                f"policy {spec.name}: expected a chunk of {(spec.horizon, robot.action_dim)} for {name}, got "
                f"{chunk.actions.shape}"
            )
        try:
            check_answer(chunk)
        except NotFinite as error:
            raise ValueError(f"policy {spec.name}, embodiment {name}: {error}") from error


def _answer(policy: BatchPolicy, embodiment: str, state: np.ndarray) -> ActionChunk:
    """The answer to a black frame, of the model's size or as large as the policy's crop demands."""
    instructions = policy.instructions if isinstance(policy, KnowsInstructions) else None
    instruction = next(iter(instructions.known), "wait") if instructions is not None else "wait"
    height, width = policy.spec.frame_size
    while True:
        frame = np.zeros((height, width, 3), np.uint8)
        seen = Observation(frame=frame, state=state, instruction=instruction, embodiment=embodiment)
        try:
            return policy.act_batch([PolicyRequest(observation=seen, episode=policy.episode(0))])[0]
        except ValueError:
            height, width = 2 * height, 2 * width
            if max(height, width) > FRAME_SIDES[1]:
                raise
