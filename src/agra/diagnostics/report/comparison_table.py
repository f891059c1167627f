"""Comparison tables of the report: one column for each policy, then a verdict in words for each pair of policies.

Every difference is given with its interval. If the interval includes zero, the verdict is that no difference is shown.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import rich.console
import rich.table

from agra.diagnostics.metrics import IntervalEstimate
from agra.evaluation.results import NO_NOISE


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number or phrase, with its interval or count below it."""

    text: str
    range: str = ""
    clear: bool = False  # whether the interval or test shows a difference


Verdict = Callable[[int, int], Cell]
"""The verdict on the policy of the first column against that of the second, by their places."""
Pairs = Sequence[tuple[int, int]]
"""Places of the policies that are compared, each with its reference."""


def against_first(count: int) -> Pairs:
    """Pair every policy but the first with the first."""
    return [(place, 0) for place in range(1, count)]


def against_first_of(groups: Sequence[Hashable]) -> Pairs:
    """Pair every policy with the first of its group, such as those that were trained on the same demonstrations.

    The first of a group of several is paired with none, a policy alone in its group with the first of all.
    """
    references = [0 if groups.count(group) == 1 else groups.index(group) for group in groups]
    return [(place, reference) for place, reference in enumerate(references) if place != reference]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One quantity: a cell for each policy, and the verdict on a pair of policies."""

    label: str
    hint: str = ""
    cells: Sequence[Cell]
    extra: Cell | None = None
    verdict: Verdict | None = None

    def compared(self, place: int, reference: int) -> Cell:
        """The verdict on a pair. There is none if the instrument does not apply to one of the two."""
        if self.verdict is None or self.cells[place] == NOT_APPLICABLE:
            return NOT_APPLICABLE
        if self.cells[reference] == NOT_APPLICABLE:
            return Cell(text="not comparable: not applicable to the reference")
        return self.verdict(place, reference)


def noting_starts(row: TableRow, starts: Sequence[str | None]) -> TableRow:
    """The row with verdicts that say where two policies' answers start, if that differs.

    `starts` holds the words of each policy (`agra.evaluation.results.start_of_answers`), None where it was not measured.
    """
    verdict = row.verdict
    if verdict is None:
        return row

    def noted(place: int, reference: int) -> Cell:
        cell, ours, theirs = verdict(place, reference), starts[place], starts[reference]
        if ours == theirs or {ours, theirs} & {None, NO_NOISE}:
            return cell
        return replace(
            cell, range=f"{cell.range}; answers start from {ours}, the reference's from {theirs}".lstrip("; ")
        )

    return replace(row, verdict=noted)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a common head. `extra` is the head of one more column, for a baseline."""

    corner: str
    rows: Sequence[TableRow]
    extra: str = ""


def print_table(table: Table, names: Sequence[str], *, title: str) -> None:
    """Print the table in a terminal, intervals below the numbers, and verdicts against the first policy last."""
    shown = rich.table.Table(title=title, title_justify="left", show_lines=True)
    pairs = against_first(len(names))
    verdicts = [f"{names[place]} against {names[reference]}" for place, reference in pairs]
    for head in (table.corner, *names, *([table.extra] if table.extra else []), *verdicts):
        shown.add_column(head)
    for row in table.rows:
        extra = [row.extra or MISSING] if table.extra else []
        cells = [*row.cells, *extra, *(row.compared(*pair) for pair in pairs if row.verdict is not None)]
        shown.add_row(row.label, *(f"{cell.text}\n{cell.range}".strip() for cell in cells))
    rich.console.Console().print(shown)


MISSING = Cell(text="–")
"""The cell of a quantity that was not measured."""
NOT_APPLICABLE = Cell(text="not applicable")
"""The cell of an instrument that the policy's method cannot offer."""


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and a minus sign, without an exponent down to about 1e-5."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}" if places <= 6 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def percent(fraction: float) -> str:
    """A fraction as a percentage. Below 10 % it has one decimal, unless it is whole."""
    if not math.isfinite(fraction):
        return "–"
    value = 100 * fraction
    whole = abs(value) >= 10 or abs(value - round(value)) < 0.05
    return f"{value:.{0 if whole else 1}f}\u00a0%".replace("-", "−")


def between(low: float, high: float, form=number) -> str:
    """An interval in brackets, or "no interval"."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    return f"[{form(low)}, {form(high)}]"


def estimate_cell(estimate: IntervalEstimate | None, form=number) -> Cell:
    """A metric's value and its interval."""
    if estimate is None or not estimate.count:
        return MISSING
    return Cell(text=form(estimate.value), range=between(estimate.low, estimate.high, form))


def difference_cell(difference: IntervalEstimate | None, *, name: str, form=number) -> Cell:
    """The verdict on a paired difference, `name` minus the reference: higher, lower or no difference shown."""
    if difference is None or not difference.count:
        return Cell(text="not comparable: no finite values in common")
    signed = f"{'+' if difference.value > 0 else ''}{form(difference.value)}"
    span = f"difference {signed} {between(difference.low, difference.high, form)}, n\u00a0=\u00a0{difference.count}"
    if not math.isfinite(difference.low) or not math.isfinite(difference.high):
        return Cell(text="too few trials for an interval", range=span)
    if difference.includes(0):
        return Cell(text="no difference shown", range=span)
    return Cell(text=f"{name} {'higher' if difference.value > 0 else 'lower'}", range=span, clear=True)


def mcnemar_cell(
    only_ours: int, only_reference: int, p: float, trials: int, *, name: str, reference: str, alpha: float = 0.05
) -> Cell:
    """McNemar's test in words: the trials that exactly one of the two policies solved, and the p value."""
    if not trials:
        return Cell(text="not comparable: no common trials")
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    shown = shown.replace(" ", "\u00a0")
    span = f"of {trials} trials {name} alone succeeded in {only_ours}, {reference} alone in {only_reference}; {shown}"
    if p >= alpha:
        return Cell(text="no difference shown", range=span)
    return Cell(
        text=f"{name} succeeds {'more' if only_ours > only_reference else 'less'} often", range=span, clear=True
    )
