"""The report's gallery (Figs. 2-5, 14-16): attention, sensitivity, PCA and predicted video of each policy, for a few
samples.

The pictures are small grids. The page's script paints them over the recorded frames, so that the file stays small and
readers can step through blocks, latent frames and layers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from agra.diagnostics.record import Diagnosis
from agra.diagnostics.report.comparison_table import number, percent
from agra.diagnostics.report.figures import outline, packed, packed_colours, packed_slices, photo_uri, run_lengths
from agra.diagnostics.report.grounding_section import TITLES, DiagnosisColumn, block_names

RAMP = ((0, 0, 4), (50, 10, 94), (120, 28, 109), (188, 55, 84), (236, 105, 37), (251, 180, 26), (252, 255, 164))
"""Dark to bright with steadily rising lightness, readable under every common colour vision deficiency."""
PARTS = {"steps": "denoising step", "heads": "head", "actions": "action token"}
"""The axes along which attention can be shown in parts."""
PARTS_BUDGET = 12_000_000
"""Bytes of the page for attention in parts. Beyond it the axes with the most parts are left out."""
PICTURES = {
    "attention": "attention",
    "interventions": "sensitivity",
    "hidden_states": "PCA",
    "imagination": "predicted video",
}
"""The pictures of each instrument."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Arm:
    """One policy's pictures of one sample."""

    index: int  # the policy's number
    diagnosis: Diagnosis
    place: int  # the sample's place in the gallery's arrays

    @property
    def row(self) -> int:
        """The sample's row among all samples."""
        return self.diagnosis.header["gallery"][self.place]

    def array(self, name: str) -> np.ndarray | None:
        """The sample's part of an array of the gallery. None if the diagnosis does not have the array."""
        return self.diagnosis.arrays[name][self.place] if name in self.diagnosis.arrays else None

    @property
    def attention(self) -> np.ndarray | None:
        """(1 + J, T, H, W): the mean over the blocks, then every block. None if not applicable."""
        if "attention" not in self.diagnosis.arrays:
            return None
        blocks = self.diagnosis.arrays["attention"][self.row]
        return np.concatenate([blocks.mean(axis=0, keepdims=True), blocks])

    @property
    def text_attention(self) -> np.ndarray | None:
        """(layers, words, T, H, W). None if not applicable."""
        weights = self.diagnosis.arrays.get(f"text_attention_{self.place}")
        return None if weights is None else weights.astype(np.float32)


