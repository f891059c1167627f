"""The protocol of an evaluation, its trial lists, and their shards. Success rates are comparable only under the same
protocol.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from agra.types import Simulator, Trial

Item = TypeVar("Item")


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
    simulator: Simulator,
    regimes: Sequence[str] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
) -> tuple[Trial, ...]:
    """The trials of `regimes`, by default of all regimes of the simulator, in order.

    `tasks` keeps the trials of these tasks. `limit` takes that many trials of each regime, evenly spread over what is
    then its list. The subset depends on the list, `tasks` and `limit` alone, and the results' header records both
    counts. Raises ValueError for an unknown regime or task, an empty list, a repeated name, or a limit below 1.
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
        if tasks is not None:
            known = dict.fromkeys(trial.task for trial in full)
            if unknown := [task for task in tasks if task not in known]:
                raise ValueError(f"unknown task {unknown[0]!r} of regime {regime!r}; available: {', '.join(known)}")
            full = [trial for trial in full if trial.task in tasks]
        count = len(full) if limit is None else min(limit, len(full))
        chosen += [full[index * len(full) // count] for index in range(count)]
    repeated = [name for name, number in Counter(trial.name for trial in chosen).items() if number > 1]
    if repeated:
        raise ValueError(f"trial names must be unique, {min(repeated)!r} occurs more than once")
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index`, from 0, of `count`: every `count`-th item from number `index` on."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard: expected I/N with I from 0 to N - 1, got {self.index}/{self.count}")

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The shard's items."""
        return items[self.index :: self.count]

    def path(self, output: Path) -> Path:
        """The shard's own output, such as results.shard-0-of-4.jsonl for results.jsonl."""
        return output.with_name(f"{output.stem}.shard-{self.index}-of-{self.count}{output.suffix}")


def parse_shard(text: str) -> Shard:
    """Read I/N, such as 0/4. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"shard: expected I/N, such as 0/4 for the first of four, got {text!r}")
    return Shard(index=int(match[1]), count=int(match[2]))


def shard_paths(output: Path) -> list[Path]:
    """The outputs of all shards of `output` that exist, in no particular order."""
    name = re.compile(rf"{re.escape(output.stem)}\.shard-\d+-of-\d+{re.escape(output.suffix)}")
    return [path for path in output.parent.glob("*.shard-*") if name.fullmatch(path.name)]
