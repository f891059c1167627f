"""The report's section on grounding (4.2.1, Table 1, Fig. 4): tables and charts of diagnosis folders."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from markupsafe import Markup

from agra.diagnostics.metrics import (
    IntervalEstimate,
    SensitivityRatio,
    bootstrap_interval,
    matched_sensitivity_ratio,
    paired_difference,
)
from agra.diagnostics.record import Diagnosis
from agra.diagnostics.report.comparison_table import (
    NOT_APPLICABLE,
    Cell,
    Table,
    TableRow,
    Verdict,
    difference_cell,
    estimate_cell,
    noting_starts,
    number,
    percent,
    print_table,
)
from agra.diagnostics.report.figures import Interval, interval_chart

DiagnosisColumn = tuple[int, str, Diagnosis | None]
"""A policy's number, name and diagnosis."""

METRICS = (
    ("in_mask_ratio", "Attention in mask", "fraction of the attention mass; higher is better", "higher", percent),
    ("centroid_error", "Centroid error", "grid units; lower is better", "lower", number),
)
TITLES = {
    "mean": "mean replacement",
    "zero": "zero replacement",
    "shuffle": "shuffle within the set",
    "swap": "swap with the complement",
}


def paired_rows(ours: Diagnosis, reference: Diagnosis) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Row numbers of the samples that both policies have, in each of the two diagnoses, and their trials."""
    places = {key: row for row, key in enumerate(reference.keys)}
    common = [(row, places[key]) for row, key in enumerate(ours.keys) if key in places]
    rows = np.array(common, dtype=int).reshape(-1, 2)
    return rows[:, 0], rows[:, 1], [ours.rows[row]["trial"] for row in rows[:, 0]]


def instrument_cell(
    diagnosis: Diagnosis | None, instrument: str | None, estimate: IntervalEstimate | None, form=number
) -> Cell:
    """The cell of an estimate, or "not applicable" if the policy's method cannot offer the instrument."""
    if diagnosis is not None and instrument is not None and not diagnosis.applies(instrument):
        return NOT_APPLICABLE
    return estimate_cell(estimate, form)


def _trials(diagnosis: Diagnosis) -> list[str]:
    return [row["trial"] for row in diagnosis.rows]


def _ratio(diagnosis: Diagnosis, kind: str) -> SensitivityRatio:
    inside, outside = diagnosis.deviations(kind)
    matched = np.flatnonzero(np.isfinite(inside).all(axis=1))
    names = _trials(diagnosis)
    trials = [names[row] for row in matched]
    return matched_sensitivity_ratio(inside[matched], outside[matched], groups=trials)


def _verdict(
    columns: Sequence[DiagnosisColumn], compare, margin, *, better: str, baseline: str, form=number
) -> Verdict:
    """The difference cell of a pair of policies.

    `compare(ours, reference)` is the difference. `margin(diagnosis)` is a policy's advantage over a baseline that
    ignores the image. If the better policy does not exceed that baseline, the verdict says so.
    """

    @cache
    def verdict(place: int, other: int) -> Cell:
        (_, name, ours), (_, _, reference) = columns[place], columns[other]
        if ours is None or reference is None:
            return difference_cell(None, name=name)
        difference = compare(ours, reference)
        cell = difference_cell(difference, name=name, form=form)
        ahead = ours if (difference.value > 0) == (better == "higher") else reference
        if cell.clear and not margin(ahead).low > 0:
            cell = replace(cell, text=f"{cell.text}, but neither exceeds {baseline}", clear=False)
        return cell

    return verdict


