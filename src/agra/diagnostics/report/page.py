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
from markupsafe import Markup

from agra import files
from agra.checkpoints.migration import current_config
from agra.config import flat
from agra.diagnostics.record import Diagnosis, plain, read_diagnosis
from agra.diagnostics.report.comparison_table import Table, against_first_of
from agra.diagnostics.report.evaluation_section import evaluation_section
from agra.diagnostics.report.figures import swatch
from agra.diagnostics.report.gallery_section import RAMP, gallery_section
from agra.diagnostics.report.grounding_section import grounding_section
from agra.diagnostics.report.layers_section import imagination_section, layers_section
from agra.diagnostics.report.seeds_section import seeds_section
from agra.diagnostics.report.study_section import study_sections
from agra.diagnostics.report.training_section import training_section
from agra.diagnostics.report.visual_reliance_section import read_visual_reliance, visual_reliance_section
from agra.evaluation.results import Results, read_results

DIRECTIONS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


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
    studies: Sequence[Path] = (),
) -> Path:
    """Write the report of `policies` to `output`. Each is compared with the first on the same demonstrations (`against_first_of`).

    `studies` are folders of `agra study` (Figs. 10, 11). The substitutes for the paper's parts are read from the
    configs. Raises FileNotFoundError for a missing file of a policy, ValueError for an invalid one.
    """
    if not policies:
        raise ValueError("report: expected at least one policy, got none")
    if len({p.name for p in policies}) != len(policies):
        raise ValueError(f"report: policy names must differ, got {[p.name for p in policies]}; rename a run folder")
    diagnoses = [None if p.diagnosis is None else read_diagnosis(p.diagnosis) for p in policies]
    columns = [(i, p.name, d) for i, (p, d) in enumerate(zip(policies, diagnoses, strict=True))]
    results = [(i, p.name, None if p.results is None else read_results(p.results)) for i, p in enumerate(policies)]
    configs = {p.name: current_config(_read_json(p.config)) for p in policies if p.config is not None}
    demonstrations = {p.name: _demonstrations(configs.get(p.name)) for p in policies}
    evaluation, grounding = evaluation_section(results), grounding_section(columns)
    reliance = visual_reliance_section(
        [(i, p.name, read_visual_reliance(p.diagnosis)) for i, p in enumerate(policies)],
        [None if d is None else d.start for d in diagnoses],
    )

    page = _template().render(
        nonce=secrets.token_urlsafe(18),
        title=title,
        lede=_lede(policies, results, diagnoses),
        policies=[{"name": p.name, "description": p.description, "swatch": swatch(i)} for i, p in enumerate(policies)],
        substitutes=_substitutes(configs),
        pairs=against_first_of([*demonstrations.values()]),
        summary=_summary(evaluation, reliance, grounding),
        training=training_section(policies),
        evaluation=evaluation,
        seeds=seeds_section(results, configs, demonstrations),
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
        encoders = [fields.get(f"method.{name}.kind") for name in ("vision_encoder", "visual_encoder")]
        if "packaged_dinov2_small" in encoders:
            lines.append("Image features: a packaged DINOv2-S/14 that was fine-tuned for saliency.")
        layers = fields.get("method.model.video_dit.num_layers")
        heads, width = fields.get("method.model.video_dit.num_heads"), fields.get("method.model.video_dit.head_dim")
        if layers and heads and width and layers < 28:
            lines.append(
                f"Video DiT: {layers} layers of width {heads * width}, trained from scratch, not the 28 layers of "
                "width 2048 of Cosmos-Predict2.5-2B, which is pre-trained on video."
            )
    return list(dict.fromkeys(lines))
