"""The report's grounding tables and charts, from diagnosis folders.                                4.2.1; Table 1, Fig. 4"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from agra.diagnostics.report.figures import Interval, interval_chart
from agra.diagnostics.metrics import (
    IntervalEstimate,
    SensitivityRatio,
    bootstrap_interval,
    matched_sensitivity_ratio,
    paired_difference,
)
from agra.diagnostics.record import Diagnosis
from agra.diagnostics.report.comparison_table import (
    MISSING,
    Cell,
    TableRow,
    Table,
    difference_cell,
    estimate_cell,
    number,
    percent,
    print_table,
)

DiagnosisColumn = tuple[int, str, Diagnosis | None]
"""A policy's number, name and diagnosis."""

METRICS = (
    ("in_mask_ratio", "Attention in mask", "share of the attention mass; higher is better", "higher", percent),
    ("centroid_error", "Centroid error", "grid units; lower is better", "lower", number),
)
TITLES = {
    "mean": "mean replacement",
    "zero": "zero replacement",
    "shuffle": "shuffled within the set",
    "swap": "swapped with the complement",
}


def paired_rows(ours: Diagnosis, reference: Diagnosis) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """TableRow numbers of the samples that both policies were probed on, and their trials."""
    there = {key: row for row, key in enumerate(reference.keys)}
    common = [(row, there[key]) for row, key in enumerate(ours.keys) if key in there]
    rows = np.array(common, dtype=int).reshape(-1, 2)
    return rows[:, 0], rows[:, 1], [ours.rows[row]["trial"] for row in rows[:, 0]]


def _trials(diagnosis: Diagnosis) -> list[str]:
    return [row["trial"] for row in diagnosis.rows]


def _ratio(diagnosis: Diagnosis, kind: str) -> SensitivityRatio:
    inside, outside = diagnosis.deviations(kind)
    known = np.flatnonzero(np.isfinite(inside).all(axis=1))
    names = _trials(diagnosis)
    trials = [names[row] for row in known]
    return matched_sensitivity_ratio(inside[known], outside[known], groups=trials)


def _verdicts(columns: Sequence[DiagnosisColumn], compare, margin, *, better: str, baseline: str, form=number) -> list[Cell]:
    """A difference cell for every policy but the first.

    `compare(ours, reference)` is the difference, `margin(diagnosis)` how far a policy is beyond the baseline that needs
    no looking at all. Of two policies one may be ahead and still not beat that: the verdict then says so.
    """
    reference = columns[0][2]
    cells = []
    for _, name, ours in columns[1:]:
        if ours is None or reference is None:
            cells.append(difference_cell(None, name=name))
            continue
        difference = compare(ours, reference)
        cell = difference_cell(difference, name=name, form=form)
        ahead = ours if (difference.value > 0) == (better == "higher") else reference
        if cell.clear and not margin(ahead).low > 0:
            cell = replace(cell, text=f"{cell.text}, but neither clear of {baseline}", clear=False)
        cells.append(cell)
    return cells


def _metric_row(columns: Sequence[DiagnosisColumn], name: str, label: str, hint: str, better: str, form) -> TableRow:
    def estimate(diagnosis: Diagnosis | None, name: str = name) -> IntervalEstimate | None:
        return None if diagnosis is None else bootstrap_interval(diagnosis.values(name), groups=_trials(diagnosis))

    def compare(ours: Diagnosis, reference: Diagnosis) -> IntervalEstimate:
        left, right, trials = paired_rows(ours, reference)
        return paired_difference(ours.values(name)[left], reference.values(name)[right], groups=trials)

    def margin(diagnosis: Diagnosis) -> IntervalEstimate:
        pair = diagnosis.values(name), diagnosis.values(f"uniform_{name}")
        return paired_difference(*(pair if better == "higher" else pair[::-1]), groups=_trials(diagnosis))

    any_one = next(d for _, _, d in columns if d is not None)
    return TableRow(
        label=label,
        hint=hint,
        cells=[estimate_cell(estimate(d), form) for _, _, d in columns],
        extra=estimate_cell(estimate(any_one, f"uniform_{name}"), form),
        verdicts=_verdicts(
            columns,
            compare,
            margin,
            better=better,
            baseline="an even spread",
            form=_points if form is percent else form,
        ),
    )