def _metric_row(columns: Sequence[DiagnosisColumn], name: str, label: str, hint: str, better: str, form) -> TableRow:
    def estimate(diagnosis: Diagnosis | None, name: str = name) -> IntervalEstimate | None:
        return None if diagnosis is None else bootstrap_interval(diagnosis.values(name), groups=_trials(diagnosis))

    def compare(ours: Diagnosis, reference: Diagnosis) -> IntervalEstimate:
        left, right, trials = paired_rows(ours, reference)
        return paired_difference(ours.values(name)[left], reference.values(name)[right], groups=trials)

    def margin(diagnosis: Diagnosis) -> IntervalEstimate:
        pair = diagnosis.values(name), diagnosis.values(f"uniform_{name}")
        return paired_difference(*(pair if better == "higher" else pair[::-1]), groups=_trials(diagnosis))

    attending = next((d for _, _, d in columns if d is not None and d.applies("attention")), None)
    return TableRow(
        label=label,
        hint=hint,
        cells=[instrument_cell(d, "attention", estimate(d), form) for _, _, d in columns],
        extra=estimate_cell(estimate(attending, f"uniform_{name}"), form),
        verdict=_verdict(
            columns,
            compare,
            margin,
            better=better,
            baseline="uniform attention",
            form=_points if form is percent else form,
        ),
    )


def _points(difference: float) -> str:
    """A difference of fractions, in percentage points."""
    return f"{number(100 * difference, 2)}\u00a0pts"


def _ratio_row(
    columns: Sequence[DiagnosisColumn], kind: str, ratios: dict[tuple[int, str], SensitivityRatio]
) -> TableRow:
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
        cells=[
            instrument_cell(d, "interventions", ratios[i, kind].ratio if (i, kind) in ratios else None)
            for i, _, d in columns
        ],
        extra=Cell(text="1", range="no preference"),
        verdict=_verdict(columns, compare, margin, better="higher", baseline="1"),
    )


def grounding_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """Tables and charts of the grounding metrics. None if no policy was diagnosed."""
    diagnosed = [(i, name, d) for i, name, d in columns if d is not None]
    if not diagnosed:
        return None
    kinds = [kind for kind in TITLES if all(kind in d.header["settings"]["kinds"] for _, _, d in diagnosed)]
    ratios = {(i, kind): _ratio(d, kind) for i, _, d in diagnosed for kind in kinds}
    attention, sensitivity = grounding_rows(columns, kinds)
    regimes = list(dict.fromkeys(row["regime"] for _, _, d in diagnosed for row in d.rows))
    return {
        "table": Table(corner="metric", rows=attention, extra="uniform attention"),
        "table_1": Table(corner="intervention", rows=sensitivity, extra="no preference"),
        "samples": _samples(diagnosed, kinds),
        "regimes": [(_heading(columns, regime), regime_table(columns, kinds, regime)) for regime in regimes],
        "intro": _intro([d for _, _, d in diagnosed]),
        "blocks": _block_chart([column for column in diagnosed if column[2].applies("attention")]),
        "ratios": _ratio_chart([column for column in diagnosed if column[2].applies("interventions")], kinds, ratios),
        "averages": Table(corner="intervention and average", rows=_average_rows(columns, kinds, ratios)),
        "note": _note([(name, d) for _, name, d in diagnosed]),
    }


def _samples(diagnosed: Sequence[tuple[int, str, Diagnosis]], kinds: Sequence[str]) -> dict[str, list]:
    """The measures of every sample, policy by policy."""
    measures = ("in_mask_ratio", "centroid_error", "psnr", "action_error")
    values = {
        name: [*(d.values(measure) for measure in measures), *(d.ratios(kind) for kind in kinds)]
        for _, name, d in diagnosed
    }
    places = {name: {key: row for row, key in enumerate(d.keys)} for _, name, d in diagnosed}
    rows = []
    for trial, step in diagnosed[0][2].keys:
        for _, name, _ in diagnosed:
            row = places[name].get((trial, step))
            if row is not None:
                rows.append([f"{trial}, step {step}", name, *(number(float(column[row])) for column in values[name])])
    heads = ["in mask", "centroid error", "PSNR", "action error", *(f"R, {kind}" for kind in kinds)]
    return {"heads": heads, "rows": rows}


