"""Arms of several seeds side by side: python runs/comparison.py FOLDER REFERENCE ARM ...

FOLDER holds runs named ARM_SEED, evaluated and diagnosed. Every number is a mean over the arm's seeds and samples; an
arm is compared with the reference on the seeds, trials and samples that both have. Intervals are 95 % bootstrap
intervals that draw whole trials, with all that was measured on them under every seed: they say what other trials would
change, and the values by seed what another training run might.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agra.diagnostics.visual_reliance import VisualReliance
from agra.diagnostics.metrics import IntervalEstimate, bootstrap_interval, paired_difference
from agra.diagnostics.record import read_diagnosis
from agra.evaluation.results import read_results

Values = dict[tuple, float]
"""A number by trial, or by trial and step."""


def success(run: Path) -> Values:
    """1 for every trial that succeeded, else 0."""
    return {(t.trial,): float(t.success) for t in read_results(run / "results.jsonl").trials}


def reached(run: Path) -> Values:
    """1 for every trial in which the right thing was grasped, else 0."""
    return {(t.trial,): float(t.progress["grasped"]) for t in read_results(run / "results.jsonl").trials}


def of_samples(name: str, run: Path) -> Values:
    """A grounding metric of every sample."""
    diagnosis = read_diagnosis(run / "diagnosis")
    return dict(zip(diagnosis.keys, diagnosis.values(name).tolist(), strict=True))


def sensitivity(kind: str, run: Path) -> Values:
    """The matched sensitivity ratio of every sample that has one."""
    diagnosis = read_diagnosis(run / "diagnosis")
    return dict(zip(diagnosis.keys, diagnosis.ratios(kind).tolist(), strict=True))


def looking(measure: str, run: Path) -> Values:
    """A measure of every first look, in centimetres."""
    seen = VisualReliance.load(run / "diagnosis" / "visual_reliance.json")
    return {(trial,): 100 * value for trial, value in zip(seen.trials, seen.values[measure].tolist(), strict=True)}


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
    Measure(label="grasped the right thing, %", read=reached, digits=1, scale=100),
    Measure(label="first target's error, cm", read=partial(looking, "error"), digits=1),
    Measure(label="shift when the image is swapped, cm", read=partial(looking, "image_swap_shift"), digits=1),
    Measure(label="attention in mask, %", read=partial(of_samples, "in_mask_ratio"), digits=1, scale=100),
    Measure(label="centroid error, grid units", read=partial(of_samples, "centroid_error"), digits=2),
    *(
        Measure(label=f"sensitivity ratio, {kind}", read=partial(sensitivity, kind), digits=2, statistic=np.median)
        for kind in ("mean", "zero", "shuffle", "swap")
    ),
)


def main(folder: Path, names: Sequence[str]) -> None:
    """Print a table for each measure and write everything to comparison.json."""
    arms = {
        name: {int(run.name.rpartition("_")[2]): run for run in sorted(folder.glob(f"{name}_[0-9]*"))} for name in names
    }
    for name, runs in arms.items():
        if not runs:
            raise SystemExit(f"{folder}: no run named {name}_SEED")
    console, written = Console(width=160), {}
    for measure in MEASURES:
        table = Table("arm", "seeds", "all", "by seed", f"minus {names[0]}", "by seed", title=measure.label)
        values = {name: {seed: measure.read(run) for seed, run in runs.items()} for name, runs in arms.items()}
        for name in names:
            row = _row(measure, values[name], values[names[0]] if name != names[0] else None)
            written.setdefault(measure.label, {})[name] = row
            table.add_row(name, ", ".join(map(str, arms[name])), *_told(row, measure.digits))
        console.print(table)
    temporary = folder / "comparison.json.tmp"
    temporary.write_text(json.dumps(written, indent=2) + "\n")
    temporary.rename(folder / "comparison.json")


def _row(measure: Measure, own: dict[int, Values], reference: dict[int, Values] | None) -> dict:
    def mean(by_seed: dict[int, Values]) -> dict:
        keys = [key for values in by_seed.values() for key in values]
        flat = measure.scale * np.array([v for values in by_seed.values() for v in values.values()])
        found = bootstrap_interval(flat, statistic=measure.statistic, groups=[key[0] for key in keys])
        return _entry(found, {s: measure.scale * _of(measure, [*v.values()]) for s, v in by_seed.items()})

    row = {"value": mean(own)}
    if reference is not None:
        pairs = [(s, key) for s in own if s in reference for key in own[s] if key in reference[s]]
        ours, theirs = (measure.scale * np.array([side[s][key] for s, key in pairs]) for side in (own, reference))
        found = paired_difference(ours, theirs, statistic=measure.statistic, groups=[key[0] for _, key in pairs])
        seeds = np.array([s for s, _ in pairs])
        both = np.isfinite(ours) & np.isfinite(theirs)
        by_seed = {
            int(s): measure.statistic(ours[both & (seeds == s)]) - measure.statistic(theirs[both & (seeds == s)])
            for s in dict.fromkeys(seeds.tolist())
        }
        row["difference"] = _entry(found, by_seed)
    return row


def _of(measure: Measure, values: list[float]) -> float:
    known = np.array(values)
    return float(measure.statistic(known[np.isfinite(known)]))


def _entry(estimate: IntervalEstimate, by_seed: dict[int, float]) -> dict:
    seeds = {str(seed): float(value) for seed, value in by_seed.items()}
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "count": estimate.count,
        "by_seed": seeds,
    }


def _told(row: dict, digits: int) -> list[str]:
    cells = []
    for name in ("value", "difference"):
        if name in row:
            e = row[name]
            cells.append(f"{e['value']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]")
            cells.append(", ".join(f"{value:.{digits}f}" for value in e["by_seed"].values()))
    return cells


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
