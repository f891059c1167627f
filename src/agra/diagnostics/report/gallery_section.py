"""The report's gallery: for a few samples, what each policy reads and what moves its action.                  Figs. 2-5

The pictures are small grids; the page's script paints them over the recorded frames, so the file stays light and one
can look through blocks, latent frames and layers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from agra.diagnostics.report.figures import outline, packed, packed_colours, packed_slices, photo_uri, run_lengths
from agra.diagnostics.record import Diagnosis
from agra.diagnostics.report.grounding_section import TITLES, DiagnosisColumn, block_names
from agra.diagnostics.report.comparison_table import number, percent

RAMP = ((0, 0, 4), (50, 10, 94), (120, 28, 109), (188, 55, 84), (236, 105, 37), (251, 180, 26), (252, 255, 164))
"""Dark to bright with steadily rising lightness, readable under every common colour vision deficiency."""


PARTS = {"steps": "denoising step", "heads": "head", "actions": "action token"}
"""Along what the attention can be looked at in parts."""
PARTS_BUDGET = 12_000_000
"""Bytes that attention in parts may take in the page; beyond it the longest parts are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Arm:
    """One policy's pictures of one sample."""

    index: int  # the policy's number
    diagnosis: Diagnosis
    place: int  # the sample's place in the gallery's arrays

    @property
    def number(self) -> int:
        """The sample's row among all samples."""
        return self.diagnosis.header["gallery"][self.place]

    def array(self, name: str) -> np.ndarray | None:
        """The sample's part of an array of the gallery, None if this diagnosis has no such array."""
        return self.diagnosis.arrays[name][self.place] if name in self.diagnosis.arrays else None

    def sensitivity(self, kind: str) -> np.ndarray:
        """The sample's map of one intervention."""
        return self.diagnosis.arrays[f"sensitivity_{kind}"][self.place]


