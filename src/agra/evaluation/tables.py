"""Results for the terminal: one policy, two on the same trials, and ours beside what others have published."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from agra.evaluation.published import Published, published
from agra.evaluation.results import Comparison, Results, Summary, summarise
from agra.evaluation.statistics import (
    minimum_detectable_effect,
    paired_minimum_detectable_effect,
    wilson_interval,
)


def summary_table(results: Results) -> Table:
    """A policy's figures: success with Wilson's interval, the average over tasks with one that draws tasks."""
    summaries = summarise(results)
    scores = list(dict.fromkeys(name for summary in summaries for name in summary.progress))
    averaged = any(s.average for s in summaries)
    table = _table(
        f"{results.policy} on {results.header['simulator']}",
        "regime",
        "trials",
        "success (95 %)",
        *(["tasks", "average over tasks (95 %)"] if averaged else []),
        *(name.replace("_", " ") for name in scores),
        "ms/call",
    )
    for s in summaries:
        trials = f"{s.trials}" if s.trials == s.full else f"{s.trials} of {s.full}"
        average = [f"{s.tasks}", _percent(*s.average[:3]) if s.average else ""] if averaged else []
        reached = [f"{s.progress[name]:.0%}" if name in s.progress else "" for name in scores]
        table.add_row(s.regime, trials, _rate(s), *average, *reached, f"{s.median_policy_ms:.1f}")
    last = summaries[-1]
    effect = minimum_detectable_effect(last.trials, last.rate)
    failures = f"; {last.failures} attempts in which the simulator broke down were played again" * bool(last.failures)
    table.caption = (
        f"on {last.trials} other trials another policy could not be told to be better{failures}"
        if math.isinf(effect)
        else f"another policy on {last.trials} other trials would have to be {_points(effect)} better to be told apart "
        f"(80 % power, 5 % level){failures}"
    )
    return table


def task_table(results: Results) -> Table:
    """Success counts per task, with Wilson's intervals."""
    table = _table(f"{results.policy} on {results.header['simulator']}, by task", "regime", "task", "success", "(95 %)")
    for regime in results.regimes:
        trials = results.regime(regime)
        for task in dict.fromkeys(trial.task for trial in trials):
            outcomes = [trial.success for trial in trials if trial.task == task]
            low, high = wilson_interval(sum(outcomes), len(outcomes))
            interval = f"{100 * low:.0f}-{100 * high:.0f}"
            table.add_row(regime, task, f"{sum(outcomes)} of {len(outcomes)}", interval)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Two policies side by side: difference with its paired interval, McNemar's test, what the trials could show."""
    title = f"A: {comparison.name_a}   B: {comparison.name_b}"
    table = _table(
        title, "regime", "trials", "A (95 %)", "B (95 %)", "A - B (95 %)", "only A", "only B", "p", "detectable"
    )
    for pair in comparison.pairs:
        test = pair.test
        counts = (f"{test.only_a}", f"{test.only_b}", f"{test.p_value:.3f}")
        effect = paired_minimum_detectable_effect(pair.a.trials, (test.only_a + test.only_b) / pair.a.trials)
        difference = "{:+.0f} ({:+.0f} to {:+.0f})".format(*(100 * value for value in pair.difference[:3]))
        table.add_row(
            pair.regime, f"{pair.a.trials}", _rate(pair.a), _rate(pair.b), difference, *counts, _points(effect)
        )
    unit = "tasks" if comparison.pairs[-1].difference.clusters == comparison.pairs[-1].a.tasks else "trials"
    table.caption = (
        f"A - B: points, paired bootstrap over {unit}; only A, only B: trials that one alone solved; p: McNemar's exact "
        "test; detectable: the difference that so many pairs, so often discordant, show with 80 % power"
    )
    return table


def leaderboard_table(results: Sequence[Results], benchmark: str) -> Table:
    """Published averages of a benchmark and ours, best first in each regime, with their protocols in words.

    Raises ValueError for an unknown benchmark, and for results of another.
    """
    rows = [(p.regime, p.average / 100, _published_row(p)) for p in published(benchmark)]
    for one in results:
        if one.header["simulator"] != benchmark:
            raise ValueError(f"{one.policy}: results of {one.header['simulator']}, the leaderboard is {benchmark}'s")
        rows += [(s.regime, s.rate, _our_row(one, s)) for s in summarise(one) if s.regime in one.regimes]
    order = list(dict.fromkeys(regime for regime, _, _ in rows))
    rows.sort(key=lambda row: (order.index(row[0]), -row[1]))
    table = _table(f"leaderboard of {benchmark}", "regime", "system", "average (95 %)", "episodes", "protocol")
    for column in (1, 4):
        table.columns[column].justify = "left"
    table.columns[4].no_wrap = False
    table.columns[4].max_width = 90
    for regime, _, row in rows:
        table.add_row(regime, *row)
    table.caption = (
        "* measured here; intervals of published rows are Wilson's over the episodes that their authors state, and leave "
        "out what other training runs would change. Rows of different protocols are not the same measurement."
    )
    return table


def print_table(table: Table) -> None:
    """In full, also where the terminal is narrow or there is none: a cut figure is none."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, needed)).print(table)


def _our_row(results: Results, summary: Summary) -> tuple[str, str, str, str]:
    header = results.header
    protocol = header["protocol"]
    words = [
        f"{protocol['execute_steps']} actions executed of each chunk",
        f"{header['max_steps']} steps at most",
        f"success looked for after each {protocol['termination']}",
        *(f"{key.replace('_', ' ')} {value}" for key, value in header.get("settings", {}).items()),
    ]
    if summary.trials != summary.full:
        words.append(f"{summary.trials} of the {summary.full} trials of the full list")
    average = _rate(summary) if summary.average is None else _percent(*summary.average[:3])
    return f"* {results.policy}", average, f"{summary.tasks} tasks, {summary.trials} in all", "; ".join(words)


def _published_row(row: Published) -> tuple[str, str, str, str]:
    trials = row.tasks * row.episodes if row.episodes else None
    if trials is None:
        return row.system, f"{row.average:.1f} %", f"{row.tasks} tasks", f"{row.protocol} ({row.source})"
    low, high = wilson_interval(round(row.average / 100 * trials), trials)
    average = f"{row.average:.1f} % ({100 * low:.0f}-{100 * high:.0f})"
    return row.system, average, f"{row.tasks} x {row.episodes}", f"{row.protocol} ({row.source})"


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _rate(summary: Summary) -> str:
    return _percent(summary.rate, *summary.interval)


def _percent(value: float, low: float, high: float) -> str:
    return f"{value:.0%} ({100 * low:.0f}-{100 * high:.0f})"


def _points(effect: float) -> str:
    return "none" if math.isinf(effect) else f"{100 * effect:.0f} points"
