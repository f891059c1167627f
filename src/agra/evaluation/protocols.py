"""How trials are played and counted: what has to be the same before two success rates may be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agra.types import Simulator, Trial

TRIALS_PER_REGIME = {"in_distribution": 50, "semantic": 40, "instance": 50, "attribute": 40}
"""The paper's counts, C.2.2."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one trial is played.

    `termination` says where success is looked for: "step" ends the trial at the first control step that succeeds;
    "chunk" looks only after the last executed step of each chunk, as GR00T N1.5's and DIAL's RoboCasa evaluation does,
    so that a success that passes within a chunk does not count.
    """

    execute_steps: int = 16  # actions executed of each chunk; the paper is silent, this is GR00T N1.5's number
    max_steps: int | None = None  # control steps; None: the simulator's own limit
    termination: Literal["step", "chunk"] = "step"

    def __post_init__(self) -> None:
        if self.execute_steps < 1:
            raise ValueError(f"Protocol.execute_steps: expected at least 1, got {self.execute_steps}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"Protocol.max_steps: expected at least 1 or None, got {self.max_steps}")
        if self.termination not in ("step", "chunk"):
            raise ValueError(f"Protocol.termination: expected 'step' or 'chunk', got {self.termination!r}")


def regime_trials(
    simulator: Simulator, regimes: Sequence[str] | None = None, *, limit: int | None = None
) -> tuple[Trial, ...]:
    """The trials of `regimes`, by default all of the simulator's, in order.

    `limit` takes that many of each regime, evenly spread over its list.

    The subset depends on nothing but the list and `limit`; `evaluate` writes both counts into the results' header.
    Raises ValueError for an unknown regime, an empty list, a name that occurs twice, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 trial a regime, got {limit}")
    chosen: list[Trial] = []
    for regime in simulator.regimes if regimes is None else regimes:
        if regime not in simulator.regimes:
            raise ValueError(f"unknown regime {regime!r}; there are {', '.join(simulator.regimes)}")
        full = simulator.trials(regime)
        if not full:
            raise ValueError(f"{simulator.embodiment.name}: the simulator has no trials of regime {regime!r}")
        count = len(full) if limit is None else min(limit, len(full))
        chosen += [full[index * len(full) // count] for index in range(count)]
    names = [trial.name for trial in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"trial names must be unique, {twice[0]!r} occurs more than once")
    return tuple(chosen)
