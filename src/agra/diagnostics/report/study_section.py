"""The report's layer studies: success and grounding of a policy for every layer aligned or read alone.   Figs. 10, 11"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agra.diagnostics.report.figures import Interval, interval_chart
from agra.diagnostics.record import read_diagnosis
from agra.diagnostics.report.comparison_table import MISSING, Cell, between, number, percent
from agra.evaluation.results import read_results
from agra.evaluation.statistics import wilson_interval

STUDY = "study.json"
FIGURES = {
    "alignment": ("figure-10", "Which layer to align", "Figure 10"),
    "bridge": ("figure-11", "Which layer to read", "Figure 11"),
}
COLUMNS = ("success", "attention in mask", "sensitivity ratio, mean", "held-out action loss")


@dataclass(frozen=True, kw_only=True)
class StudyVariant:
    """One training of a study: what it was judged by, where it was."""

    name: str
    cells: Sequence[Cell]  # one for each of COLUMNS
    success: Interval | None


def study_sections(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A section for each folder of `agra study`. Raises FileNotFoundError or ValueError naming what is unfit."""
    return [_section(Path(folder)) for folder in folders]


def _section(folder: Path) -> dict[str, Any]:
    path = folder / STUDY
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `agra study` writes it")
    content = json.loads(path.read_text())
    if content.get("over") not in FIGURES or not content.get("variants"):
        raise ValueError(f"{path}: expected a study over {' or '.join(FIGURES)} with variants")
    identity, title, figure = FIGURES[content["over"]]
    variants = [_variant(folder / one["name"], one["name"].replace("_", " ")) for one in content["variants"]]
    known = [(one.name, [one.success]) for one in variants if one.success is not None]
    return {
        "id": identity,
        "title": title,
        "figure": figure,
        "intro": f"One training of the {content['stage']} stage ({content['steps']:,} steps) for each row, everything else equal: "
        "one seed each, so differences of a few trials say nothing.",
        "chart": interval_chart(known, title=title, limits=(0.0, 1.0), percent=True) if known else None,
        "columns": COLUMNS,
        "variants": variants,
    }


def _variant(run: Path, name: str) -> StudyVariant:
    success, dot = MISSING, None
    if (run / "results.jsonl").is_file():
        trials = read_results(run / "results.jsonl").trials
        count, total = sum(trial.success for trial in trials), len(trials)
        low, high = wilson_interval(count, total)
        success = Cell(text=f"{percent(count / total)} ({count}/{total})", range=between(low, high, percent))
        dot = Interval(label=f"{name}: {count}/{total}", index=0, value=count / total, low=low, high=high)
    attention = ratio = MISSING
    if (run / "diagnosis").is_dir():
        summary = read_diagnosis(run / "diagnosis").header["summary"]
        attention = _summed(summary["in_mask_ratio"], percent)
        ratio = _summed(summary["sensitivity_mean"]["ratio"], number) if "sensitivity_mean" in summary else MISSING
    return StudyVariant(name=name, cells=(success, attention, ratio, _held_out(run / "metrics.jsonl")), success=dot)


def _summed(entry: dict[str, float | None], form) -> Cell:
    value, low, high = (math.nan if entry[key] is None else float(entry[key] or 0) for key in ("value", "low", "high"))
    return Cell(text=form(value), range=between(low, high, form)) if math.isfinite(value) else MISSING


def _held_out(log: Path) -> Cell:
    if not log.is_file():
        return MISSING
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    losses = [row["validation/action_loss"] for row in rows if "validation/action_loss" in row]
    return Cell(text=number(losses[-1])) if losses else MISSING
