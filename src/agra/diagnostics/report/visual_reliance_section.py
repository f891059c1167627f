"""The report's section on visual reliance (B.2.2): the target of each policy's first chunk, and the inputs that move
it.
"""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from agra.diagnostics.metrics import IntervalEstimate, bootstrap_interval, paired_difference
from agra.diagnostics.report.comparison_table import (
    NOT_APPLICABLE,
    Cell,
    Table,
    TableRow,
    difference_cell,
    estimate_cell,
    noting_starts,
    number,
    percent,
)
from agra.diagnostics.visual_reliance import EarlierInstrument, VisualReliance

log = logging.getLogger(__name__)

VISUAL_RELIANCE = "visual_reliance.json"
"""The file in a diagnosis folder."""
_EARLIER = "looking.json"
"""Its name until version 0.1."""

REFERENCES = {"error": "constant_error", "image_swap_shift": "demonstrated_swap_shift"}
"""Measures with a reference in the last column: a constant, and the demonstrations of the two trials."""

VisualRelianceColumn = tuple[int, str, VisualReliance | None]
"""A policy's number, name and visual reliance."""


def _centimetres(metres: float) -> str:
    return f"{number(100 * metres, 2)}\u00a0cm"


ROWS = (
    ("in_distribution", "error", "Target error, one object", "in distribution; lower is better", _centimetres),
    ("semantic", "error", "Target error, among others", "semantic; lower is better", _centimetres),
    ("in_distribution", "image_swap_shift", "Image swapped", "shift of the target", _centimetres),
    ("semantic", "image_swap_shift", "Image swapped, among others", "shift of the target", _centimetres),
    ("in_distribution", "image_mask_shift", "Image masked", "shift of the target", _centimetres),
    ("semantic", "instruction_swap_shift", "Instruction swapped", "shift of the target", _centimetres),
    (
        "semantic",
        "follows_instruction",
        "Follows the instruction",
        "fraction of scenes in which the other instruction brings the target nearer to the other object",
        percent,
    ),
)


def read_visual_reliance(diagnosis: Path | None) -> VisualReliance | None:
    """The visual reliance in a diagnosis folder. None if it was not measured, or by an earlier version, which is logged."""
    path = None if diagnosis is None else diagnosis / VISUAL_RELIANCE
    if path is None or not path.is_file():
        return None
    try:
        return VisualReliance.load(path)
    except EarlierInstrument as error:
        log.warning("%s", error)
        return None


def remove_visual_reliance(diagnosis: Path) -> None:
    """Remove the visual reliance of an earlier diagnosis, which must not stand beside a new one."""
    for name in (VISUAL_RELIANCE, _EARLIER):
        (diagnosis / name).unlink(missing_ok=True)


def visual_reliance_section(
    columns: Sequence[VisualRelianceColumn], starts: Sequence[str | None]
) -> dict[str, Any] | None:
    """The table of visual reliance. None if it was measured for no policy.

    `starts` names the noise from which each policy's answers start, None where it was not diagnosed.
    """
    measured = [reliance for _, _, reliance in columns if reliance is not None]
    if not measured:
        return None
    rows = [
        noting_starts(_row(columns, *row), starts)
        for row in ROWS
        if any(_has(reliance, *row[:2]) for reliance in measured)
    ]
    count = len(measured[0].trials)
    return {
        "table": Table(corner="measure", rows=rows, extra="reference"),
        "intro": f"Measured on the first observation of {count} trials, where the state is nearly the same. The target "
        "is the planar position that a policy's first chunk asks for at about the time when the hand arrives. The "
        "demonstrated target is the scripted expert's. The reference of an error is that of a constant, the geometric "
        "median of the other trials' targets. A policy that does not use the image cannot be expected to be nearer, and "
        "its target does not move when the image is replaced by another trial's. The reference of that shift is the "
        "distance between the demonstrated targets of the two trials.",
    }


def _has(reliance: VisualReliance, group: str, measure: str) -> bool:
    return bool(np.isfinite(reliance.group(group).values[measure]).any())


def _row(columns: Sequence[VisualRelianceColumn], group: str, measure: str, label: str, hint: str, form) -> TableRow:
    parts = [(name, None if reliance is None else reliance.group(group)) for _, name, reliance in columns]

    def cell(reliance: VisualReliance | None) -> Cell:
        if reliance is not None and not np.isfinite(reliance.values[measure]).any():
            return NOT_APPLICABLE
        return estimate_cell(estimate(reliance), form)

    def estimate(reliance: VisualReliance | None, name: str = measure) -> IntervalEstimate | None:
        return None if reliance is None else bootstrap_interval(reliance.values[name], groups=reliance.trials)

    @cache
    def verdict(place: int, other: int) -> Cell:
        (name, ours), (reference_name, reference), difference = parts[place], parts[other], None
        if ours is not None and reference is not None:
            if ours.trials != reference.trials:
                raise ValueError(
                    f"{name} and {reference_name}: visual reliance was measured on different trials; diagnose them again"
                )
            difference = paired_difference(ours.values[measure], reference.values[measure], groups=ours.trials)
        return difference_cell(difference, name=name, form=form)

    reference = next((part for _, part in parts if part is not None), None) if measure in REFERENCES else None
    return TableRow(
        label=label,
        hint=hint,
        cells=[cell(part) for _, part in parts],
        extra=estimate_cell(estimate(reference, REFERENCES.get(measure, measure)), form),
        verdict=verdict,
    )