def gallery_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """The samples that all diagnosed policies have pictures of; None if there are none."""
    known = [(i, d) for i, _, d in columns if d is not None and d.header["gallery"]]
    samples = _common_samples(known)
    if not samples:
        return None
    diagnoses = [d for _, d in known]
    first = diagnoses[0]
    kinds = [kind for kind in TITLES if all(f"sensitivity_{kind}" in d.arrays for d in diagnoses)]
    pictured = {name for d in diagnoses for name in d.arrays if name.startswith("pca_layer_")}
    layers = sorted(int(name.removeprefix("pca_layer_")) for name in pictured)
    aligned = [layer for d in diagnoses for layer in d.header["aligned_layers"] if layer in layers]
    parts = _affordable(diagnoses, len(samples))
    drawn = [_drawn(arms, kinds, layers, parts) for arms in samples]
    data = {
        "frames": first.header["grid"][0],
        "ramp": RAMP,
        "samples": drawn,
        "layers": layers,
        "blocks": block_names(diagnoses),
        "names": [name for _, name, d in columns if d is not None and d.header["gallery"]],
    }
    return {
        "parts": {name: PARTS[name] for name in parts},
        "imagined": any("imagined" in d.arrays for d in diagnoses),
        "texts": any(d.header["words"] for d in diagnoses),
        "samples": [_printed(arms, one, kinds, pca=bool(layers)) for arms, one in zip(samples, drawn, strict=True)],
        "data": Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        "frames": first.header["grid"][0],
        "blocks": ["mean of all blocks", *block_names(diagnoses)],
        "layers": layers,
        "layer": (aligned or layers[len(layers) // 2 :] or [None])[0],
        "columns": 1 + len(kinds) + bool(layers) + any("imagined" in d.arrays for d in diagnoses),
        "teacher": next((d.header["teacher"] for d in diagnoses if d.header["teacher"]), None),
        "intro": (
            "What each policy reads, and what moves its action, at the same moments under the same noise. The policy sees "
            "the first frame only; the later frames and masks come from the recording and stand for the latent frames "
            "that the video DiT imagines. Samples are spread evenly over the list, not chosen."
        ),
        "legend": _legend(first, kinds, bool(layers)),
    }


def _common_samples(known: Sequence[tuple[int, Diagnosis]]) -> list[list[_Arm]]:
    """For each sample that all of them pictured, every policy's arm."""
    places = [{d.keys[row]: place for place, row in enumerate(d.header["gallery"])} for _, d in known]
    keys = [key for key in places[0] if all(key in other for other in places)] if known else []
    return [
        [_Arm(index=i, diagnosis=d, place=there[key]) for (i, d), there in zip(known, places, strict=True)]
        for key in keys
    ]


def _affordable(diagnoses: Sequence[Diagnosis], samples: int) -> list[str]:
    """The parts of the attention that the page has room for, the shortest first."""
    chosen, used = [], 0
    for name in sorted(PARTS, key=lambda part: sum(d.arrays[f"attention_by_{part}"][0].size for d in diagnoses)):
        used += sum(d.arrays[f"attention_by_{name}"][0].size for d in diagnoses) * samples * 4 // 3
        if used <= PARTS_BUDGET:
            chosen.append(name)
    return chosen


def _drawn(arms: Sequence[_Arm], kinds: Sequence[str], layers: Sequence[int], parts: Sequence[str]) -> dict[str, Any]:
    """What the page's script draws from, for one sample."""
    frames = arms[0].diagnosis.header["grid"][0]

    def arm(one: _Arm) -> dict[str, Any]:
        attention = one.diagnosis.arrays["attention"][one.number]
        colours = {str(layer): one.array(f"pca_layer_{layer}") for layer in layers}
        return {
            "attention": packed(np.concatenate([attention.mean(axis=0, keepdims=True), attention])),
            "parts": {name: packed_slices(_with_mean(one.array(f"attention_by_{name}"))) for name in parts},
            "words": one.diagnosis.header["words"][one.place],
            "text": packed_slices(one.diagnosis.arrays[f"text_attention_{one.place}"].astype(np.float32)),
            "text_layers": one.diagnosis.header["layers"],
            "imagined": _last_covered(one.array("imagined"), frames),
            "maps": {kind: packed(one.sensitivity(kind)) for kind in kinds},
            "pca": {layer: packed_colours(image) for layer, image in colours.items() if image is not None},
        }

    teachers = {
        str(one.diagnosis.header["teacher"]).replace("_", " "): packed_colours(image)
        for one in arms
        if (image := one.array("pca_teacher")) is not None
    }
    arrays, place = arms[0].diagnosis.arrays, arms[0].place
    return {
        "frames": [photo_uri(frame) for frame in arrays["frames"][place]],
        "outlines": [outline(mask) for mask in arrays["frame_masks"][place]],
        "masks": [run_lengths(mask) for mask in arrays["frame_masks"][place]],
        "size": list(arrays["frames"].shape[2:4]),
        **{
            name: arms[0].diagnosis.rows[arms[0].number][name]
            for name in ("images", "frame_size", "crop", "instruction")
        },
        "later": _last_covered(arms[0].array("recorded"), frames),
        "teachers": list(teachers.items()),
        "arms": [arm(one) for one in arms],
    }


def _last_covered(video: np.ndarray | None, latent_frames: int) -> list[str] | None:
    """The last frame that each latent frame of a causal codec covers."""
    if video is None:
        return None
    stride = (len(video) - 1) // max(1, latent_frames - 1)
    return [photo_uri(video[min(stride * frame, len(video) - 1)]) for frame in range(latent_frames)]


def _with_mean(part: np.ndarray | None) -> np.ndarray:
    """(so many, J, T, H, W) with the blocks' mean before them, as the page counts blocks."""
    assert part is not None
    values = part.astype(np.float32)
    return np.concatenate([values.mean(axis=1, keepdims=True), values], axis=1)


def _printed(arms: Sequence[_Arm], drawn: dict[str, Any], kinds: Sequence[str], *, pca: bool) -> dict[str, Any]:
    """What the template prints around one sample's pictures."""

    def panels(one: _Arm) -> list[dict[str, str]]:
        row = one.diagnosis.rows[one.number]
        share, even = row["in_mask_ratio"], row["uniform_in_mask_ratio"]
        caption = "" if share is None else f"{percent(share)} in mask, evenly {percent(even)}"
        found = [{"kind": "attention", "name": "", "title": "Attention", "caption": caption}]
        for kind in kinds:
            peak = f"peak\u00a0Δ\u00a0{number(float(one.sensitivity(kind).max()), 2)}"
            found.append({"kind": "map", "name": kind, "title": f"Sensitivity, {kind}", "caption": peak})
        if pca:
            found.append({"kind": "pca", "name": "", "title": "Video DiT PCA", "caption": ""})
        if one.array("imagined") is not None:
            score = (
                ""
                if row["psnr"] is None
                else f"{number(row['psnr'])}\u00a0dB, nothing moving {number(row['still_psnr'])}"
            )
            found.append({"kind": "imagined", "name": "", "title": "Imagined", "caption": score})
        return found

    row = arms[0].diagnosis.rows[arms[0].number]
    height, width = arms[0].diagnosis.arrays["frames"].shape[2:4]
    return {
        "instruction": row["instruction"],
        "regime": row["regime"].replace("_", " "),
        "trial": row["trial"],
        "step": row["step"],
        "width": int(width),
        "height": int(height),
        "first": drawn["frames"][0],
        "teacher": bool(drawn["teachers"]),
        "later": drawn["later"] is not None,
        "arms": [
            {"index": one.index, "position": position, "panels": panels(one)} for position, one in enumerate(arms)
        ],
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
    if "imagined" in first.arrays:
        lines.append(
            "Imagined: the video that the video DiT predicts from this observation, decoded, at the last frame that the latent "
            "frame covers; the recording beside it shows the same instant. The caption compares all future frames with the "
            "recorded ones, beside a prediction that nothing moves."
        )
    if pictured:
        lines.append(
            "PCA: the first three principal components as red, green and blue, fitted jointly over all samples shown, for "
            "each layer and the teacher alone. Colours can be compared between samples of one source, not between sources."
        )
    return lines
