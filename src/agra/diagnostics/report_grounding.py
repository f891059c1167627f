"""The report's grounding tables and its gallery, from diagnosis folders.                        4.2.1; Table 1, Figs. 2-5"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from agra.diagnostics.figures import Interval, data_uri, interval_chart, outline, packed, packed_colours
from agra.diagnostics.metrics import (
    Estimate,
    SensitivityRatio,
    bootstrap_interval,
    matched_sensitivity_ratio,
    paired_difference,
)
from agra.diagnostics.record import Diagnosis
from agra.diagnostics.report_tables import (
    MISSING,
    Cell,
    Row,
    Table,
    difference_cell,
    estimate_cell,
    number,
    percent,
)

RAMP = ((0, 0, 4), (50, 10, 94), (120, 28, 109), (188, 55, 84), (236, 105, 37), (251, 180, 26), (252, 255, 164))
"""Dark to bright with steadily rising lightness, readable under every common colour vision deficiency."""

Column = tuple[int, str, Diagnosis | None]
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


def _paired(ours: Diagnosis, reference: Diagnosis) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Row numbers of the samples that both policies were probed on, and their trials."""
    there = {key: row for row, key in enumerate(reference.keys)}
    common = [(row, there[key]) for row, key in enumerate(ours.keys) if key in there]
    rows = np.array(common, dtype=int).reshape(-1, 2)
    return rows[:, 0], rows[:, 1], [ours.rows[row]["trial"] for row in rows[:, 0]]


def _trials(diagnosis: Diagnosis) -> list[str]:
    return [row["trial"] for row in diagnosis.rows]


def _ratio(diagnosis: Diagnosis, kind: str) -> SensitivityRatio:
    inside, outside = diagnosis.deviations(kind)
    known = np.isfinite(inside)
    trials = [trial for trial, keep in zip(_trials(diagnosis), known, strict=True) if keep]
    return matched_sensitivity_ratio(inside[known], outside[known], groups=trials)


def _per_sample_ratio(diagnosis: Diagnosis, kind: str) -> np.ndarray:
    inside, outside = diagnosis.deviations(kind)
    with np.errstate(divide="ignore", invalid="ignore"):
        return inside / outside.mean(axis=1)


def _verdicts(columns: Sequence[Column], compare, margin, *, better: str, baseline: str, form=number) -> list[Cell]:
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


