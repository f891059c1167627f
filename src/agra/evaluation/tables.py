"""Tables for the terminal: one policy, two policies on the same trials, and a leaderboard with published results."""

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from agra.evaluation.measured import NOISES, MeasuredRow
from agra.evaluation.published import Published, published
from agra.evaluation.results import NO_NOISE, Comparison, Results, Summary, compare, summarise
from agra.evaluation.statistics import (
    Average,
    minimum_detectable_effect,
    p_text,
    paired_minimum_detectable_effect,
    wilson_interval,
)

AGREEING = "where tasks have one rate, the average's interval is Wilson's over tasks"
"""Note of a table with averages over tasks, whose intervals resample tasks where these differ."""


def summary_table(results: Results) -> Table:
    """A policy's figures: success with Wilson's interval, and averages over tasks and over groups of tasks.

    A shard without trials has a table without rows.
    """
    summaries = summarise(results)
    scores = list(dict.fromkeys(name for summary in summaries for name in summary.progress))
    averaged = any(s.average for s in summaries)
    grouped = any(s.group_average for s in summaries)
    table = _table(
        f"{results.policy} on {results.header['simulator']}",
        "regime",
        "trials",
        "success (95 %)",
        *(["tasks", "average over tasks (95 %)"] if averaged else []),
        *(["average over groups (95 %)"] if grouped else []),
        *(name.replace("_", " ") for name in scores),
        "ms/call",
    )
    for s in summaries:
        trials = f"{s.trials}" if s.trials == s.full else f"{s.trials} of {s.full}"
        average = [f"{s.tasks}", _average(s.average)] if averaged else []
        group_average = [_average(s.group_average)] if grouped else []
        progress = [f"{s.progress[name]:.0%}" if name in s.progress else "" for name in scores]
        table.add_row(s.regime, trials, _rate(s), *average, *group_average, *progress, f"{s.median_policy_ms:.1f}")
    if not summaries:
        table.caption = "no trials: there are more shards than trials"
        return table
    last = summaries[-1]
    effect = minimum_detectable_effect(last.trials, last.rate)
    detectable = "no improvement is" if math.isinf(effect) else f"an improvement of {_points(effect)} is"
    failures = f"; {last.failures} failures of the simulator, each trial repeated" * bool(last.failures)
    agreeing = f"; {AGREEING}" if averaged or grouped else ""
    table.caption = (
        f"{detectable} detectable with {last.trials} other trials (80 % power, 5 % level){failures}{agreeing}"
    )
    return table


def group_table(results: Results) -> Table | None:
    """Average over the tasks of each group of the benchmark. None for a benchmark without groups."""
    title = f"{results.policy} on {results.header['simulator']}, by group of tasks"
    table = _table(title, "regime", "group", "tasks", "trials", "average over tasks (95 %)")
    for summary in summarise(results):
        for group in summary.groups:
            average = _average(group.average) or f"{group.rate:.0%}"
            table.add_row(summary.regime, group.group, f"{group.tasks}", f"{group.trials}", average)
    table.caption = AGREEING
    return table if table.rows else None


def task_table(results: Results) -> Table:
    """Success counts by task, with Wilson's intervals."""
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
    """Two policies side by side: difference with its paired interval, McNemar's test, detectable difference."""
    start_a, start_b = comparison.start_a, comparison.start_b
    title = f"A: {comparison.name_a}, from {start_a}   B: {comparison.name_b}, from {start_b}"
    table = _table(
        title, "regime", "trials", "A (95 %)", "B (95 %)", "A - B (95 %)", "only A", "only B", "p", "detectable"
    )
    for pair in comparison.pairs:
        test = pair.test
        counts = (f"{test.only_a}", f"{test.only_b}", p_text(test.p_value))
        effect = paired_minimum_detectable_effect(pair.a.trials, (test.only_a + test.only_b) / pair.a.trials)
        difference = "{:+.0f} ({:+.0f} to {:+.0f})".format(*(100 * value for value in pair.difference[:3]))
        table.add_row(
            pair.regime, f"{pair.a.trials}", _rate(pair.a), _rate(pair.b), difference, *counts, _points(effect)
        )
    unit = "tasks" if comparison.pairs[-1].difference.clusters == comparison.pairs[-1].a.tasks else "trials"
    table.caption = (
        f"A - B: points over all trials, paired bootstrap over {unit}; only A, only B: trials that one policy alone solved; p: "
        "McNemar's exact test; detectable: smallest difference that these pairs show with 80 % power"
    )
    if start_a != start_b and NO_NOISE not in (start_a, start_b):
        table.caption += f". Answers start from {start_a} (A) and from {start_b} (B), which alone changes success"
    return table


def leaderboard_table(results: Sequence[Results], benchmark: str) -> Table:
    """Published averages of a benchmark and own results, best first in each regime, with their protocols in words.

    Raises ValueError for an unknown benchmark, and for results of another one.
    """
    rows = [(p.regime, p.average / 100, _published_row(p)) for p in published(benchmark)]
    for measured in results:
        simulator = measured.header["simulator"]
        if simulator != benchmark:
            raise ValueError(f"{measured.policy}: these are results of {simulator}, not of {benchmark}")
        summaries = [summary for summary in summarise(measured) if summary.regime in measured.regimes]
        rows += [(s.regime, _main_average(s).value, _measured_row(measured, s)) for s in summaries]
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
        "* measured here; other rows are quoted. Their intervals are Wilson's over the stated episodes and leave out "
        "the variation between training runs. Rows of different protocols are not the same measurement."
    )
    return table


