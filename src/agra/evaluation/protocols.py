"""The protocol of an evaluation and its trial lists. Success rates are comparable only under the same protocol."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agra.types import Simulator, Trial

TRIALS_PER_REGIME = {"in_distribution": 50, "semantic": 40, "instance": 50, "attribute": 40}
"""The paper's counts (C.2.2)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules of a trial.

    With `termination` "step", a trial ends at the first control step that succeeds. With "chunk", success is checked
    only after the last executed step of each chunk, as in the RoboCasa evaluation of GR00T N1.5 and DIAL: a success
    that passes within a chunk does not count.
    """

    execute_steps: int = 16  # executed actions of each chunk
    max_steps: int | None = None  # control steps; None takes the simulator's limit
    termination: Literal["step", "chunk"] = "step"

    def __post_init__(self) -> None:
        if self.execute_steps < 1:
            raise ValueError(f"Protocol.execute_steps: expected at least 1, got {self.execute_steps}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"Protocol.max_steps: expected at least 1 or None, got {self.max_steps}")
        if self.termination not in ("step", "chunk"):
            raise ValueError(f"Protocol.termination: expected 'step' or 'chunk', got {self.termination!r}")


def default_protocol(simulator: str) -> Protocol:
    """The usual protocol of a simulator's published evaluations.

    On RoboCasa GR1 it is that of GR00T N1.5, DIAL and DiT4DiT: 16 executed actions, success at the end of a chunk. The
    paper states neither.
    """
    if simulator == "robocasa_gr1":
        return Protocol(execute_steps=16, termination="chunk")
    return Protocol(execute_steps=8)


def regime_trials(
    simulator: Simulator, regimes: Sequence[str] | None = None, *, limit: int | None = None
) -> tuple[Trial, ...]:
    """The trials of `regimes`, by default of all regimes of the simulator, in order.

    `limit` takes that many trials of each regime, evenly spread over its list. The subset depends on the list and
    `limit` alone, and the results' header records both counts. Raises ValueError for an unknown regime, an empty list,
    a repeated name, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 trial per regime, got {limit}")
    chosen: list[Trial] = []
    for regime in simulator.regimes if regimes is None else regimes:
        if regime not in simulator.regimes:
            raise ValueError(f"unknown regime {regime!r}; available: {', '.join(simulator.regimes)}")
        full = simulator.trials(regime)
        if not full:
            raise ValueError(f"{simulator.embodiment.name}: the simulator has no trials of regime {regime!r}")
        count = len(full) if limit is None else min(limit, len(full))
        chosen += [full[index * len(full) // count] for index in range(count)]
    repeated = [name for name, number in Counter(trial.name for trial in chosen).items() if number > 1]
    if repeated:
        raise ValueError(f"trial names must be unique, {min(repeated)!r} occurs more than once")
    return tuple(chosen)
