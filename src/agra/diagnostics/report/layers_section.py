"""The report on what the video layers hold and what the video DiT expects: layer by layer, and beside the recording."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from agra.diagnostics.report.figures import Interval, interval_chart
from agra.diagnostics.metrics import IntervalEstimate, bootstrap_interval, paired_difference
from agra.diagnostics.record import Diagnosis
from agra.diagnostics.report.grounding_section import DiagnosisColumn, paired_rows
from agra.diagnostics.report.comparison_table import Cell, TableRow, Table, difference_cell, estimate_cell, number

MEASURES = (
    (
        "teacher_similarity",
        "Likeness to the teacher",
        "debiased linear CKA; 0 is chance, 1 is equal up to rotation and scale",
    ),
    ("alignment_cosine", "Alignment cosine", "of the layer's own projector; only aligned layers have one"),
    ("probe_error", "Position error of a linear probe", "grid units, held out by trial; lower is better"),
)
VIDEO = (
    ("psnr", "still_psnr", "PSNR of the imagined video", "dB; higher is better"),
    ("ssim", "still_ssim", "SSIM of the imagined video", "at most 1; higher is better"),
    ("action_error", None, "Error of the predicted actions", "root mean square, normalised; lower is better"),
)


def layers_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """A chart and a table of every measure that some policy has; None if none has any."""
    known = [(i, name, d) for i, name, d in columns if d is not None]
    shown = [measure for measure in MEASURES if any(_has(d, measure[0]) for _, _, d in known)]
    if not shown:
        return None
    layers = sorted({layer for _, _, d in known for layer in d.header["layers"]})
    teachers = dict.fromkeys(d.header["teacher"] for _, _, d in known if d.header["teacher"])
    return {
        "charts": [_chart(known, layers, *measure) for measure in shown],
        "table": Table(
            corner="measure and video layer",
            rows=[row for measure in shown for layer in layers if (row := _row(columns, layer, *measure)) is not None],
            extra="sees nothing",
        ),
        "teacher": ", ".join(teachers),
    }


def imagination_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """The predicted video against the recorded one, beside the predicted actions; None where nothing was recorded."""
    known = [d for _, _, d in columns if d is not None]
    rows = [_plain_row(columns, *row) for row in VIDEO if any(np.isfinite(d.values(row[0])).any() for d in known)]
    if not rows:
        return None
    return {"table": Table(corner="measure", rows=rows, extra="nothing moves"), "agreement": _agreement(columns)}


def _agreement(columns: Sequence[DiagnosisColumn]) -> str:
    """How often a good video comes with bad actions."""
    parts = []
    for _, name, diagnosis in columns:
        if diagnosis is None:
            continue
        video, action = diagnosis.values("psnr"), diagnosis.values("action_error")
        known = np.isfinite(video) & np.isfinite(action)
        if known.sum() < 8:
            continue
        good, bad = video > np.median(video[known]), action > np.median(action[known])
        parts.append(f"{name}: {int((known & good & bad).sum())} of {int(known.sum())}")
    if not parts:
        return ""
    return (
        "The video was right and the action wrong: samples whose video is better than the policy's median and whose actions "
        f"are worse (a quarter, if the two had nothing to do with each other). {'; '.join(parts)}."
    )


def _has(diagnosis: Diagnosis, name: str) -> bool:
    return any(np.isfinite(diagnosis.layer_values(name, layer)).any() for layer in diagnosis.header["layers"])


def _estimate(diagnosis: Diagnosis, values: np.ndarray) -> IntervalEstimate:
    return bootstrap_interval(values, groups=[row["trial"] for row in diagnosis.rows], resamples=500)


def _chart(
    known: Sequence[tuple[int, str, Diagnosis]], layers: Sequence[int], name: str, title: str, hint: str
) -> dict[str, Any]:
    groups = []
    for layer in layers:
        dots = []
        for index, policy, diagnosis in known:
            found = _estimate(diagnosis, diagnosis.layer_values(name, layer))
            aligned = ", aligned" if layer in diagnosis.header["aligned_layers"] else ""
            label = f"{policy}{aligned}: {number(found.value)}"
            dots.append(Interval(label=label, index=index, value=found.value, low=found.low, high=found.high))
        groups.append((f"video layer {layer}", dots))
    ends = [end for _, dots in groups for dot in dots for end in (dot.value, dot.low, dot.high) if math.isfinite(end)]
    blind = _blind([d for _, _, d in known]) if name == "probe_error" else None
    ends += [] if blind is None else [blind]
    low, high = min(0.0, *ends), max(ends)
    chart = interval_chart(groups, title=title, limits=(low, high + 0.06 * (high - low)), reference=blind)
    return {"title": title, "svg": chart, "caption": hint + ("; dashed: a probe that sees nothing" if blind else "")}


def _blind(diagnoses: Sequence[Diagnosis]) -> float | None:
    values = diagnoses[0].values("blind_probe_error")
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _row(columns: Sequence[DiagnosisColumn], layer: int, name: str, title: str, hint: str) -> TableRow | None:
    found = [None if d is None else d.layer_values(name, layer) for _, _, d in columns]
    if not any(values is not None and np.isfinite(values).any() for values in found):
        return None
    blind = next((d for _, _, d in columns if d is not None), None) if name == "probe_error" else None
    return _compared(
        columns,
        found,
        f"{title}, layer {layer}",
        hint,
        None if blind is None else _estimate(blind, blind.values("blind_probe_error")),
    )


def _plain_row(columns: Sequence[DiagnosisColumn], name: str, baseline: str | None, title: str, hint: str) -> TableRow:
    first = next(d for _, _, d in columns if d is not None)
    extra = None if baseline is None else _estimate(first, first.values(baseline))
    return _compared(columns, [None if d is None else d.values(name) for _, _, d in columns], title, hint, extra)


def _compared(
    columns: Sequence[DiagnosisColumn], found: Sequence[np.ndarray | None], label: str, hint: str, extra: IntervalEstimate | None
) -> TableRow:
    """A cell a policy and paired differences from the first."""
    reference, theirs = columns[0][2], found[0]
    verdicts: list[Cell] = []
    for (_, name, ours), values in zip(columns[1:], found[1:], strict=True):
        difference = None
        if ours is not None and reference is not None and values is not None and theirs is not None:
            left, right, trials = paired_rows(ours, reference)
            difference = paired_difference(values[left], theirs[right], groups=trials, resamples=500)
        verdicts.append(difference_cell(difference, name=name))
    cells = [
        estimate_cell(None if d is None or values is None else _estimate(d, values))
        for (_, _, d), values in zip(columns, found, strict=True)
    ]
    return TableRow(label=label, hint=hint, cells=cells, extra=estimate_cell(extra), verdicts=verdicts)
