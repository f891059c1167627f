"""The report's training curves: every stage with a log, all policies on common axes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agra.diagnostics.report.comparison_table import number
from agra.diagnostics.report.figures import Series, line_chart

STAGES = ("adapt", "joint", "finetune")
CURVES = (
    ("loss", "Total loss"),
    ("video_loss", "Video loss"),
    ("action_loss", "Action loss"),
    ("dynamics_loss", "Dynamics loss"),
    ("alignment_loss", "Alignment loss (minus the cosine)"),
    ("alignment_cosine_gain", "Cosine gain over the mean feature"),
    ("visual_reliance/error_ratio", "First target's error over a constant's"),
    ("visual_reliance/image_swap_shift", "Shift of the target when the image is swapped"),
)


class Logged(Protocol):
    """A policy with training logs."""

    @property
    def name(self) -> str:
        """The policy's name."""
        ...

    @property
    def training_logs(self) -> Mapping[str, Path]:
        """Stages and their metrics.jsonl."""
        ...


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a training log.

    A last line that a crash cut off is dropped. Raises ValueError for any other bad line.
    """
    lines = Path(path).read_text().splitlines()
    rows = []
    for place, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if place + 1 < len(lines):
                raise ValueError(f"{path}: line {place + 1} is not JSON ({error})") from error
    return rows


def _series(index: int, name: str, rows: Sequence[Mapping[str, float]], key: str) -> Series | None:
    def points(key: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        return np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs], dtype=float)

    (x, y), (validation_x, validation_y) = points(key), points(f"validation/{key}")
    if not len(x) and not len(validation_x):
        return None
    return Series(label=name, index=index, x=x, y=y, point_x=validation_x, point_y=validation_y)


def training_section(policies: Sequence[Logged]) -> list[dict[str, Any]]:
    """The curves of every stage with a log."""
    logged = {stage for p in policies for stage in p.training_logs}
    sections = []
    for stage in [*(s for s in STAGES if s in logged), *sorted(logged - set(STAGES))]:
        logs = _logs(policies, stage)
        charts = []
        for key, label in CURVES:
            series = [s for i, name, rows in logs if (s := _series(i, name, rows, key)) is not None]
            if series:
                charts.append({"title": label, "svg": line_chart(series, title=label), "caption": _last(series)})
        sections.append({"name": stage, "charts": charts, "caption": _speed(logs)})
    return sections


def _logs(policies: Sequence[Logged], stage: str) -> list[tuple[int, str, list[dict[str, float]]]]:
    """The stage's logs, each with the number of the first policy that has it.

    Policies that share a log are named together.
    """
    sharing: dict[str, list[int]] = {}
    for index, policy in enumerate(policies):
        if stage in policy.training_logs:
            sharing.setdefault(Path(policy.training_logs[stage]).read_text(), []).append(index)
    return [
        (
            indices[0],
            " and ".join(policies[i].name for i in indices),
            read_log(policies[indices[0]].training_logs[stage]),
        )
        for indices in sharing.values()
    ]


def _last(series: Sequence[Series]) -> str:
    """The mean over the last tenth of each curve."""
    ends = []
    for line in series:
        if len(line.y):
            tail = line.y[-max(1, len(line.y) // 10) :]
            validation = f" (held out {number(line.point_y[-1])})" if len(line.point_y) else ""
            ends.append(f"{line.label} {number(float(tail.mean()))}{validation}")
    return "Last tenth: " + ", ".join(ends) if ends else "Held-out windows only"


def _speed(logs: Sequence[tuple[int, str, Sequence[Mapping[str, float]]]]) -> str:
    parts = []
    for _, name, rows in logs:
        steps = max((int(row["step"]) for row in rows), default=0)
        speeds = [row["samples_per_second"] for row in rows if row.get("samples_per_second") is not None]
        speed = f", {number(float(np.median(speeds)))} samples/s (median)" if speeds else ""
        parts.append(f"{name}: {steps} steps{speed}")
    return "; ".join(parts) + "."
