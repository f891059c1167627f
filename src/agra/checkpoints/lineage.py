"""Where a policy comes from: the stages that made it, their settings and their logs (C.3).

A run records its starting point and finds the stages before it where they lie. An export carries them all with it:

    history/00_adapt.json   the RunConfig of the first stage
    history/00_adapt.jsonl  its metrics, and so on, the policy's own stage last
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agra import files
from agra.checkpoints.folder import artifact_dir, find, read_object, resolve
from agra.checkpoints.read import config_of, read_config
from agra.config import RunConfig
from agra.stages import Stage, StageConfig


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """A finished stage. Its metrics.jsonl and newest checkpoint are None where they are gone."""

    config: RunConfig
    metrics: Path | None
    checkpoint: Path | None = None


def record_origin(run: Path, init_from: str | Path | None) -> None:
    """Write a run's starting point into its folder: a folder relative to it, so that both may be moved together, or a hub
    id."""
    origin = None
    if init_from is not None:
        path = find(init_from)
        origin = os.path.relpath(path, run) if path.is_dir() else str(init_from)
    files.write_text(run / "origin.json", json.dumps({"init": origin}) + "\n")


def lineage(policy: str | Path) -> list[TrainedStage]:
    """The stages that made a policy, its own last, as far back as they are there."""
    path = resolve(policy)
    history = path / "history"
    if history.is_dir():
        return [
            _trained(config_of(read_object(stage), stage), stage.with_suffix(".jsonl"))
            for stage in sorted(history.glob("*.json"))
        ]
    run = artifact_dir(policy)
    last = _trained(read_config(path), run / "metrics.jsonl", path)
    origin = run / "origin.json"
    init_from = json.loads(origin.read_text())["init"] if origin.is_file() else None
    try:
        return [*(lineage(run / init_from) if init_from else []), last]
    except FileNotFoundError:  # a hub id, or a folder that is gone
        return [last]


def carry(stages: Sequence[TrainedStage], folder: Path) -> None:
    """Copy the settings and logs of the stages that made a policy into `folder`'s history."""
    history = folder / "history"
    history.mkdir()
    for number, stage in enumerate(stages):
        name = f"{number:02}_{stage.config.stage.name}"
        files.write_text(history / f"{name}.json", stage.config.to_json())
        if stage.metrics is not None:
            shutil.copyfile(stage.metrics, history / f"{name}.jsonl")


def describe(stages: Sequence[TrainedStage]) -> str:
    """One sentence about a policy's method and its stages."""
    configs = [stage.config for stage in stages]
    joint = next((config for config in reversed(configs) if config.stage.name is Stage.JOINT), configs[-1])
    return f"{joint.method.describe()}. Stages: {', '.join(_steps(config.stage) for config in configs)}"


def _steps(stage: StageConfig) -> str:
    adapters = "" if stage.lora.rank is None else f" on adapters of rank {stage.lora.rank}"
    return f"{stage.name} {stage.steps:,} steps{adapters}"


def _trained(config: RunConfig, metrics: Path, checkpoint: Path | None = None) -> TrainedStage:
    return TrainedStage(config=config, metrics=metrics if metrics.is_file() else None, checkpoint=checkpoint)
