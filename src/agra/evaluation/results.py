"""Results files and what may be said from them.

A results file is JSON lines: a header with everything that defines the protocol, then one line a trial. Rates come
with Wilson intervals, averages over tasks with an interval that draws tasks; two policies are compared on the same
trials, by McNemar's exact test and a paired bootstrap.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agra.evaluation.statistics import (
    MIN_CLUSTERS,
    Average,
    McNemar,
    clustered_bootstrap,
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One finished trial; `steps` control steps, `calls` of the policy, times in seconds and milliseconds.

    `digest` is a hash of every bit of the episode; files written before there was one have None. `failures` are the
    reasons of the attempts before, in which the simulator and not the policy broke down.
    """

    trial: str
    regime: str
    task: str
    seed: int
    instruction: str
    success: bool
    progress: Mapping[str, bool]
    steps: int
    calls: int
    wall_s: float
    policy_ms: Mapping[str, float]  # mean, p50 and p95 over the calls
    video: str | None = None  # relative to the results file
    digest: str | None = None
    failures: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", tuple(self.failures))

    def same_outcome(self) -> dict[str, Any]:
        """Everything but the times, the video and the simulator's failures: what a repetition must reproduce."""
        return {k: v for k, v in asdict(self).items() if k not in ("wall_s", "policy_ms", "video", "failures")}


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results file in memory."""

    header: Mapping[str, Any]
    trials: tuple[TrialResult, ...]

    @property
    def policy(self) -> str:
        """The evaluated policy's name."""
        return self.header["policy"]

    def regime(self, name: str) -> tuple[TrialResult, ...]:
        """The trials of one regime."""
        return tuple(trial for trial in self.trials if trial.regime == name)

    @property
    def regimes(self) -> tuple[str, ...]:
        """The regimes that occur, in the simulator's order."""
        return tuple(name for name in self.header["regimes"] if self.regime(name))


def read_results(path: str | Path, *, partial: bool = False) -> Results:
    """Read a results file. Raises ValueError, naming the line, for anything malformed.

    A file with a cut last line or missing trials is an interrupted evaluation: an error unless `partial`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no results here; make them with: agra evaluate")
    header, trials, cut = _parse(path)
    announced = header["num_trials"]
    if not partial and (cut or len(trials) != announced):
        raise ValueError(
            f"{path}: interrupted after {len(trials)} of {announced} trials; run the same agra evaluate again to finish"
        )
    return Results(header=header, trials=trials)


def _parse(path: Path) -> tuple[dict[str, Any], tuple[TrialResult, ...], bool]:
    """Header, trials, and whether the last line was cut off (it has no line end) and left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    *lines, rest = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append(record if number == 1 else TrialResult(**record))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a results line ({error})") from error
    if not records or not isinstance(records[0], dict) or "num_trials" not in records[0]:
        raise ValueError(f"{path}, line 1: expected the header of a results file; remove the file to start anew")
    names = [record.trial for record in records[1:]]
    for number, name in enumerate(names, start=2):
        if name in names[: number - 2]:
            raise ValueError(f"{path}, line {number}: trial {name!r} occurs twice")
    return records[0], tuple(records[1:]), bool(rest)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A policy's figures over one regime, or over all trials (regime "all")."""

    regime: str
    trials: int
    full: int  # trials of the regime's full list, of which `trials` were played
    successes: int
    interval: tuple[float, float]
    progress: Mapping[str, float]  # share of the trials that reached each partial score
    median_policy_ms: float
    tasks: int
    average: Average | None  # over tasks, with an interval that draws tasks; None where there are too few of them
    failures: int  # attempts in which the simulator broke down; each was played again

    @property
    def rate(self) -> float:
        """Successes per trial."""
        return self.successes / self.trials


def summarise(results: Results) -> tuple[Summary, ...]:
    """One summary a regime, and where there are several a last one over all trials."""
    groups = {name: results.regime(name) for name in results.regimes}
    full = {name: results.header["regimes"][name]["full"] for name in groups}
    if len(groups) > 1:
        groups["all"], full["all"] = results.trials, sum(full.values())
    return tuple(_summarise(name, trials, full[name]) for name, trials in groups.items())


def _summarise(regime: str, trials: tuple[TrialResult, ...], full: int) -> Summary:
    successes = sum(trial.success for trial in trials)
    scores = list(dict.fromkeys(name for trial in trials for name in trial.progress))
    reached = {name: [t.progress[name] for t in trials if name in t.progress] for name in scores}
    tasks = [trial.task for trial in trials]
    count = len(set(tasks))
    return Summary(
        regime=regime,
        trials=len(trials),
        full=full,
        successes=successes,
        interval=wilson_interval(successes, len(trials)),
        progress={name: float(np.mean(values)) for name, values in reached.items()},
        median_policy_ms=float(np.median([trial.policy_ms["p50"] for trial in trials])),
        tasks=count,
        average=clustered_bootstrap([t.success for t in trials], tasks) if count >= MIN_CLUSTERS else None,
        failures=sum(len(trial.failures) for trial in trials),
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two policies on the same trials of one regime, or of all."""

    regime: str
    a: Summary
    b: Summary
    test: McNemar
    difference: Average  # success rate of A minus that of B


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies side by side, one pair a regime and where there are several a last one over all trials."""

    name_a: str
    name_b: str
    pairs: tuple[Pair, ...]


def compare(results_a: Results, results_b: Results, *, across_protocols: bool = False) -> Comparison:
    """Pair two policies' trials by name, regime by regime.

    Raises ValueError where simulator or trial list differ, and where the protocol does unless `across_protocols` says
    that this is what is compared.
    """
    names = f"cannot compare {results_a.policy} with {results_b.policy}"
    for key in ("simulator", "trials_sha256", *(() if across_protocols else ("protocol", "max_steps", "settings"))):
        one, other = results_a.header.get(key), results_b.header.get(key)
        if one != other:
            raise ValueError(f"{names}: {key} differs, {one!r} and {other!r}")
    by_name = {trial.trial: trial.success for trial in results_b.trials}
    if set(by_name) != {trial.trial for trial in results_a.trials}:
        raise ValueError(f"{names}: they finished different trials")
    pairs = []
    for a, b in zip(summarise(results_a), summarise(results_b), strict=True):
        trials = results_a.trials if a.regime == "all" else results_a.regime(a.regime)
        outcomes = [trial.success for trial in trials], [by_name[trial.trial] for trial in trials]
        difference = paired_bootstrap(*outcomes, [trial.task for trial in trials])
        pairs.append(Pair(regime=a.regime, a=a, b=b, test=mcnemar(*outcomes), difference=difference))
    return Comparison(name_a=results_a.policy, name_b=results_b.policy, pairs=tuple(pairs))
