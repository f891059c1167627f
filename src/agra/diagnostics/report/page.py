"""`agra report`: a comparison of policies in one self-contained HTML file.

It holds training curves, the four regimes with paired comparisons, visual reliance, grounding metrics with intervals,
and a gallery. The file loads nothing from the network. It is made from logs, results and diagnosis folders, without
torch.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from agra import files
from agra.checkpoints.migration import current_config
from agra.config import flat
from agra.diagnostics.record import Diagnosis, plain, read_diagnosis
from agra.diagnostics.report.comparison_table import Table, against_first_of, number
from agra.diagnostics.report.evaluation_section import evaluation_section
from agra.diagnostics.report.figures import Series, line_chart, swatch
from agra.diagnostics.report.gallery_section import RAMP, gallery_section
from agra.diagnostics.report.grounding_section import grounding_section
from agra.diagnostics.report.layers_section import imagination_section, layers_section
from agra.diagnostics.report.study_section import study_sections
from agra.diagnostics.report.visual_reliance_section import read_visual_reliance, visual_reliance_section
from agra.evaluation.results import Results, read_results

STAGES = ("adapt", "joint", "finetune")
DIRECTIONS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
CURVES = (
    ("loss", "Total loss"),
    ("video_loss", "Video loss"),
    ("action_loss", "Action loss"),
    ("alignment_loss", "Alignment loss (minus the cosine)"),
    ("alignment_cosine_gain", "Cosine gain over the mean feature"),
    ("visual_reliance/error_ratio", "First target's error over a constant's"),
    ("visual_reliance/image_swap_shift", "Shift of the target when the image is swapped"),
)


@dataclass(frozen=True, kw_only=True)
class PolicyEntry:
    """One policy of the report and its files. Parts without a file are left out."""

    name: str
    description: str
    training_logs: Mapping[str, Path] = field(default_factory=dict)  # stage to metrics.jsonl
    results: Path | None = None  # file of `agra evaluate`
    diagnosis: Path | None = None  # folder of `agra diagnose`
    config: Path | None = None  # config.json of the checkpoint


def build_report(
    policies: Sequence[PolicyEntry],
    output: Path,
    *,
    title: str = "Action grounding report",
    notes: Sequence[str] = (),
    studies: Sequence[Path] = (),
) -> Path:
    """Write the report of `policies` to `output`. Each is compared with the first on the same demonstrations (`against_first_of`).

    `studies` are folders of `agra study` (Figs. 10, 11). `notes` precede the list of substitutes for the paper's parts,
    which is read from the configs. Raises FileNotFoundError for a missing file of a policy, ValueError for an invalid
    one.
    """
    if not policies:
        raise ValueError("report: expected at least one policy, got none")
    if len({p.name for p in policies}) != len(policies):
        raise ValueError(f"report: policy names must differ, got {[p.name for p in policies]}; rename a run folder")
    diagnoses = [None if p.diagnosis is None else read_diagnosis(p.diagnosis) for p in policies]
    columns = [(i, p.name, d) for i, (p, d) in enumerate(zip(policies, diagnoses, strict=True))]
    results = [(i, p.name, None if p.results is None else read_results(p.results)) for i, p in enumerate(policies)]
    configs = {p.name: current_config(_read_json(p.config)) for p in policies if p.config is not None}
    evaluation, grounding = evaluation_section(results), grounding_section(columns)
    reliance = visual_reliance_section([(i, p.name, read_visual_reliance(p.diagnosis)) for i, p in enumerate(policies)])

    page = _template().render(
        nonce=secrets.token_urlsafe(18),
        title=title,
        lede=_lede(policies, results, diagnoses),
        policies=[{"name": p.name, "description": p.description, "swatch": swatch(i)} for i, p in enumerate(policies)],
        substitutes=[*notes, *_substitutes(configs)],
        pairs=against_first_of([_demonstrations(configs.get(p.name)) for p in policies]),
        summary=_summary(evaluation, reliance, grounding),
        training=_training(policies),
        evaluation=evaluation,
        visual_reliance=reliance,
        grounding=grounding,
        layers=layers_section(columns),
        imagination=imagination_section(columns),
        studies=study_sections(studies),
        gallery=gallery_section(columns),
        settings=_settings(configs),
        ramp=RAMP,
        footer=f"Written by agra report on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. "
        "This file loads nothing from the network.",
    )
    files.write_text(output, page)
    return Path(output)


def _demonstrations(config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return the paths of a policy's datasets, None without a config."""
    data = {} if config is None else config.get("data", {})
    return (
        None if not data else (str(data.get("path")), *(str(source.get("path")) for source in data.get("mixture", ())))
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=isolated
    )
    return environment.from_string(
        resources.files("agra.diagnostics.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )


def isolated(value: Any) -> Any:
    """A text in Unicode isolates if it has bidirectional controls, so that the text around it keeps its order."""
    if isinstance(value, str) and not isinstance(value, Markup) and DIRECTIONS.search(value):
        return f"\u2068{value}\u2069"
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


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


def _lede(
    policies: Sequence[PolicyEntry],
    results: Sequence[tuple[int, str, Results | None]],
    diagnoses: Sequence[Diagnosis | None],
) -> str:
    """A summary of the measurements, in at most three sentences."""
    names = [isolated(p.name) for p in policies]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    parts = [f"Comparison of {listed}." if len(names) > 1 else f"Report on {listed}."]
    trials = [len(r.trials) for _, _, r in results if r is not None]
    if trials:
        parts.append(f"Evaluated on {_span(trials)} seeded trials.")
    samples = [len(d.rows) for d in diagnoses if d is not None]
    if samples:
        parts.append(f"Diagnosed on {_span(samples)} recorded moments.")
    return " ".join(parts)


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _summary(
    evaluation: dict[str, Any] | None, reliance: dict[str, Any] | None, grounding: dict[str, Any] | None
) -> Table:
    """The most important rows of the sections' tables."""
    rows = []
    if evaluation:
        rows += [
            replace(row, label=f"Success, {row.label}", hint="fraction of trials; higher is better")
            for row in evaluation["success"].rows
            if row.label in ("in distribution", "all regimes")
        ]
    if reliance:
        rows += [row for row in reliance["table"].rows if row.label in ("Target error, one object", "Image swapped")]
    if grounding:
        labels = ("Attention in mask", "Centroid error", "Sensitivity ratio, mean", "Sensitivity ratio, zero")
        rows += [row for row in (*grounding["table"].rows, *grounding["table_1"].rows) if row.label in labels]
    return Table(corner="", rows=rows)


def _series(index: int, name: str, rows: Sequence[Mapping[str, float]], key: str) -> Series | None:
    def points(key: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        return np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs], dtype=float)

    (x, y), (validation_x, validation_y) = points(key), points(f"validation/{key}")
    if not len(x) and not len(validation_x):
        return None
    return Series(label=name, index=index, x=x, y=y, point_x=validation_x, point_y=validation_y)


def _training(policies: Sequence[PolicyEntry]) -> list[dict[str, Any]]:
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


def _logs(policies: Sequence[PolicyEntry], stage: str) -> list[tuple[int, str, list[dict[str, float]]]]:
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


def _settings(configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields in which the policies' configs differ, and each config in full."""
    fields = [flat(config) for config in configs.values()]
    keys = list(dict.fromkeys(key for config in fields for key in config))
    shown = [[json.dumps(config[key]) if key in config else "–" for config in fields] for key in keys]
    differing = [{"key": key, "cells": values} for key, values in zip(keys, shown, strict=True) if len(set(values)) > 1]
    full = [{"name": name, "text": json.dumps(plain(config), indent=2)} for name, config in configs.items()]
    return {"names": list(configs), "differences": differing, "full": full}


def _substitutes(configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """Substitutes for the paper's data and networks that the configs name, each line once."""
    lines: list[str] = []
    for config in configs.values():
        fields: dict[str, Any] = flat(config)
        if "tabletop" in fields.get("data.embodiments", ()):
            lines.append(
                "Demonstrations: recorded from a scripted expert in the embedded MuJoCo tabletop scene, not "
                "teleoperated on a robot."
            )
        if fields.get("method.model.codec.kind") == "patch_pca":
            lines.append(
                "Video codec: a closed-form space-time patch PCA fitted on the training frames, not the Wan VAE."
            )
        if "minilm" in (fields.get("method.model.text.kind"), fields.get("method.text_encoder.kind")):
            lines.append("Instructions: a packaged MiniLM sentence encoder, not Cosmos-Reason1.")
        if fields.get("method.alignment.teacher.kind") == "packaged_dinov2_small":
            lines.append("Teacher: a packaged DINOv2-S/14 that was fine-tuned for saliency, not DINOv2-B.")
        layers = fields.get("method.model.video_dit.num_layers")
        heads, width = fields.get("method.model.video_dit.num_heads"), fields.get("method.model.video_dit.head_dim")
        if layers and heads and width and layers < 28:
            lines.append(
                f"Video DiT: {layers} layers of width {heads * width}, trained from scratch, not the 28 layers of "
                "width 2048 of Cosmos-Predict2.5-2B, which is pre-trained on video."
            )
    return list(dict.fromkeys(lines))
