"""The report's sections on hidden states (3.3, D.2), layer by layer, and on the predicted video (Fig. 1)."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from agra.diagnostics.metrics import IntervalEstimate, bootstrap_interval, paired_difference
from agra.diagnostics.record import Diagnosis
from agra.diagnostics.report.comparison_table import (
    Cell,
    Table,
    TableRow,
    difference_cell,
    estimate_cell,
    noting_starts,
    number,
)
from agra.diagnostics.report.figures import Interval, interval_chart
from agra.diagnostics.report.grounding_section import DiagnosisColumn, instrument_cell, paired_rows

MEASURES = (
    (
        "teacher_similarity",
        "Similarity to the teacher",
        "debiased linear CKA; 0 is chance, 1 is equality up to rotation and scale",
    ),
    ("alignment_cosine", "Alignment cosine", "with the layer's projector; only aligned layers have one"),
    ("probe_error", "Position error of a linear probe", "grid units, held out by trial; lower is better"),
)
VIDEO = (
    ("psnr", "still_psnr", "PSNR of the predicted video", "dB; higher is better"),
    ("ssim", "still_ssim", "SSIM of the predicted video", "at most 1; higher is better"),
    ("action_error", None, "Error of the predicted actions", "root mean square, normalised; lower is better"),
)


def layers_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """A chart and a table of every measure of some policy. None without any measure."""
    measured = [(i, name, d) for i, name, d in columns if d is not None and d.applies("hidden_states")]
    shown = [measure for measure in MEASURES if any(_has(d, measure[0]) for _, _, d in measured)]
    if not shown:
        return None
    layers = sorted({layer for _, _, d in measured for layer in d.header["layers"]})
    teachers = dict.fromkeys(d.header["teacher"] for _, _, d in measured if d.header["teacher"])
    return {
        "charts": [_chart(measured, layers, *measure) for measure in shown],
        "table": Table(
            corner="measure and layer",
            rows=[row for measure in shown for layer in layers if (row := _row(columns, layer, *measure)) is not None],
            extra="without features",
        ),
        "teacher": ", ".join(teachers),
    }


def imagination_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """The predicted video against the recording, and the predicted actions. None without a recording."""
    diagnosed = [d for _, _, d in columns if d is not None]
    rows = [_plain_row(columns, *row) for row in VIDEO if any(np.isfinite(d.values(row[0])).any() for d in diagnosed)]
    if not rows:
        return None
    return {"table": Table(corner="measure", rows=rows, extra="static video"), "agreement": _agreement(columns)}


def _agreement(columns: Sequence[DiagnosisColumn]) -> str:
    """The number of samples with a good video and bad actions."""
    parts = []
    for _, name, diagnosis in columns:
        if diagnosis is None:
            continue
        video, action = diagnosis.values("psnr"), diagnosis.values("action_error")
        both = np.isfinite(video) & np.isfinite(action)
        if both.sum() < 8:
            continue
        good, bad = video > np.median(video[both]), action > np.median(action[both])
        parts.append(f"{name}: {int((both & good & bad).sum())} of {int(both.sum())}")
    if not parts:
        return ""
    return (
        "Right video, wrong action: samples whose video is better than the policy's median and whose actions are worse "
        f"than its median (a quarter of all samples, if the two were independent). {'; '.join(parts)}."
    )


def _has(diagnosis: Diagnosis, name: str) -> bool:
    return any(np.isfinite(diagnosis.layer_values(name, layer)).any() for layer in diagnosis.header["layers"])


def _estimate(diagnosis: Diagnosis, values: np.ndarray) -> IntervalEstimate:
    return bootstrap_interval(values, groups=[row["trial"] for row in diagnosis.rows], resamples=500)


def _chart(
    measured: Sequence[tuple[int, str, Diagnosis]], layers: Sequence[int], name: str, title: str, hint: str
) -> dict[str, Any]:
    groups = []
    for layer in layers:
        dots = []
        for index, policy, diagnosis in measured:
            mean = _estimate(diagnosis, diagnosis.layer_values(name, layer))
            aligned = ", aligned" if layer in diagnosis.header["aligned_layers"] else ""
            label = f"{policy}{aligned}: {number(mean.value)}"
            dots.append(Interval(label=label, index=index, value=mean.value, low=mean.low, high=mean.high))
        groups.append((f"layer {layer}", dots))
    ends = [end for _, dots in groups for dot in dots for end in (dot.value, dot.low, dot.high) if math.isfinite(end)]
    blind = _blind([d for _, _, d in measured]) if name == "probe_error" else None
    ends += [] if blind is None else [blind]
    low, high = min(0.0, *ends), max(ends)
    chart = interval_chart(groups, title=title, limits=(low, high + 0.06 * (high - low)), reference=blind)
    return {"title": title, "svg": chart, "caption": hint + ("; dashed: a probe without features" if blind else "")}


def _blind(diagnoses: Sequence[Diagnosis]) -> float | None:
    values = diagnoses[0].values("blind_probe_error")
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _row(columns: Sequence[DiagnosisColumn], layer: int, name: str, title: str, hint: str) -> TableRow | None:
    values = [None if d is None else d.layer_values(name, layer) for _, _, d in columns]
    if not any(column is not None and np.isfinite(column).any() for column in values):
        return None
    probed = next((d for _, _, d in columns if d is not None and d.applies("hidden_states")), None)
    blind = None
    if name == "probe_error" and probed is not None:
        blind = _estimate(probed, probed.values("blind_probe_error"))
    return _compared(columns, values, f"{title}, layer {layer}", hint, blind, instrument="hidden_states")


def _plain_row(columns: Sequence[DiagnosisColumn], name: str, baseline: str | None, title: str, hint: str) -> TableRow:
    instrument = None if name == "action_error" else "imagination"
    diagnoses = [d for _, _, d in columns if d is not None and (instrument is None or d.applies(instrument))]
    extra = None if baseline is None else _estimate(diagnoses[0], diagnoses[0].values(baseline))
    values = [None if d is None else d.values(name) for _, _, d in columns]
    return _compared(columns, values, title, hint, extra, instrument=instrument)


def _compared(
    columns: Sequence[DiagnosisColumn],
    values: Sequence[np.ndarray | None],
    label: str,
    hint: str,
    extra: IntervalEstimate | None,
    *,
    instrument: str | None,
) -> TableRow:
    """A cell for each policy, and the paired difference of two."""
    cells = [
        instrument_cell(d, instrument, None if d is None or measured is None else _estimate(d, measured))
        for (_, _, d), measured in zip(columns, values, strict=True)
    ]

    @cache
    def verdict(place: int, other: int) -> Cell:
        (_, name, ours), (_, _, reference) = columns[place], columns[other]
        measured, theirs, difference = values[place], values[other], None
        if ours is not None and reference is not None and measured is not None and theirs is not None:
            left, right, trials = paired_rows(ours, reference)
            difference = paired_difference(measured[left], theirs[right], groups=trials, resamples=500)
        return difference_cell(difference, name=name)

    row = TableRow(label=label, hint=hint, cells=cells, extra=estimate_cell(extra), verdict=verdict)
    return noting_starts(row, [None if d is None else d.start for _, _, d in columns])
