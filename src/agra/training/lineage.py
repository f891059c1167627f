"""Where a policy comes from: the stages that made it, their settings and their logs.                              C.3

A run notes what it started from and looks the stages before it up where they lie; an export carries them all with it:

    history/00_adapt.json   the RunConfig of the first stage
    history/00_adapt.jsonl  its metrics; and so on, the policy's own stage last
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agra.config import RunConfig
from agra.training import checkpoint
from agra.training.stages import StageConfig


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished stage."""

    config: RunConfig
    metrics: Path | None
    """Its metrics.jsonl, where it is still there."""
    checkpoint: Path | None = None
    """Its newest checkpoint, where it is still there."""


def note(run: Path, init: str | Path | None) -> None:
    """Write down in a run's folder what it started from: a folder as seen from there, so that both may be moved together,
    or a hub id as it is."""
    if init is not None:
        path = checkpoint.find(init)
        init = os.path.relpath(path, run) if path.is_dir() else str(init)
    checkpoint.write_text(run / "origin.json", json.dumps({"init": init}) + "\n")


def lineage(policy: str | Path) -> list[Trained]:
    """The stages that made a policy, its own last, as far back as they are there."""
    found = checkpoint.resolve(policy)
    history = found / "history"
    if history.is_dir():
        paths = sorted(history.glob("*.json"))
        return [_trained(RunConfig.from_json(path.read_text(), path), path.with_suffix(".jsonl")) for path in paths]
    run = checkpoint.home(policy)
    own = _trained(checkpoint.read_config(found), run / "metrics.jsonl", found)
    origin = run / "origin.json"
    init = json.loads(origin.read_text())["init"] if origin.is_file() else None
    try:
        return [*(lineage(run / init) if init else []), own]
    except FileNotFoundError:  # a hub id, or a folder that is gone
        return [own]


def carry(stages: Sequence[Trained], folder: Path) -> None:
    """Copy the settings and logs of the stages that made a policy into `folder`'s history."""
    history = folder / "history"
    history.mkdir()
    for number, stage in enumerate(stages):
        name = f"{number:02}_{stage.config.stage.name}"
        checkpoint.write_text(history / f"{name}.json", stage.config.to_json())
        if stage.metrics is not None:
            shutil.copyfile(stage.metrics, history / f"{name}.jsonl")


def describe(stages: Sequence[Trained]) -> str:
    """One sentence about the stages that made a policy."""
    configs = [stage.config for stage in stages]
    told = ", ".join(_steps(config.stage) for config in configs)
    for config in configs:
        if config.aligns:
            assert config.alignment is not None
            layers, objective = ", ".join(map(str, config.alignment.layers)), config.stage.objective
            teacher = config.alignment.teacher.kind.replace("_", " ")
            return (
                f"World action model with AGRA: video layer {layers} aligned with {teacher} on the "
                f"{objective.aligned_pass} pass, weight {objective.alignment_weight:g}. Stages: {told}"
            )
    return f"World action model without alignment. Stages: {told}"


def _steps(stage: StageConfig) -> str:
    adapters = "" if stage.lora.rank is None else f" on adapters of rank {stage.lora.rank}"
    return f"{stage.name} {stage.steps:,} steps{adapters}"


def _trained(config: RunConfig, metrics: Path, found: Path | None = None) -> Trained:
    return Trained(config=config, metrics=metrics if metrics.is_file() else None, checkpoint=found)