def grounding_rows(columns: Sequence[DiagnosisColumn], kinds: Sequence[str]) -> tuple[list[TableRow], list[TableRow]]:
    """The rows of the attention metrics, and those of the sensitivity ratios."""
    ratios = {(i, kind): _ratio(d, kind) for i, _, d in columns if d is not None for kind in kinds}
    starts = [None if d is None else d.start for _, _, d in columns]
    attention = [noting_starts(_metric_row(columns, *metric), starts) for metric in METRICS]
    return attention, [noting_starts(_ratio_row(columns, kind, ratios), starts) for kind in kinds]


def of_regime(columns: Sequence[DiagnosisColumn], regime: str) -> list[DiagnosisColumn]:
    """The same policies on the samples of one regime."""
    return [(i, name, None if d is None else d.of_regime(regime)) for i, name, d in columns]


def regime_table(columns: Sequence[DiagnosisColumn], kinds: Sequence[str], regime: str) -> Table:
    """Attention and sensitivity on the samples of one regime."""
    attention, sensitivity = grounding_rows(of_regime(columns, regime), kinds)
    return Table(corner="metric", rows=[*attention, *sensitivity], extra="uniform attention")


def print_grounding(columns: Sequence[DiagnosisColumn]) -> None:
    """Print the tables in a terminal, for all samples and for every regime."""
    diagnoses = [d for _, _, d in columns if d is not None]
    kinds = [kind for kind in TITLES if all(kind in d.header["settings"]["kinds"] for d in diagnoses)]
    names = [name for _, name, _ in columns]
    attention, sensitivity = grounding_rows(columns, kinds)
    everything = Table(corner="metric", rows=[*attention, *sensitivity], extra="uniform attention")
    print_table(everything, names, title=f"all regimes: {len(diagnoses[0].rows)} samples")
    for regime in dict.fromkeys(row["regime"] for row in diagnoses[0].rows):
        print_table(regime_table(columns, kinds, regime), names, title=_heading(columns, regime))


def _heading(columns: Sequence[DiagnosisColumn], regime: str) -> str:
    """The regime's number of samples, and of those with a matched mask where interventions apply."""
    diagnoses = [d for _, _, d in columns if d is not None]
    counts = [sum(row["regime"] == regime for row in d.rows) for d in diagnoses]
    masked = [
        sum(row["regime"] == regime and row["deviation"] is not None for row in d.rows)
        for d in diagnoses
        if d.applies("interventions")
    ]
    heading = f"{regime.replace('_', ' ')}: {_span(counts)} samples"
    return heading + (f", {_span(masked)} with a matched mask" if masked else "")


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


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
                instrument_cell(d, "interventions", getattr(ratios[i, kind], name) if (i, kind) in ratios else None)
                for i, _, d in columns
            ],
        )
        for kind in kinds
        for name, label in averages
    ]


def _intro(diagnoses: Sequence[Diagnosis]) -> str:
    samples, trials = len(diagnoses[0].rows), len(set(_trials(diagnoses[0])))
    grids = [diagnosis.header["grid"] for diagnosis in diagnoses if diagnosis.header["grid"]]
    if not grids:
        return (
            f"{samples} samples from {trials} recorded trials. "
            "No policy reads token grids: grounding is not applicable."
        )
    t, h, w = grids[0]
    return (
        f"{samples} samples from {trials} recorded trials. The mask holds the acting hand and the target object, from "
        f"the simulator's segmentation or from annotations, on a {t} × {h} × {w} token grid (latent frames × rows × "
        "columns). Intervals are bootstrap intervals over trials, since samples of one trial are not independent."
    )