def gallery_section(columns: Sequence[DiagnosisColumn]) -> dict[str, Any] | None:
    """The samples of which all diagnosed policies have pictures. None without one."""
    pictured = [(i, name, d) for i, name, d in columns if d is not None and d.header["gallery"]]
    samples = _common_samples([(i, d) for i, _, d in pictured])
    if not samples:
        return None
    diagnoses = [d for _, _, d in pictured]
    kinds = [kind for kind in TITLES if any(f"sensitivity_{kind}" in d.arrays for d in diagnoses)]
    arrays = {name for d in diagnoses for name in d.arrays if name.startswith("pca_layer_")}
    layers = sorted(int(name.removeprefix("pca_layer_")) for name in arrays)
    aligned = [layer for d in diagnoses for layer in d.header["aligned_layers"] if layer in layers]
    parts = _affordable(diagnoses, len(samples))
    drawn = [_drawn(arms, kinds, layers, parts) for arms in samples]
    frames = max(d.arrays["frames"].shape[1] for d in diagnoses)
    data = {
        "frames": frames,
        "ramp": RAMP,
        "samples": drawn,
        "layers": layers,
        "blocks": block_names(diagnoses),
        "names": [name for _, name, _ in pictured],
    }
    imagined = any("imagined" in d.arrays for d in diagnoses)
    return {
        "parts": {name: PARTS[name] for name in parts},
        "imagined": imagined,
        "attention": any("attention" in d.arrays for d in diagnoses),
        "texts": any(d.header["words"] for d in diagnoses),
        "samples": [_printed(arms, sample, kinds) for arms, sample in zip(samples, drawn, strict=True)],
        "data": Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        "frames": frames,
        "blocks": ["mean of all blocks", *block_names(diagnoses)],
        "layers": layers,
        "layer": (aligned or layers[len(layers) // 2 :] or [None])[0],
        "columns": max(1, 1 + len(kinds) + bool(layers) + imagined),
        "teacher": next((d.header["teacher"].replace("_", " ") for d in diagnoses if d.header["teacher"]), None),
        "intro": (
            "Attention and sensitivity of each policy at the same moments under the same noise. The policy's input is "
            "the first frame alone. The later frames and masks come from the recording and stand for the latent frames "
            "that the policy predicts. Samples are spread evenly over the list, not selected."
        ),
        "legend": _legend(diagnoses, kinds, bool(layers)),
    }


def _common_samples(pictured: Sequence[tuple[int, Diagnosis]]) -> list[list[_Arm]]:
    """The pictures of every policy, for each sample that all of them have in the gallery."""
    places = [{d.keys[row]: place for place, row in enumerate(d.header["gallery"])} for _, d in pictured]
    keys = [key for key in places[0] if all(key in other for other in places)] if pictured else []
    return [
        [_Arm(index=i, diagnosis=d, place=place[key]) for (i, d), place in zip(pictured, places, strict=True)]
        for key in keys
    ]


def _affordable(diagnoses: Sequence[Diagnosis], samples: int) -> list[str]:
    """The axes of attention whose parts fit into the page, those with the fewest parts first."""
    sizes = {
        name: sum(d.arrays[array][0].size for d in diagnoses if array in d.arrays)
        for name in PARTS
        if any((array := f"attention_by_{name}") in d.arrays for d in diagnoses)
    }
    affordable, used = [], 0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        used += sizes[name] * samples * 4 // 3
        if used <= PARTS_BUDGET:
            affordable.append(name)
    return affordable


def _drawn(arms: Sequence[_Arm], kinds: Sequence[str], layers: Sequence[int], parts: Sequence[str]) -> dict[str, Any]:
    """The data of one sample for the page's script. Pictures that are not applicable are null or absent."""
    base = max(arms, key=lambda arm: arm.diagnosis.arrays["frames"].shape[1])  # a method may need fewer frames
    frames, masks = base.array("frames"), base.array("frame_masks")
    assert frames is not None
    assert masks is not None

    def arm_data(arm: _Arm) -> dict[str, Any]:
        by_part = {name: arm.array(f"attention_by_{name}") for name in parts}
        maps = {kind: arm.array(f"sensitivity_{kind}") for kind in kinds}
        colours = {str(layer): arm.array(f"pca_layer_{layer}") for layer in layers}
        words, text = arm.diagnosis.header["words"], arm.text_attention
        return {
            "attention": None if arm.attention is None else packed(arm.attention),
            "parts": {name: packed_slices(_with_mean(part)) for name, part in by_part.items() if part is not None},
            "words": [] if text is None else words[arm.place],
            "text": None if text is None else packed_slices(text),
            "text_layers": arm.diagnosis.header["layers"],
            "imagined": _last_covered(arm.array("imagined"), len(frames)),
            "maps": {kind: packed(heat) for kind, heat in maps.items() if heat is not None},
            "pca": {layer: packed_colours(image) for layer, image in colours.items() if image is not None},
        }

    teachers = {
        str(arm.diagnosis.header["teacher"]).replace("_", " "): packed_colours(image)
        for arm in arms
        if (image := arm.array("pca_teacher")) is not None
    }
    names = ("images", "frame_size", "crop", "instruction")
    return {
        "frames": [photo_uri(frame) for frame in frames],
        "outlines": [outline(mask) for mask in masks],
        "masks": [run_lengths(mask) for mask in masks],
        "size": list(frames.shape[1:3]),
        **{name: base.diagnosis.rows[base.row][name] for name in names},
        "later": _last_covered(base.array("recorded"), len(frames)),
        "teachers": list(teachers.items()),
        "arms": [arm_data(arm) for arm in arms],
    }


def _last_covered(video: np.ndarray | None, latent_frames: int) -> list[str] | None:
    """The last frame that each latent frame of a causal codec covers."""
    if video is None:
        return None
    stride = (len(video) - 1) // max(1, latent_frames - 1)
    return [photo_uri(video[min(stride * frame, len(video) - 1)]) for frame in range(latent_frames)]


def _with_mean(part: np.ndarray) -> np.ndarray:
    """(parts, 1 + J, T, H, W) from (parts, J, T, H, W): the mean over the blocks first, as the page counts blocks."""
    values = part.astype(np.float32)
    return np.concatenate([values.mean(axis=1, keepdims=True), values], axis=1)


def _panels(arm: _Arm, kinds: Sequence[str]) -> list[dict[str, str]]:
    """The panels of one policy and sample, with their captions."""
    row, panels = arm.diagnosis.rows[arm.row], []
    if arm.attention is not None:
        fraction, uniform = row["in_mask_ratio"], row["uniform_in_mask_ratio"]
        caption = "" if fraction is None else f"{percent(fraction)} in mask, uniform {percent(uniform)}"
        panels.append({"kind": "attention", "name": "", "title": "Attention", "caption": caption})
    for kind in kinds:
        heat = arm.array(f"sensitivity_{kind}")
        if heat is not None:
            peak = f"peak\u00a0Δ\u00a0{number(float(heat.max()), 2)}"
            panels.append({"kind": "map", "name": kind, "title": f"Sensitivity, {kind}", "caption": peak})
    if any(name.startswith("pca_layer_") for name in arm.diagnosis.arrays):
        panels.append({"kind": "pca", "name": "", "title": "Hidden state PCA", "caption": ""})
    if arm.array("imagined") is not None:
        caption = ""
        if row["psnr"] is not None:
            static = "equal" if row["still_psnr"] is None else number(row["still_psnr"])  # the scene did not move
            caption = f"{number(row['psnr'])}\u00a0dB, static {static}"
        panels.append({"kind": "imagined", "name": "", "title": "Predicted video", "caption": caption})
    return panels


def _printed(arms: Sequence[_Arm], drawn: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The text of the template around one sample's pictures."""

    def missing(arm: _Arm) -> str:
        names = [title for instrument, title in PICTURES.items() if not arm.diagnosis.applies(instrument)]
        return f"Not applicable: {', '.join(names)}." if names else ""

    row = arms[0].diagnosis.rows[arms[0].row]
    height, width = drawn["size"]
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
            {"index": arm.index, "position": position, "panels": _panels(arm, kinds), "missing": missing(arm)}
            for position, arm in enumerate(arms)
        ],
    }


def _legend(diagnoses: Sequence[Diagnosis], kinds: Sequence[str], pictured: bool) -> list[str]:
    lines = []
    if any("attention" in diagnosis.arrays for diagnosis in diagnoses):
        lines.append(
            "Attention: averaged over heads, action tokens and denoising steps, without the state token. The colours "
            "of a picture run from its minimum to its maximum, so a picture with contrast may still be nearly uniform: "
            "compare the percentage in the mask with that of uniform attention."
        )
    if kinds:
        cell = (
            "one position in all latent frames at once, so these maps do not change with the latent frame"
            if diagnoses[0].header["settings"]["map_unit"] == "column"
            else "one token of one latent frame"
        )
        lines.append(
            "Sensitivity: change of the normalised action chunk (Δ, Euclidean) when the hidden tokens of a cell, "
            f"{cell}, are replaced in every layer that the action head reads by their mean over the sample, or by "
            "zeros, under the same action noise."
        )
    if any("imagined" in diagnosis.arrays for diagnosis in diagnoses):
        lines.append(
            "Predicted video: the decoded prediction from this observation, at the last frame that the latent frame "
            "covers. The recording beside it shows the same instant. The caption compares all future frames with the "
            "recorded frames, and a static video with them."
        )
    if pictured:
        lines.append(
            "PCA: the first three principal components as red, green and blue, fitted jointly over all samples of this "
            "page, for each layer and the teacher separately. Colours can be compared between samples of one source, "
            "not between sources."
        )
    return lines
