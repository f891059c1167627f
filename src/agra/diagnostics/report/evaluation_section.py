"""The report's evaluation section (C.2.2): success and partial scores by regime, and the paired comparison."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from agra.diagnostics.report.comparison_table import (
    MISSING,
    Cell,
    Table,
    TableRow,
    between,
    mcnemar_cell,
    noting_starts,
    number,
    percent,
)
from agra.diagnostics.report.figures import Interval, interval_chart
from agra.evaluation.results import NO_NOISE, Results, TrialResult, summarise
from agra.evaluation.statistics import mcnemar, wilson_interval

ResultsColumn = tuple[int, str, Results | None]
"""A policy's number, name and results."""

Judge = Callable[[TrialResult], bool | None]
"""Whether a trial counts. None if its task does not have the score."""

SHARED_HEADER = ("simulator", "trials_sha256", "protocol", "max_steps")


def evaluation_section(columns: Sequence[ResultsColumn]) -> dict[str, Any] | None:
    """Tables and charts of the evaluation. None if no policy was evaluated."""
    evaluated = [(i, name, r) for i, name, r in columns if r is not None]
    if not evaluated:
        return None
    regimes = list(dict.fromkeys(regime for _, _, r in evaluated for regime in r.regimes))
    groups = [*regimes, "all"] if len(regimes) > 1 else regimes
    scores = list(dict.fromkeys(score for _, _, r in evaluated for trial in r.trials for score in trial.progress))
    progress = [
        _row(columns, regime, _reached(score), f"{regime_words(regime)}: {regime_words(score)}")
        for regime in groups
        for score in scores
    ]
    return {
        "intro": _intro(evaluated),
        "success": Table(
            corner="success", rows=[_row(columns, r, lambda t: t.success, regime_words(r)) for r in groups]
        ),
        "progress": Table(corner="partial score", rows=progress),
        "chart": interval_chart(
            [(regime_words(regime), _dots(evaluated, regime, lambda t: t.success)) for regime in groups],
            title="Success by regime",
            limits=(0.0, 1.0),
            percent=True,
        ),
        "progress_chart": interval_chart(
            [(regime_words(score), _dots(evaluated, "all", _reached(score))) for score in scores],
            title="Partial scores",
            limits=(0.0, 1.0),
            percent=True,
        )
        if scores
        else None,
        "note": _note(evaluated),
    }


def regime_words(name: str) -> str:
    """A regime's or a score's name in words. `all` stands for all regimes."""
    return "all regimes" if name == "all" else name.replace("_", " ")


def _reached(score: str) -> Judge:
    return lambda trial: trial.progress.get(score)


def _outcomes(results: Results, regime: str, judge: Judge) -> dict[str, bool]:
    """Trial name to outcome, for one regime or for all."""
    trials = results.trials if regime == "all" else results.regime(regime)
    return {trial.trial: bool(judged) for trial in trials if (judged := judge(trial)) is not None}


def _row(columns: Sequence[ResultsColumn], regime: str, judge: Judge, label: str) -> TableRow:
    outcomes = [None if r is None else _outcomes(r, regime, judge) for _, _, r in columns]

    @cache
    def verdict(place: int, other: int) -> Cell:
        (_, name, ours), (_, reference_name, reference) = columns[place], columns[other]
        a, b = outcomes[place], outcomes[other]
        if ours is None or reference is None or a is None or b is None:
            return Cell(text="not comparable: not evaluated")
        differing = [
            key.removesuffix("_sha256") for key in SHARED_HEADER if ours.header.get(key) != reference.header.get(key)
        ]
        if differing or set(a) != set(b):
            return Cell(text=f"not comparable: {', '.join(differing) or 'the finished trials'} differ")
        test = mcnemar([a[key] for key in a], [b[key] for key in a])
        return mcnemar_cell(test.only_a, test.only_b, test.p_value, len(a), name=name, reference=reference_name)

    row = TableRow(label=label, cells=[_rate(by_trial) for by_trial in outcomes], verdict=verdict)
    return noting_starts(row, [None if r is None else r.start for _, _, r in columns])


def _rate(outcomes: dict[str, bool] | None) -> Cell:
    if not outcomes:
        return MISSING
    count, total = sum(outcomes.values()), len(outcomes)
    return Cell(
        text=f"{percent(count / total)} ({count}/{total})", range=between(*wilson_interval(count, total), percent)
    )


def _dots(evaluated: Sequence[tuple[int, str, Results]], regime: str, judge: Judge) -> list[Interval]:
    dots = []
    for index, name, results in evaluated:
        outcomes = _outcomes(results, regime, judge)
        if outcomes:
            count, total = sum(outcomes.values()), len(outcomes)
            low, high = wilson_interval(count, total)
            dots.append(
                Interval(label=f"{name}: {count}/{total}", index=index, value=count / total, low=low, high=high)
            )
    return dots


def _intro(evaluated: Sequence[tuple[int, str, Results]]) -> str:
    header = evaluated[0][2].header
    total = sum(int(regime["full"]) for regime in header["regimes"].values())
    played = len(evaluated[0][2].trials)
    part = "" if played == total else f", evenly spread over the {total} of the full lists"
    starts = {name: results.start for _, name, results in evaluated if results.start != NO_NOISE}
    if len(set(starts.values())) == 1:
        started = f"Answers start from {next(iter(starts.values()))}."
    elif not starts:
        started = ""
    else:
        named = ", ".join(f"{name} from {start}" for name, start in starts.items())
        started = f"Answers start from different noise, which alone changes success: {named}."
    return (
        f"{played} trials in {header['simulator']}{part}. Every policy gets the same scenes, instructions and seeds. "
        "Intervals are Wilson's. Policies are compared on the same trials by McNemar's exact test, which uses only the "
        f"trials that exactly one of the two solved. {started}".rstrip()
    )


def _note(evaluated: Sequence[tuple[int, str, Results]]) -> str:
    calls = [f"{name} {number(summarise(results)[-1].median_policy_ms)} ms" for _, name, results in evaluated]
    return f"Median time of a policy call on the machine that ran the evaluation: {', '.join(calls)}."
