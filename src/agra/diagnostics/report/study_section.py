"""The report's layer studies (Figs. 10, 11): success and grounding of a policy for every layer aligned, or read,
alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agra.diagnostics.record import estimate, read_diagnosis
from agra.diagnostics.report.comparison_table import MISSING, Cell, between, estimate_cell, number, percent
from agra.diagnostics.report.figures import Interval, interval_chart
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
    """One training of a study and its measures."""

    name: str
    cells: Sequence[Cell]  # for each of COLUMNS
    success: Interval | None


def study_sections(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A section for each folder of `agra study`.

    Raises FileNotFoundError for a missing file, ValueError for an invalid one.
    """
    return [_section(Path(folder)) for folder in folders]


def _section(folder: Path) -> dict[str, Any]:
    path = folder / STUDY
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder that `agra study` wrote")
    content = json.loads(path.read_text())
    if content.get("over") not in FIGURES or not content.get("variants"):
        raise ValueError(f"{path}: expected a study over {' or '.join(FIGURES)} with variants")
    identity, title, figure = FIGURES[content["over"]]
    names = [variant["name"] for variant in content["variants"]]
    variants = [_variant(folder / name, name.replace("_", " ")) for name in names]
    evaluated = [(variant.name, [variant.success]) for variant in variants if variant.success is not None]
    return {
        "id": identity,
        "title": title,
        "figure": figure,
        "intro": f"Each row is one training of the {content['stage']} stage ({content['steps']:,} steps). Everything "
        "else is equal. There is one seed for each row, so differences of a few trials are no evidence.",
        "chart": interval_chart(evaluated, title=title, limits=(0.0, 1.0), percent=True) if evaluated else None,
        "columns": COLUMNS,
        "rows": [(variant.name, variant.cells) for variant in variants],
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
        attention = estimate_cell(estimate(summary["in_mask_ratio"]), percent)
        ratio = (
            estimate_cell(estimate(summary["sensitivity_mean"]["ratio"])) if "sensitivity_mean" in summary else MISSING
        )
    return StudyVariant(name=name, cells=(success, attention, ratio, _held_out(run / "metrics.jsonl")), success=dot)


def _held_out(log: Path) -> Cell:
    """The last action loss on held-out windows."""
    if not log.is_file():
        return MISSING
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    losses = [row["validation/action_loss"] for row in rows if "validation/action_loss" in row]
    return Cell(text=number(losses[-1])) if losses else MISSING
