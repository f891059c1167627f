"""Results files and what may be said from them.

A results file is JSON lines: a header with everything that defines the protocol, then one line a trial. Rates come
with Wilson intervals; two policies are compared on the same trials, by McNemar's exact test.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from scipy.stats import binomtest

from agra.types import REGIMES


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One finished trial; `steps` control steps, `calls` of the policy, times in seconds and milliseconds."""

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

    def same_outcome(self) -> dict[str, Any]:
        """Everything but the times and the video: what a repetition must reproduce."""
        return {k: v for k, v in asdict(self).items() if k not in ("wall_s", "policy_ms", "video")}


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
        """The regimes that occur, in the paper's order."""
        return tuple(name for name in REGIMES if self.regime(name))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (without continuity correction) of a success rate: (low, high)."""
    interval = binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


class McNemar(NamedTuple):
    """McNemar's exact test: the two-sided p-value and the four counts it rests on."""

    p_value: float
    only_a: int
    only_b: int
    both: int
    neither: int


def mcnemar(paired_a: Sequence[bool], paired_b: Sequence[bool]) -> McNemar:
    """Do two policies, tried on the same trials, succeed equally often? Exact binomial, two-sided.

    Only trials in which one succeeds and the other fails inform the test; without any, p is 1. Raises ValueError for
    sequences of different length.
    """
    a, b = np.asarray(paired_a, dtype=bool), np.asarray(paired_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"mcnemar: expected two equally long sequences, got shapes {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return McNemar(float(p_value), only_a, only_b, int((a & b).sum()), int((~a & ~b).sum()))


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
    return Summary(
        regime=regime,
        trials=len(trials),
        full=full,
        successes=successes,
        interval=wilson_interval(successes, len(trials)),
        progress={name: float(np.mean(values)) for name, values in reached.items()},
        median_policy_ms=float(np.median([trial.policy_ms["p50"] for trial in trials])),
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two policies on the same trials of one regime, or of all."""

    regime: str
    a: Summary
    b: Summary
    test: McNemar


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
    for key in ("simulator", "trials_sha256", *(() if across_protocols else ("protocol", "max_steps"))):
        if results_a.header[key] != results_b.header[key]:
            raise ValueError(f"{names}: {key} differs, {results_a.header[key]!r} and {results_b.header[key]!r}")
    by_name = {trial.trial: trial.success for trial in results_b.trials}
    if set(by_name) != {trial.trial for trial in results_a.trials}:
        raise ValueError(f"{names}: they finished different trials")
    pairs = []
    for a, b in zip(summarise(results_a), summarise(results_b), strict=True):
        trials = results_a.trials if a.regime == "all" else results_a.regime(a.regime)
        test = mcnemar([trial.success for trial in trials], [by_name[trial.trial] for trial in trials])
        pairs.append(Pair(regime=a.regime, a=a, b=b, test=test))
    return Comparison(name_a=results_a.policy, name_b=results_b.policy, pairs=tuple(pairs))


def summary_table(results: Results) -> Table:
    """A policy's figures for the terminal."""
    summaries = summarise(results)
    scores = list(dict.fromkeys(name for summary in summaries for name in summary.progress))
    table = _table(
        f"{results.policy} on {results.header['simulator']}",
        "trials",
        "success (95 %)",
        *(name.replace("_", " ") for name in scores),
        "ms/call",
    )
    for s in summaries:
        trials = f"{s.trials}" if s.trials == s.full else f"{s.trials} of {s.full}"
        reached = [f"{s.progress[name]:.0%}" if name in s.progress else "" for name in scores]
        table.add_row(s.regime, trials, _rate(s), *reached, f"{s.median_policy_ms:.1f}")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Two policies side by side for the terminal."""
    title = f"A: {comparison.name_a}   B: {comparison.name_b}"
    table = _table(title, "trials", "A (95 %)", "B (95 %)", "only A", "only B", "p")
    for pair in comparison.pairs:
        test = pair.test
        counts = (f"{test.only_a}", f"{test.only_b}", f"{test.p_value:.3f}")
        table.add_row(pair.regime, f"{pair.a.trials}", _rate(pair.a), _rate(pair.b), *counts)
    table.caption = "only A, only B: trials that one alone solved; p: McNemar's exact test"
    return table


def print_summary(results: Results) -> None:
    """Print `summary_table`."""
    _print(summary_table(results))


def print_comparison(comparison: Comparison) -> None:
    """Print `comparison_table`."""
    _print(comparison_table(comparison))


def _print(table: Table) -> None:
    """In full, also where the terminal is narrow or there is none: a cut figure is none."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, needed)).print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column("regime", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _rate(summary: Summary) -> str:
    low, high = summary.interval
    return f"{summary.rate:.0%} ({100 * low:.0f}-{100 * high:.0f})"