REFERENCES = ("wam", "agra")
"""The methods against which the others are tested."""


def methods_tables(rows: Sequence[MeasuredRow], results: Sequence[Results] = ()) -> list[Table]:
    """The compared methods of a benchmark, best first, and McNemar's tests on the same trials against the references.

    `results` are further results files. They are compared with the references' random noise, or zero noise where theirs
    is zero. Raises ValueError for results of other trials or another protocol.
    """
    best_first = sorted(rows, key=lambda row: -summarise(row.results["random"])[-1].rate)
    entries = [
        (row.name, f"{row.seed}", row.info["pre_training"], noise, row.results[noise])
        for row in best_first
        for noise in NOISES
    ]
    for added in results:
        settings = added.header["policy_settings"]
        video = f", {settings['video_noise']} video noise" if "video_noise" in settings else ""
        entries.append((f"* {added.policy}{video}", "", "", settings.get("action_noise", "random"), added))
    regimes = [summary.regime for summary in summarise(entries[0][-1])]
    table = _table("success (95 %)", "method", "seed", "pre-training", "noise", *regimes)
    table.caption = (
        "Wilson intervals over trials, without the variation between training seeds; * not a row of the package"
    )
    for *cells, measured in entries:
        table.add_row(*cells, *(f"{s.successes}/{s.trials} {_rate(s)}" for s in summarise(measured)))
    tests = [_tests(row, entries, regimes) for row in rows if row.name in REFERENCES]
    return [table, *(table for table in tests if table.rows)]


def _tests(reference: MeasuredRow, entries: Sequence[tuple], regimes: Sequence[str]) -> Table:
    """McNemar's tests of the entries of one seed, and of further results, against a method, under the same kind of noise."""
    title = f"against {reference.name}, seed {reference.seed}: trials solved by the method alone / by {reference.name} alone"
    table = _table(title, "method", "seed", "noise", *regimes)
    table.caption = "p: McNemar's exact test, not corrected for the number of tests"
    for name, seed, _, noise, measured in entries:
        if seed in ("", f"{reference.seed}") and (name, seed) != (reference.name, f"{reference.seed}"):
            tests = [pair.test for pair in compare(measured, reference.results[noise]).pairs]
            table.add_row(name, seed, noise, *(f"{t.only_a} / {t.only_b}, p {p_text(t.p_value)}" for t in tests))
    return table


def print_table(table: Table) -> None:
    """Print a table at its full width, also to a narrow terminal or a file."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, needed)).print(table)


def _main_average(summary: Summary) -> Average:
    """The benchmark's own average: over groups of tasks, else over tasks, else over trials."""
    trials = Average(summary.rate, *summary.interval, summary.trials)
    return summary.group_average or summary.average or trials


def _measured_row(results: Results, summary: Summary) -> tuple[str, str, str, str]:
    header = results.header
    protocol = header["protocol"]
    words = [
        f"{protocol['execute_steps']} actions executed of each chunk",
        f"at most {header['max_steps']} steps",
        f"success checked after each {protocol['termination']}",
        results.start,
        *(f"{key.replace('_', ' ')} {value}" for key, value in header.get("settings", {}).items()),
    ]
    if summary.groups:
        words += [f"{group.group} {group.rate:.1%}" for group in summary.groups]
        kind = "groups of tasks" if summary.group_average else "tasks, because a group has fewer than two"
        words.append(f"average over {kind}; {np.mean(_task_rates(results, summary.regime)):.1%} over tasks")
    if summary.trials != summary.full:
        words.append(f"{summary.trials} of the {summary.full} trials of the full list")
    average = _average(_main_average(summary))
    return f"* {results.policy}", average, f"{summary.tasks} tasks, {summary.trials} in all", "; ".join(words)


def _task_rates(results: Results, regime: str) -> list[float]:
    trials = results.regime(regime)
    tasks = dict.fromkeys(trial.task for trial in trials)
    return [float(np.mean([trial.success for trial in trials if trial.task == task])) for task in tasks]


def _published_row(row: Published) -> tuple[str, str, str, str]:
    episodes = f"{row.tasks} x {row.episodes}" if row.episodes else f"{row.tasks} tasks"
    average = f"{row.average:.1f} %"
    if row.episodes and not row.by_group:
        trials = row.tasks * row.episodes
        low, high = wilson_interval(round(row.average / 100 * trials), trials)
        average += f" ({100 * low:.0f}-{100 * high:.0f})"
    over = "average over groups of tasks; " if row.by_group else ""
    return row.system, average, episodes, f"{over}{row.protocol} ({row.source})"


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


def _average(average: Average | None) -> str:
    return "" if average is None else _percent(*average[:3])


def _points(effect: float) -> str:
    return "none" if math.isinf(effect) else f"{100 * effect:.0f} points"
