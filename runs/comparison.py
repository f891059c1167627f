"""Compare runs of several training seeds: python runs/comparison.py FOLDER REFERENCE NAME ...

FOLDER holds runs named NAME_SEED, evaluated and diagnosed. Every value is a mean (for ratios a median) over seeds and
samples. Each name is compared with the reference on the seeds, trials and samples that both have. Intervals are 95 %
bootstrap intervals over trials, with all measurements of a trial under every seed. They cover the choice of trials. The
values by seed show the variation between training runs.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agra import files
from agra.diagnostics.metrics import IntervalEstimate, bootstrap_interval, paired_difference
from agra.diagnostics.record import plain, read_diagnosis
from agra.diagnostics.visual_reliance import VisualReliance
from agra.evaluation.results import read_results

Values = dict[tuple, float]
"""A value by trial, or by trial and step."""


def success(run: Path) -> Values:
    """1 for every successful trial, 0 for the others."""
    return {(t.trial,): float(t.success) for t in read_results(run / "results.jsonl").trials}


def grasped(run: Path) -> Values:
    """1 for every trial in which the right object was grasped, 0 for the others."""
    return {(t.trial,): float(t.progress["grasped"]) for t in read_results(run / "results.jsonl").trials}


def grounding(name: str, run: Path) -> Values:
    """A grounding metric of every sample."""
    diagnosis = read_diagnosis(run / "diagnosis")
    return dict(zip(diagnosis.keys, diagnosis.values(name).tolist(), strict=True))


def sensitivity(kind: str, run: Path) -> Values:
    """The matched sensitivity ratio of every sample. NaN for samples without one."""
    diagnosis = read_diagnosis(run / "diagnosis")
    return dict(zip(diagnosis.keys, diagnosis.ratios(kind).tolist(), strict=True))


def visual_reliance(measure: str, run: Path) -> Values:
    """A measure of visual reliance of every trial, in centimetres."""
    reliance = VisualReliance.load(run / "diagnosis" / "visual_reliance.json")
    return {(trial,): 100 * v for trial, v in zip(reliance.trials, reliance.values[measure].tolist(), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A row of the table."""

    label: str
    read: Callable[[Path], Values]
    digits: int
    scale: float = 1.0
    statistic: Callable[[np.ndarray], float] = np.mean


MEASURES = (
    Measure(label="success, %", read=success, digits=1, scale=100),
    Measure(label="grasped the right object, %", read=grasped, digits=1, scale=100),
    Measure(label="first target's error, cm", read=partial(visual_reliance, "error"), digits=1),
    Measure(label="shift when the image is swapped, cm", read=partial(visual_reliance, "image_swap_shift"), digits=1),
    Measure(label="attention in mask, %", read=partial(grounding, "in_mask_ratio"), digits=1, scale=100),
    Measure(label="centroid error, grid units", read=partial(grounding, "centroid_error"), digits=2),
    *(
        Measure(label=f"sensitivity ratio, {kind}", read=partial(sensitivity, kind), digits=2, statistic=np.median)
        for kind in ("mean", "zero", "shuffle", "swap")
    ),
)


def main(folder: Path, names: Sequence[str]) -> None:
    """Print a table for each measure and write all of them to comparison.json."""
    runs = {
        name: {int(run.name.rpartition("_")[2]): run for run in sorted(folder.glob(f"{name}_[0-9]*"))} for name in names
    }
    for name, by_seed in runs.items():
        if not by_seed:
            raise SystemExit(f"{folder}: no run named {name}_SEED; runs/comparison.sh trains them")
    console, written = Console(width=160), {}
    for measure in MEASURES:
        table = Table("run", "seeds", "all", "by seed", f"minus {names[0]}", "by seed", title=measure.label)
        values = {name: {s: measure.read(run) for s, run in by_seed.items()} for name, by_seed in runs.items()}
        for name in names:
            row = _row(measure, values[name], values[names[0]] if name != names[0] else None)
            written.setdefault(measure.label, {})[name] = row
            table.add_row(name, ", ".join(map(str, runs[name])), *_cells(row, measure.digits))
        console.print(table)
    files.write_text(folder / "comparison.json", json.dumps(plain(written), indent=2, allow_nan=False) + "\n")


def _row(measure: Measure, by_seed: dict[int, Values], reference: dict[int, Values] | None) -> dict:
    keys = [key for values in by_seed.values() for key in values]
    pooled = measure.scale * np.array([v for values in by_seed.values() for v in values.values()])
    estimate = bootstrap_interval(pooled, statistic=measure.statistic, groups=[key[0] for key in keys])
    row = {"value": _entry(estimate, {s: measure.scale * _average(measure, v.values()) for s, v in by_seed.items()})}
    if reference is not None:
        pairs = [(s, key) for s in by_seed if s in reference for key in by_seed[s] if key in reference[s]]
        ours, theirs = (measure.scale * np.array([side[s][key] for s, key in pairs]) for side in (by_seed, reference))
        estimate = paired_difference(ours, theirs, statistic=measure.statistic, groups=[key[0] for _, key in pairs])
        seeds = np.array([s for s, _ in pairs])
        finite = np.isfinite(ours) & np.isfinite(theirs)
        differences = {
            int(s): _average(measure, ours[finite & (seeds == s)]) - _average(measure, theirs[finite & (seeds == s)])
            for s in dict.fromkeys(seeds.tolist())
        }
        row["difference"] = _entry(estimate, differences)
    return row


def _average(measure: Measure, values: Iterable[float]) -> float:
    """The statistic over the finite values. NaN without one, such as for an instrument that is not applicable."""
    array = np.array([*values])
    finite = array[np.isfinite(array)]
    return float(measure.statistic(finite)) if len(finite) else float("nan")


def _entry(estimate: IntervalEstimate, by_seed: dict[int, float]) -> dict:
    seeds = {str(seed): float(value) for seed, value in by_seed.items()}
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "count": estimate.count,
        "by_seed": seeds,
    }


def _cells(row: dict, digits: int) -> list[str]:
    cells = []
    for name in ("value", "difference"):
        if name in row:
            e = row[name]
            cells.append(f"{e['value']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]")
            cells.append(", ".join(f"{value:.{digits}f}" for value in e["by_seed"].values()))
    return cells


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
