"""The report's section on whether the policies look: their first chunk's target, and what moves it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agra.diagnostics.looking import Looking
from agra.diagnostics.metrics import Estimate, bootstrap_interval, paired_difference
from agra.diagnostics.report_tables import Row, Table, difference_cell, estimate_cell, number, percent

LOOKING = "looking.json"
"""The file in a diagnosis folder."""

Column = tuple[int, str, Looking | None]


def _centimetres(metres: float) -> str:
    return f"{number(100 * metres, 2)}\u00a0cm"


ROWS = (
    ("in_distribution", "error", "Target error, one thing", "in distribution; lower is better", _centimetres),
    ("semantic", "error", "Target error, among others", "semantic; lower is better", _centimetres),
    ("in_distribution", "image_swap_shift", "Image swapped", "how far the target moves", _centimetres),
    ("in_distribution", "image_mask_shift", "Image masked", "how far the target moves", _centimetres),
    ("semantic", "instruction_swap_shift", "Instruction swapped", "how far the target moves", _centimetres),
    (
        "semantic",
        "follows_instruction",
        "Follows the instruction",
        "share of scenes in which the other instruction brings the target nearer to the other thing",
        percent,
    ),
)


def read_looking(diagnosis: Path | None) -> Looking | None:
    """What a diagnosis folder holds of it."""
    path = None if diagnosis is None else diagnosis / LOOKING
    return None if path is None or not path.is_file() else Looking.load(path)


def looking_section(columns: Sequence[Column]) -> dict[str, Any] | None:
    """None where no policy was looked at in this way."""
    known = [looking for _, _, looking in columns if looking is not None]
    if not known:
        return None
    rows = [_row(columns, *row) for row in ROWS if any(_has(looking, *row[:2]) for looking in known)]
    looks = len(known[0].trials)
    return {
        "table": Table(corner="measure", rows=rows, extra="a constant"),
        "intro": f"The first observation of {looks} trials, where the state says nothing. The target is the planar position "
        "that a policy's first chunk asks for at about the time at which the hand arrives; the demonstrated one is the "
        "scripted expert's. A policy that does not look cannot be nearer to it than a constant, the mean of the other "
        "trials' targets, and stays where it is when the image is another trial's.",
    }


def _has(looking: Looking, group: str, measure: str) -> bool:
    return bool(np.isfinite(looking.group(group).values[measure]).any())


def _row(columns: Sequence[Column], group: str, measure: str, label: str, hint: str, form) -> Row:
    parts = [(name, None if looking is None else looking.group(group)) for _, name, looking in columns]
    reference = parts[0][1]

    def estimate(looking: Looking | None, what: str = measure) -> Estimate | None:
        return None if looking is None else bootstrap_interval(looking.values[what], groups=looking.trials)

    verdicts = []
    for name, ours in parts[1:]:
        difference = None
        if ours is not None and reference is not None:
            if ours.trials != reference.trials:
                raise ValueError(f"looking: {name} and {parts[0][0]} were shown different trials; diagnose them again")
            difference = paired_difference(ours.values[measure], reference.values[measure], groups=ours.trials)
        verdicts.append(difference_cell(difference, name=name, form=form))
    constant = next((looking for _, looking in parts if looking is not None), None) if measure == "error" else None
    return Row(
        label=label,
        hint=hint,
        cells=[estimate_cell(estimate(looking), form) for _, looking in parts],
        extra=estimate_cell(estimate(constant, "constant_error"), form),
        verdicts=verdicts,
    )
