"""The folder of a diagnosis, which `agra report` and other programs read without torch.

    diagnosis.json   policy, checkpoint, noise, seed, settings, grid, instruments that are not applicable, summary with intervals
    metrics.jsonl    one object per sample
    arrays.npz       attention and masks of every sample, pictures of the gallery's samples

Files are written to temporary names and renamed, `diagnosis.json` last. Nothing is pickled.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agra import files
from agra.diagnostics.metrics import IntervalEstimate, bootstrap_interval, matched_sensitivity_ratio
from agra.evaluation.results import start_of_answers

FORMAT = 2
FILES = ("metrics.jsonl", "arrays.npz", "diagnosis.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """One policy's diagnosis. Letters: n samples, g of them in the gallery, J cross-attention blocks.

    `arrays` holds, on the token grid, `attention` (n, J, T, H, W) float32 and `mask` (n, T, H, W) bool. For the gallery
    it holds `frames` (g, T, h, w, 3) uint8, `frame_masks` (g, T, h, w) bool, `sensitivity_KIND` (g, H, W) or
    (g, T, H, W) float32, `pca_layer_L` and, with a teacher, `pca_teacher` (g, T, rows, columns, 3) uint8,
    `attention_by_steps`, `_heads` and `_actions` (g, number of them, J, T, H, W) float16, `imagined` and `recorded`
    (g, F, h, w, 3) uint8, and for the sample at place p of the gallery `text_attention_p` (layers, words, T, H, W)
    float16. Arrays of instruments that are not applicable, or were not used, are absent.
    """

    header: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    arrays: Mapping[str, np.ndarray]

    @property
    def start(self) -> str:
        """The noise from which the policy's answers start, in words. Diagnoses until version 0.1 do not name it."""
        return start_of_answers(self.header) if "action_noise" in self.header else "noise that was not recorded"

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(trial, step) of every sample."""
        return [(row["trial"], row["step"]) for row in self.rows]

    def applies(self, instrument: str) -> bool:
        """Whether the policy's method can offer the instrument (`agra.diagnostics.measurement.InstrumentName`)."""
        return instrument not in self.header["not_applicable"]

    def values(self, name: str) -> np.ndarray:
        """A measure of every sample (n,), NaN for null."""
        return np.array([math.nan if row[name] is None else row[name] for row in self.rows], dtype=np.float64)

    def layer_values(self, name: str, layer: int) -> np.ndarray:
        """A layer's measure of every sample (n,), NaN for null. `name` is without its "_by_layer"."""
        place = self.header["layers"].index(layer) if layer in self.header["layers"] else None
        cells = [row[f"{name}_by_layer"] for row in self.rows]
        values = [None if cell is None or place is None else cell[place] for cell in cells]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def of_regime(self, regime: str) -> "Diagnosis":
        """The samples of one regime, without the gallery."""
        places = [place for place, row in enumerate(self.rows) if row["regime"] == regime]
        arrays = {name: self.arrays[name][places] for name in ("attention", "mask") if name in self.arrays}
        return Diagnosis(header=self.header, rows=[self.rows[place] for place in places], arrays=arrays)

    def deviations(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Delta(I) (n, noise samples) and Delta(B) (n, noise samples, background sets), NaN for unmatched samples."""
        samples, sets = (int(self.header["settings"][name]) for name in ("noise_samples", "background_sets"))
        cells = [row["deviation"][kind] if row["deviation"] else None for row in self.rows]
        unmatched = np.full((samples, sets), math.nan)
        inside = [unmatched[:, 0] if cell is None else cell["interaction"] for cell in cells]
        outside = [unmatched if cell is None else cell["background"] for cell in cells]
        return np.array(inside).reshape(-1, samples), np.array(outside).reshape(-1, samples, sets)

    def ratios(self, kind: str) -> np.ndarray:
        """The matched sensitivity ratio Delta(I) / Delta(B) of every sample (n,). Each side is averaged first."""
        inside, outside = self.deviations(kind)
        with np.errstate(divide="ignore", invalid="ignore"):
            return inside.mean(axis=1) / outside.mean(axis=(1, 2))


def summarise(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """The grounding metrics over all samples, with bootstrap intervals over trials."""

    def mean(name: str) -> dict[str, float]:
        values = [math.nan if row[name] is None else row[name] for row in rows]
        return asdict(bootstrap_interval(np.array(values), groups=[row["trial"] for row in rows], seed=seed))

    names = ("in_mask_ratio", "uniform_in_mask_ratio", "centroid_error", "uniform_centroid_error")
    summary: dict[str, Any] = {name: mean(name) for name in names}
    matched = [row for row in rows if row["deviation"]]
    for kind in kinds:
        ratio = matched_sensitivity_ratio(
            np.array([row["deviation"][kind]["interaction"] for row in matched]),
            np.array([row["deviation"][kind]["background"] for row in matched]),
            groups=[row["trial"] for row in matched],
            seed=seed,
        )
        estimates = {n: asdict(getattr(ratio, n)) for n in ("ratio", "mean", "ratio_of_means")}
        summary[f"sensitivity_{kind}"] = {**estimates, "undefined": ratio.undefined}
    return summary


def estimate(entry: Mapping[str, float | int | None]) -> IntervalEstimate:
    """An `IntervalEstimate` from its JSON, in which null stands for NaN."""
    return IntervalEstimate(**{name: math.nan if value is None else value for name, value in entry.items()})  # type: ignore[arg-type]


def write_diagnosis(diagnosis: Diagnosis, folder: Path) -> None:
    """Write the three files. A diagnosis that was in `folder` is replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(plain(row), allow_nan=False) + "\n" for row in diagnosis.rows]
    # Without this file the folder counts as unfinished, so that a reader never mixes the old and the new diagnosis.
    (folder / "diagnosis.json").unlink(missing_ok=True)
    files.write_text(folder / "metrics.jsonl", "".join(lines))
    with files.replacing(folder / "arrays.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **diagnosis.arrays)  # type: ignore[arg-type]
    header = json.dumps(plain({"format": FORMAT, **diagnosis.header}), indent=2, allow_nan=False)
    files.write_text(folder / "diagnosis.json", header + "\n")


def read_diagnosis(folder: Path) -> Diagnosis:
    """Inverse of `write_diagnosis`.

    Raises FileNotFoundError for a missing file, ValueError for files that do not fit.
    """
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; run `agra diagnose` on this policy")
    header = json.loads((folder / "diagnosis.json").read_text())
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{folder}/diagnosis.json: expected format {FORMAT}, got {header.get('format')}; diagnose the policy again"
        )
    settings = header["settings"]
    for earlier, present in (("noises", "noise_samples"), ("draws", "background_sets")):  # names until version 0.1
        if earlier in settings:
            settings[present] = settings.pop(earlier)
    header.setdefault("not_applicable", [])  # until version 0.1 every diagnosed policy was a WAM
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name in ("attention", "mask"):
        if name in arrays and len(arrays[name]) != len(rows):
            raise ValueError(
                f"{folder}: {len(rows)} samples in metrics.jsonl, but {len(arrays[name])} in {name} of arrays.npz; "
                "diagnose the policy again"
            )
    return Diagnosis(header=header, rows=rows, arrays=arrays)


def plain(value: Any) -> Any:
    """`value` as JSON: numbers that are not finite become None, numpy scalars become Python numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