def _note(named: Sequence[tuple[str, Diagnosis]]) -> str:
    settings = named[0][1].header["settings"]
    parts = [
        "Attention: mean over heads, action tokens and denoising steps, without the state token, then over the "
        "cross-attention blocks. Centroid error: distance between the centroids of attention and mask in each latent "
        "frame, averaged over the frames. Sensitivity ratio: change of the normalised action chunk (Euclidean) when "
        "the mask's tokens are replaced in every layer that the action head reads, over the mean change for "
        f"{settings['background_sets']} random sets of as many tokens outside the mask, matched per latent frame, "
        f"under each of {settings['noise_samples']} samples of the policy's noise, averaged on both sides. The table "
        "shows the median over samples, and differences of medians."
    ]
    starts = dict.fromkeys(diagnosis.start for _, diagnosis in named)
    if len(starts) == 1:
        parts.append(f"Answers start from {next(iter(starts))}.")
    else:
        parts.append(f"Answers start from {', '.join(f'{d.start} ({name})' for name, d in named)}.")
    for name, diagnosis in named:
        left_out = sum(row["note"] is not None for row in diagnosis.rows)
        if left_out and diagnosis.applies("interventions"):
            parts.append(f"{name}: {left_out} samples could not be matched with background and count in no ratio.")
    return " ".join(parts)


def block_names(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """The cross-attention blocks, from 1, with the layer that each reads if all policies agree on it."""
    names = []
    for block in range(max((d.arrays["attention"].shape[1] for d in diagnoses if "attention" in d.arrays), default=0)):
        layers = {d.header["bridged_layers"][block] for d in diagnoses if block < len(d.header["bridged_layers"])}
        names.append(f"block {block + 1}" + (f", layer {layers.pop()}" if len(layers) == 1 else ""))
    return names


Groups = list[tuple[str, list[Interval]]]


def _dot(name: str, index: int, estimate: IntervalEstimate, form=number) -> Interval:
    label = f"{name}: {form(estimate.value)}"
    return Interval(label=label, index=index, value=estimate.value, low=estimate.low, high=estimate.high)


def _ceiling(groups: Groups, least: float) -> float:
    """The end of an axis from 0: beyond every finite value, and at least `least`."""
    ends = [end for _, dots in groups for dot in dots for end in (dot.value, dot.high)]
    return 1.06 * max([least, *(end for end in ends if math.isfinite(end))])


def _block_chart(attending: Sequence[tuple[int, str, Diagnosis]]) -> Markup | None:
    """Attention in the mask by block. None without a policy whose attention can be read."""
    if not attending:
        return None

    def estimate(diagnosis: Diagnosis, block: int) -> IntervalEstimate:
        rows = [row["in_mask_ratio_by_block"] for row in diagnosis.rows]
        values = np.array([math.nan if row is None or block >= len(row) else row[block] for row in rows])
        return bootstrap_interval(values, groups=_trials(diagnosis), resamples=500)

    groups: Groups = [
        (title, [_dot(name, index, estimate(diagnosis, block), percent) for index, name, diagnosis in attending])
        for block, title in enumerate(block_names([d for _, _, d in attending]))
    ]
    fractions = attending[0][2].values("uniform_in_mask_ratio")
    uniform = float(np.nanmean(fractions)) if np.isfinite(fractions).any() else None
    limits = (0.0, _ceiling(groups, uniform or 0.01))
    return interval_chart(
        groups, title="Attention in the mask by block", limits=limits, percent=True, reference=uniform
    )


def _ratio_chart(
    intervened: Sequence[tuple[int, str, Diagnosis]],
    kinds: Sequence[str],
    ratios: dict[tuple[int, str], SensitivityRatio],
) -> Markup | None:
    """The ratios by intervention. None without a policy whose tokens can be replaced."""
    if not kinds or not intervened:
        return None
    groups: Groups = [
        (TITLES[kind], [_dot(name, index, ratios[index, kind].ratio) for index, name, _ in intervened])
        for kind in kinds
    ]
    return interval_chart(groups, title="Matched sensitivity ratio", limits=(0.0, _ceiling(groups, 1.2)), reference=1.0)
