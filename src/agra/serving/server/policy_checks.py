"""Checks of a policy and of its inputs and outputs: a trial answer, the range of the training data, missing past
observations, finite numbers.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from agra.serving.protocol.messages import FRAME_SIDES, InferRequest
from agra.serving.protocol.validation import RequestError
from agra.types import (
    ActionChunk,
    BatchPolicy,
    EmbodimentSpec,
    KnowsInstructions,
    KnowsRanges,
    LendsEncoder,
    Observation,
    PolicyRequest,
    PolicySpec,
)

log = logging.getLogger("agra.serving")


class NotFinite(ArithmeticError):
    """A chunk with a NaN or an infinity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedRange:
    """Smallest and largest value of each dimension in the training data, each (D,)."""

    low: np.ndarray
    high: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        """(D,) float32."""
        return ((self.low + self.high) / 2).astype(np.float32)

    def check(self, key: str, values: np.ndarray, stretch: float) -> None:
        """Raise RequestError for `values` (..., D) more than `stretch` widths outside the range.

        Dimensions that are constant in the training data are not checked.
        """
        width = self.high - self.low
        excess = np.maximum(values - self.high, self.low - values)
        outside = np.argwhere((excess > stretch * width) & (width > 0))
        if len(outside):
            index, dimension = tuple(outside[0]), outside[0][-1]
            raise RequestError(
                f"{key}: {values[index]:g} in dimension {dimension} is more than {stretch:g} widths outside the range "
                f"of the training data, {self.low[dimension]:g} to {self.high[dimension]:g}; check units and order, or "
                "start the server with a larger --input-stretch"
            )


def trained_ranges(policy: BatchPolicy) -> Mapping[str, Mapping[str, TrainedRange]]:
    """Return the ranges of "state" and "action" for each embodiment, or an empty map for a policy without
    statistics.
    """
    if not isinstance(policy, KnowsRanges):
        return {}
    return {
        name: {
            quantity: TrainedRange(low=np.asarray(values["min"]), high=np.asarray(values["max"]))
            for quantity, values in (("state", stats.state), ("action", stats.action))
        }
        for name, stats in policy.stats.items()
    }


def check_range(request: InferRequest, ranges: Mapping[str, Mapping[str, TrainedRange]], stretch: float) -> None:
    """Raise RequestError for states, present or past, or a continuation far outside the training data.

    `ranges` are those of `trained_ranges`. An embodiment without them is not checked.
    """
    trained = ranges.get(request.observation.embodiment)
    if trained is None:
        return
    trained["state"].check("state", request.observation.state, stretch)
    for moment in request.observation.past:
        trained["state"].check("past_state", moment.state, stretch)
    if request.continuation is not None:
        trained["action"].check("continuation", request.continuation.actions, stretch)


def warn_without_past(request: InferRequest, spec: PolicySpec, logged: set[str]) -> None:
    """Log a warning for a request without the past observations that the policy reads.

    For a request after the first of its episode, because the first observation has no past. `logged` holds the warnings
    of this connection, so that each is logged once.
    """
    if not spec.past or request.observation.past or "past" in logged:
        return
    logged.add("past")
    log.warning(
        "policy %s reads past observations (control steps %s), which a client does not send; the present observation "
        "stands for them",
        spec.name,
        ", ".join(map(str, spec.past)),
    )


def check_finite(chunk: ActionChunk) -> None:
    """Raise NotFinite for a chunk with a NaN or an infinity."""
    if not np.isfinite(chunk.actions).all():
        step, dimension = np.argwhere(~np.isfinite(chunk.actions))[0]
        raise NotFinite(f"the answer is {chunk.actions[step, dimension]} in step {step}, dimension {dimension}")


def check_policy(policy: BatchPolicy, serving: BatchPolicy | None = None) -> None:
    """Run a policy on a blank observation of each embodiment. The one that is `serving` lends it its text encoder.

    Raises ValueError for a chunk of the wrong shape or with numbers that are not finite, and any error of the policy.
    """
    if isinstance(serving, LendsEncoder):
        serving.lend_encoder(policy)
    spec, ranges = policy.spec, trained_ranges(policy)
    if not spec.embodiments:
        raise ValueError(f"policy {spec.name}: expected at least one embodiment, got none")
    for name, robot in spec.embodiments.items():
        state = ranges[name]["state"].middle if name in ranges else np.zeros(robot.state_dim, np.float32)
        chunk = _act_on_blank_frames(policy, name, robot, state)
        if chunk.actions.shape != (spec.horizon, robot.action_dim):
            raise ValueError(
                f"policy {spec.name}: expected a chunk of {(spec.horizon, robot.action_dim)} for {name}, got "
                f"{chunk.actions.shape}"
            )
        try:
            check_finite(chunk)
        except NotFinite as error:
            raise ValueError(f"policy {spec.name}, embodiment {name}: {error}") from error


def _act_on_blank_frames(policy: BatchPolicy, embodiment: str, robot: EmbodimentSpec, state: np.ndarray) -> ActionChunk:
    """Run a policy on a black frame of each camera.

    Without recorded sizes they have the model's size, doubled until it is large enough for the policy's crop.
    """
    instructions = policy.instructions if isinstance(policy, KnowsInstructions) else None
    instruction = next(iter(instructions.known), "wait") if instructions is not None else "wait"
    sizes = robot.recorded_sizes or (policy.spec.frame_size,) * (1 + len(robot.views))
    while True:
        frame, *others = (np.zeros((*size, 3), np.uint8) for size in sizes)
        observation = Observation(
            frame=frame,
            views=dict(zip(robot.views, others, strict=True)),
            state=state,
            instruction=instruction,
            embodiment=embodiment,
        )
        try:
            return policy.act_batch([PolicyRequest(observation=observation, episode=policy.episode(0))])[0]
        except ValueError:
            sizes = [(2 * height, 2 * width) for height, width in sizes]
            if robot.recorded_sizes or max(map(max, sizes)) > FRAME_SIDES[1]:
                raise