def _points(share: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{number(100 * share, 2)}\u00a0pts"


def _ratio_row(columns: Sequence[DiagnosisColumn], kind: str, ratios: dict[tuple[int, str], SensitivityRatio]) -> TableRow:
    def compare(ours: Diagnosis, reference: Diagnosis) -> IntervalEstimate:
        left, right, trials = paired_rows(ours, reference)
        a, b = ours.ratios(kind)[left], reference.ratios(kind)[right]
        return paired_difference(a, b, statistic=np.median, groups=trials)

    def margin(diagnosis: Diagnosis) -> IntervalEstimate:
        ratio = _ratio(diagnosis, kind).ratio
        return replace(ratio, value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)

    return TableRow(
        label=f"Sensitivity ratio, {kind}",
        hint=f"{TITLES[kind]}; higher is better",
        cells=[estimate_cell(ratios[i, kind].ratio) if (i, kind) in ratios else MISSING for i, _, _ in columns],
        extra=Cell(text="1", range="no preference"),
        verdicts=_verdicts(columns, compare, margin, better="higher", baseline="1"),
    )


def grounding_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """Tables and charts of the grounding metrics; None if no policy was diagnosed."""
    known = [(i, name, d) for i, name, d in columns if d is not None]
    if not known:
        return None
    kinds = [kind for kind in TITLES if all(kind in d.header["settings"]["kinds"] for _, _, d in known)]
    ratios = {(i, kind): _ratio(d, kind) for i, _, d in known for kind in kinds}
    attention, sensitivity = grounding_rows(columns, kinds)
    regimes = list(dict.fromkeys(row["regime"] for _, _, d in known for row in d.rows))
    return {
        "table": Table(corner="metric", rows=attention, extra="evenly spread"),
        "table_1": Table(corner="intervention", rows=sensitivity, extra="no preference"),
        "samples": _samples(known, kinds),
        "regimes": [(_heading(columns, regime), regime_table(columns, kinds, regime)) for regime in regimes],
        "intro": _intro([d for _, _, d in known]),
        "blocks": _block_chart(known),
        "ratios": _ratio_chart(known, kinds, ratios) if kinds else None,
        "averages": Table(corner="intervention and average", rows=_average_rows(columns, kinds, ratios)),
        "note": _note([d for _, _, d in known], [(name, d) for _, name, d in known]),
    }


def _samples(known: Sequence[tuple[int, str, Diagnosis]], kinds: Sequence[str]) -> dict[str, list]:
    """Every sample's own numbers, the policies one below the other."""
    names = ("in_mask_ratio", "centroid_error", "psnr", "action_error")
    columns = {name: [*(d.values(one) for one in names), *(d.ratios(kind) for kind in kinds)] for _, name, d in known}
    places = {name: {key: row for row, key in enumerate(d.keys)} for _, name, d in known}
    rows = []
    for trial, step in known[0][2].keys:
        for _, name, _ in known:
            row = places[name].get((trial, step))
            if row is not None:
                rows.append([f"{trial}, step {step}", name, *(number(float(v[row])) for v in columns[name])])
    heads = ["in mask", "centroid error", "PSNR", "action error", *(f"R, {kind}" for kind in kinds)]
    return {"heads": heads, "rows": rows}


def grounding_rows(columns: Sequence[DiagnosisColumn], kinds: Sequence[str]) -> tuple[list[TableRow], list[TableRow]]:
    """The rows of attention's metrics and those of the sensitivity ratios."""
    ratios = {(i, kind): _ratio(d, kind) for i, _, d in columns if d is not None for kind in kinds}
    return [_metric_row(columns, *metric) for metric in METRICS], [_ratio_row(columns, kind, ratios) for kind in kinds]


def of_regime(columns: Sequence[DiagnosisColumn], regime: str) -> list[DiagnosisColumn]:
    """The same policies on one regime's samples."""
    return [(i, name, None if d is None else d.of_regime(regime)) for i, name, d in columns]


def regime_table(columns: Sequence[DiagnosisColumn], kinds: Sequence[str], regime: str) -> Table:
    """Attention and sensitivity on one regime's samples."""
    attention, sensitivity = grounding_rows(of_regime(columns, regime), kinds)
    return Table(corner="metric", rows=[*attention, *sensitivity], extra="evenly spread")


def print_grounding(columns: Sequence[DiagnosisColumn]) -> None:
    """The same for a terminal: all samples, then every regime."""
    known = [d for _, _, d in columns if d is not None]
    kinds = [kind for kind in TITLES if all(kind in d.header["settings"]["kinds"] for d in known)]
    names = [name for _, name, _ in columns]
    attention, sensitivity = grounding_rows(columns, kinds)
    everything = Table(corner="metric", rows=[*attention, *sensitivity], extra="evenly spread")
    print_table(everything, names, title=f"all regimes: {len(known[0].rows)} samples")
    for regime in dict.fromkeys(row["regime"] for row in known[0].rows):
        print_table(regime_table(columns, kinds, regime), names, title=_heading(columns, regime))


def _heading(columns: Sequence[DiagnosisColumn], regime: str) -> str:
    counts = {sum(row["regime"] == regime for row in d.rows) for _, _, d in columns if d is not None}
    masked = {
        sum(row["regime"] == regime and row["deviation"] is not None for row in d.rows)
        for _, _, d in columns
        if d is not None
    }
    span = "–".join(map(str, sorted(counts)))
    return f"{regime.replace('_', ' ')}: {span} samples, {'–'.join(map(str, sorted(masked)))} with a matched mask"


def _average_rows(
    columns: Sequence[DiagnosisColumn], kinds: Sequence[str], ratios: dict[tuple[int, str], SensitivityRatio]
) -> list[TableRow]:
    averages = (
        ("ratio", "median of the ratios"),
        ("mean", "mean of the ratios"),
        ("ratio_of_means", "ratio of the means"),
    )
    return [
        TableRow(
            label=f"{kind}, {label}",
            cells=[
                estimate_cell(getattr(ratios[i, kind], name)) if (i, kind) in ratios else MISSING for i, _, _ in columns
            ],
        )
        for kind in kinds
        for name, label in averages
    ]


def _intro(diagnoses: Sequence[Diagnosis]) -> str:
    samples, trials = len(diagnoses[0].rows), len(set(_trials(diagnoses[0])))
    t, h, w = diagnoses[0].header["grid"]
    return (
        f"{samples} samples from {trials} recorded trials. The mask holds the acting hand and the target object, from the "
        f"simulator's segmentation, on the {t} × {h} × {w} token grid (latent frames × rows × columns). Intervals are "
        "bootstrapped over trials, so that samples of one trial do not pass for independent ones."
    )


def _note(diagnoses: Sequence[Diagnosis], named: Sequence[tuple[str, Diagnosis]]) -> str:
    settings = diagnoses[0].header["settings"]
    parts = [
        "Attention: mean over heads, action tokens and denoising steps (the state token left out), then over the "
        "cross-attention blocks. Centroid error: distance between the centroids of attention and mask in each latent "
        "frame, averaged over the frames. Sensitivity ratio: change of the normalised action chunk (Euclidean) when the "
        "mask's tokens are replaced in every bridged layer, over the mean change for "
        f"{settings['background_sets']} random sets of as many tokens outside the mask, frame by frame, under each of "
        f"{settings['noise_samples']} samples of video and action noise, averaged on both sides. Shown is the median over samples, "
        "and differences are those of the medians."
    ]
    for name, diagnosis in named:
        left_out = sum(row["note"] is not None for row in diagnosis.rows)
        if left_out:
            parts.append(f"{name}: {left_out} samples could not be matched with background and count in no ratio.")
    return " ".join(parts)


def block_names(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """The cross-attention blocks, 1-based, with the video layer that each reads where all policies agree on it."""
    names = []
    for block in range(max(d.arrays["attention"].shape[1] for d in diagnoses)):
        layers = {d.header["bridged_layers"][block] for d in diagnoses if block < len(d.header["bridged_layers"])}
        names.append(f"block {block + 1}" + (f", video layer {layers.pop()}" if len(layers) == 1 else ""))
    return names


Groups = list[tuple[str, list[Interval]]]


def _dot(name: str, index: int, estimate: IntervalEstimate, form=number) -> Interval:
    label = f"{name}: {form(estimate.value)}"
    return Interval(label=label, index=index, value=estimate.value, low=estimate.low, high=estimate.high)


def _ceiling(groups: Groups, least: float) -> float:
    """The end of an axis from 0 that shows everything finite, and at least `least`."""
    ends = [end for _, dots in groups for dot in dots for end in (dot.value, dot.high)]
    return 1.06 * max([least, *(end for end in ends if math.isfinite(end))])


def _block_chart(known: Sequence[tuple[int, str, Diagnosis]]) -> Markup:
    def estimate(diagnosis: Diagnosis, block: int) -> IntervalEstimate:
        rows = [row["in_mask_ratio_by_block"] for row in diagnosis.rows]
        values = np.array([math.nan if row is None or block >= len(row) else row[block] for row in rows])
        return bootstrap_interval(values, groups=_trials(diagnosis), resamples=500)

    groups: Groups = [
        (title, [_dot(name, index, estimate(diagnosis, block), percent) for index, name, diagnosis in known])
        for block, title in enumerate(block_names([d for _, _, d in known]))
    ]
    shares = known[0][2].values("uniform_in_mask_ratio")
    even = float(shares[np.isfinite(shares)].mean()) if np.isfinite(shares).any() else None
    limits = (0.0, _ceiling(groups, even or 0.01))
    return interval_chart(groups, title="Attention in the mask by block", limits=limits, percent=True, reference=even)


def _ratio_chart(
    known: Sequence[tuple[int, str, Diagnosis]], kinds: Sequence[str], ratios: dict[tuple[int, str], SensitivityRatio]
) -> Markup:
    groups: Groups = [
        (TITLES[kind], [_dot(name, index, ratios[index, kind].ratio) for index, name, _ in known]) for kind in kinds
    ]
    return interval_chart(groups, title="Matched sensitivity ratio", limits=(0.0, _ceiling(groups, 1.2)), reference=1.0)