def _metric_row(columns: Sequence[Column], name: str, label: str, hint: str, better: str, form) -> Row:
    def estimate(diagnosis: Diagnosis | None, name: str = name) -> Estimate | None:
        return None if diagnosis is None else bootstrap_interval(diagnosis.values(name), groups=_trials(diagnosis))

    def compare(ours: Diagnosis, reference: Diagnosis) -> Estimate:
        left, right, trials = _paired(ours, reference)
        return paired_difference(ours.values(name)[left], reference.values(name)[right], groups=trials)

    def margin(diagnosis: Diagnosis) -> Estimate:
        pair = diagnosis.values(name), diagnosis.values(f"uniform_{name}")
        return paired_difference(*(pair if better == "higher" else pair[::-1]), groups=_trials(diagnosis))

    any_one = next(d for _, _, d in columns if d is not None)
    return Row(
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


def _ratio_row(columns: Sequence[Column], kind: str, ratios: dict[tuple[int, str], SensitivityRatio]) -> Row:
    def compare(ours: Diagnosis, reference: Diagnosis) -> Estimate:
        left, right, trials = _paired(ours, reference)
        a, b = _per_sample_ratio(ours, kind)[left], _per_sample_ratio(reference, kind)[right]
        return paired_difference(a, b, statistic=np.median, groups=trials)

    def margin(diagnosis: Diagnosis) -> Estimate:
        ratio = _ratio(diagnosis, kind).ratio
        return replace(ratio, value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1)

    return Row(
        label=f"Sensitivity ratio, {kind}",
        hint=f"{TITLES[kind]}; higher is better",
        cells=[estimate_cell(ratios[i, kind].ratio) if (i, kind) in ratios else MISSING for i, _, _ in columns],
        extra=Cell(text="1", range="no preference"),
        verdicts=_verdicts(columns, compare, margin, better="higher", baseline="1"),
    )


def grounding_section(columns: Sequence[Column]) -> dict[str, Any] | None:
    """Tables and charts of the grounding metrics; None if no policy was diagnosed."""
    known = [(i, name, d) for i, name, d in columns if d is not None]
    if not known:
        return None
    kinds = [kind for kind in TITLES if all(kind in d.header["settings"]["kinds"] for _, _, d in known)]
    ratios = {(i, kind): _ratio(d, kind) for i, _, d in known for kind in kinds}
    rows = [_metric_row(columns, *metric) for metric in METRICS]
    rows += [_ratio_row(columns, kind, ratios) for kind in kinds]
    return {
        "table": Table(corner="metric", rows=rows, extra="evenly spread"),
        "intro": _intro([d for _, _, d in known]),
        "blocks": _block_chart(known),
        "ratios": _ratio_chart(known, kinds, ratios) if kinds else None,
        "averages": Table(corner="intervention and average", rows=_average_rows(columns, kinds, ratios)),
        "note": _note([d for _, _, d in known], [(name, d) for _, name, d in known]),
    }


def _average_rows(
    columns: Sequence[Column], kinds: Sequence[str], ratios: dict[tuple[int, str], SensitivityRatio]
) -> list[Row]:
    averages = (
        ("ratio", "median of the ratios"),
        ("mean", "mean of the ratios"),
        ("ratio_of_means", "ratio of the means"),
    )
    return [
        Row(
            label=f"{kind}, {label}",
            cells=[
                estimate_cell(getattr(ratios[i, kind], name)) if (i, kind) in ratios else MISSING for i, _, _ in columns
            ],
            verdicts=[Cell(text="") for _ in columns[1:]],
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
        f"{settings['draws']} random sets of as many tokens outside the mask, frame by frame; the median over samples, and "
        "differences are those of the medians."
    ]
    for name, diagnosis in named:
        left_out = sum(row["note"] is not None for row in diagnosis.rows)
        if left_out:
            parts.append(f"{name}: {left_out} samples could not be matched with background and count in no ratio.")
    return " ".join(parts)


def _block_chart(known: Sequence[tuple[int, str, Diagnosis]]) -> Markup:
    blocks = max(d.arrays["attention"].shape[1] for _, _, d in known)
    groups, ceiling, even = [], 0.0, math.nan
    for block in range(blocks):
        dots = []
        for index, name, diagnosis in known:
            rows = [row["in_mask_ratio_by_block"] for row in diagnosis.rows]
            values = np.array([math.nan if r is None or block >= len(r) else r[block] for r in rows])
            one = bootstrap_interval(values, groups=_trials(diagnosis), resamples=500)
            dots.append(
                Interval(
                    label=f"{name}: {percent(one.value)}", index=index, value=one.value, low=one.low, high=one.high
                )
            )
            ceiling = max([ceiling, *(v for v in (one.value, one.high) if math.isfinite(v))])
        layers = {d.header["bridged_layers"][block] for _, _, d in known if block < len(d.header["bridged_layers"])}
        layer = f", video layer {layers.pop()}" if len(layers) == 1 else ""
        groups.append((f"block {block + 1}{layer}", dots))
        even = float(np.nanmean(known[0][2].values("uniform_in_mask_ratio")))
    limits = (0.0, max(ceiling, even if math.isfinite(even) else 0, 0.01) * 1.08)
    reference = even if math.isfinite(even) else None
    return interval_chart(
        groups, title="Attention in the mask by block", limits=limits, percent=True, reference=reference
    )


def _ratio_chart(
    known: Sequence[tuple[int, str, Diagnosis]], kinds: Sequence[str], ratios: dict[tuple[int, str], SensitivityRatio]
) -> Markup:
    groups, ceiling = [], 1.2
    for kind in kinds:
        dots = []
        for index, name, _ in known:
            one = ratios[index, kind].ratio
            dots.append(
                Interval(label=f"{name}: {number(one.value)}", index=index, value=one.value, low=one.low, high=one.high)
            )
            ceiling = max([ceiling, *(v for v in (one.value, one.high) if math.isfinite(v))])
        groups.append((TITLES[kind], dots))
    return interval_chart(groups, title="Matched sensitivity ratio", limits=(0.0, ceiling * 1.05), reference=1.0)


def gallery_section(columns: Sequence[Column]) -> dict[str, Any] | None:
    """The samples that all diagnosed policies have pictures of; None if there are none."""
    known = [(i, d) for i, _, d in columns if d is not None and d.header["gallery"]]
    if not known:
        return None
    pictured = [{d.keys[row]: place for place, row in enumerate(d.header["gallery"])} for _, d in known]
    keys = [key for key in pictured[0] if all(key in other for other in pictured)]
    if not keys:
        return None
    first = known[0][1]
    kinds = [kind for kind in TITLES if all(f"sensitivity_{kind}" in d.arrays for _, d in known)]
    layers = sorted(
        {int(n.removeprefix("pca_layer_")) for _, d in known for n in d.arrays if n.startswith("pca_layer_")}
    )
    samples, payload = [], []
    for key in keys:
        places = [place[key] for place in pictured]
        payload.append(_sample_data([(d, p) for (_, d), p in zip(known, places, strict=True)], kinds, layers))
        samples.append(_sample_head(first, places[0], payload[-1], [i for i, _ in known], known, key, kinds, layers))
    frames = int(first.header["grid"][0])
    data = {"frames": frames, "ramp": RAMP, "samples": payload}
    bridged = {tuple(d.header["bridged_layers"]) for _, d in known}
    blocks = max(d.arrays["attention"].shape[1] for _, d in known)
    names = [f"block {b + 1}" + (f" (video layer {first.header['bridged_layers'][b]})" if len(bridged) == 1 else "")
             for b in range(blocks)]  # fmt: skip
    return {
        "samples": samples,
        "data": Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        "frames": frames,
        "blocks": ["mean of all blocks", *names],
        "layers": layers,
        "layer": layers[len(layers) // 2] if layers else None,
        "columns": 1 + len(kinds) + bool(layers),
        "teacher": next((d.header["teacher"] for _, d in known if d.header["teacher"]), None),
        "intro": (
            "What each policy reads, and what moves its action, at the same moments under the same noise. The policy sees "
            "the first frame only; the later frames and masks come from the recording and stand for the latent frames "
            "that the video DiT imagines. Samples are spread evenly over the list, not chosen."
        ),
        "legend": _legend(first, kinds, bool(layers)),
    }


def _sample_data(arms: Sequence[tuple[Diagnosis, int]], kinds: Sequence[str], layers: Sequence[int]) -> dict[str, Any]:
    """What the page's script draws from, for one sample."""
    diagnosis, place = arms[0]
    frames, masks = diagnosis.arrays["frames"][place], diagnosis.arrays["frame_masks"][place]

    def arm(diagnosis: Diagnosis, place: int) -> dict[str, Any]:
        attention = diagnosis.arrays["attention"][diagnosis.header["gallery"][place]]
        return {
            "attention": packed(np.concatenate([attention.mean(axis=0, keepdims=True), attention])),
            "maps": {kind: packed(diagnosis.arrays[f"sensitivity_{kind}"][place]) for kind in kinds},
            "pca": {
                str(layer): packed_colours(diagnosis.arrays[f"pca_layer_{layer}"][place])
                for layer in layers
                if f"pca_layer_{layer}" in diagnosis.arrays
            },
        }

    teacher = next((d.arrays["pca_teacher"][p] for d, p in arms if "pca_teacher" in d.arrays), None)
    return {
        "frames": [data_uri(frame) for frame in frames],
        "outlines": [outline(mask) for mask in masks],
        "teacher": None if teacher is None else packed_colours(teacher),
        "arms": [arm(*a) for a in arms],
    }


def _sample_head(
    first: Diagnosis,
    place: int,
    data: dict[str, Any],
    indices: Sequence[int],
    known: Sequence[tuple[int, Diagnosis]],
    key: tuple[str, int],
    kinds: Sequence[str],
    layers: Sequence[int],
) -> dict[str, Any]:
    """What the template prints around one sample's pictures."""
    row = first.rows[first.header["gallery"][place]]
    height, width = first.arrays["frames"].shape[2:4]

    def panels(diagnosis: Diagnosis, arm: dict[str, Any]) -> list[dict[str, str]]:
        own = diagnosis.rows[diagnosis.keys.index(key)]
        share = own["in_mask_ratio"]
        caption = "" if share is None else f"{percent(share)} in mask, evenly {percent(own['uniform_in_mask_ratio'])}"
        heat = [
            {"kind": "map", "name": kind, "title": f"Sensitivity, {kind}", "caption": f"peak\u00a0Δ\u00a0{number(arm['maps'][kind]['peak'], 2)}"}
            for kind in kinds
        ]  # fmt: skip
        pca = [{"kind": "pca", "name": "", "title": "Video DiT PCA", "caption": ""}] if layers else []
        return [{"kind": "attention", "name": "", "title": "Attention", "caption": caption}, *heat, *pca]

    arms = [
        {"index": index, "position": position, "panels": panels(diagnosis, data["arms"][position])}
        for position, (index, (_, diagnosis)) in enumerate(zip(indices, known, strict=True))
    ]
    return {
        "instruction": row["instruction"],
        "regime": row["regime"].replace("_", " "),
        "trial": row["trial"],
        "step": row["step"],
        "width": int(width),
        "height": int(height),
        "first": data["frames"][0],
        "teacher": data["teacher"] is not None,
        "arms": arms,
    }


def _legend(first: Diagnosis, kinds: Sequence[str], pictured: bool) -> list[str]:
    lines = [
        "Attention: averaged over heads, action tokens and denoising steps, without the state token. The colours of a "
        "picture run from its least to its greatest value, so a dull picture may still be an even one: compare the "
        "percentage in the mask with what evenly spread attention would give."
    ]
    if kinds:
        cell = (
            "one position in all latent frames at once, so these maps do not change with the latent frame"
            if first.header["settings"]["map_unit"] == "column"
            else "one token of one latent frame"
        )
        lines.append(
            f"Sensitivity: how far the normalised action chunk moves (Δ, Euclidean) when the hidden tokens of a cell, {cell}, "
            "are replaced in every bridged layer by their mean over the sample, or by zeros; same action noise on both sides."
        )
    if pictured:
        lines.append(
            "PCA: the first three principal components as red, green and blue, fitted jointly over all samples shown, for "
            "each layer and the teacher alone. Colours can be compared between samples of one source, not between sources."
        )
    return lines
