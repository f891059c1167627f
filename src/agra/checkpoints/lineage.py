"""Lineage of a policy: its training stages, with their settings and logs (C.3).

A run records its starting point, where its earlier stages are found. An export includes them all:

    history/00_adapt.json   the RunConfig of the first stage
    history/00_adapt.jsonl  its metrics, and so on to the policy's last stage
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agra import files
from agra.checkpoints.folder import artifact_dir, find, newest, read_object, resolve
from agra.checkpoints.read import config_of, read_config
from agra.config import RunConfig
from agra.stages import Stage, StageConfig


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """A finished stage. Its metrics.jsonl and newest checkpoint are None where they are missing."""

    config: RunConfig
    metrics: Path | None
    checkpoint: Path | None = None


def record_origin(run: Path, init_from: str | Path | None, head: str | Path | None = None) -> None:
    """Write a run's starting point and the model of its action head into its folder.

    Each is a hub id, or a relative path, so that both folders can move together.
    """
    origin = {"init": _place(run, init_from), "head": _place(run, head)}
    files.write_text(run / "origin.json", json.dumps(origin) + "\n")


def check_origin(run: Path, init_from: str | Path | None, head: str | Path | None) -> None:
    """Compare the given starting point of a resumed run with the recorded one. None agrees with any.

    Runs of earlier versions recorded no head. Raises ValueError where they differ.
    """
    path = run / "origin.json"
    recorded = read_object(path) if path.is_file() else {}
    for key, flag, given in (("init", "--init-from", init_from), ("head", "--head", head)):
        if given is not None and key in recorded and not _same(run, recorded[key], given):
            raise ValueError(
                f"{flag} {given}: {run} is resumed, and it started from {recorded[key] or 'fresh weights'}; leave {flag} "
                "out, or choose another output folder for a new run"
            )


def _place(run: Path, source: str | Path | None) -> str | None:
    """Return a folder's path from `run`, through no symbolic link, or a hub id as it is."""
    if source is None:
        return None
    path = find(source)
    return os.path.relpath(path.resolve(), run.resolve()) if path.is_dir() else str(source)


def _same(run: Path, recorded: str | None, given: str | Path) -> bool:
    """Compare a recorded place with a given one. A run's folder is the same as that of its newest checkpoint.

    A recorded folder that is gone, such as one that did not move with the run, is compared by its name.
    """
    if recorded is None:
        return False
    there, here = run / recorded, find(given)
    if not here.is_dir() and str(given) == recorded:
        return True
    # Earlier versions recorded the path between two names, of which a symbolic link may have been a part.
    readings = [there, Path(os.path.abspath(there))]
    if here.is_dir() and not any(place.is_dir() for place in readings):
        return here.name == Path(recorded).name
    return _checkpoint(here) in map(_checkpoint, readings)


def _checkpoint(place: Path) -> Path:
    return (newest(place) or place).resolve()


def lineage(policy: str | Path) -> list[TrainedStage]:
    """Find the stages of a policy, the last one at the end.

    Stages that are missing, and those before them, are left out.
    """
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
    except FileNotFoundError:  # a hub id, or a missing folder
        return [last]


def carry(stages: Sequence[TrainedStage], folder: Path) -> None:
    """Copy the settings and logs of a policy's stages into the history of `folder`."""
    history = folder / "history"
    history.mkdir()
    for number, stage in enumerate(stages):
        name = f"{number:02}_{stage.config.stage.name}"
        files.write_text(history / f"{name}.json", stage.config.to_json())
        if stage.metrics is not None:
            shutil.copyfile(stage.metrics, history / f"{name}.jsonl")


def describe(stages: Sequence[TrainedStage]) -> str:
    """Describe a policy's method and its stages in a sentence."""
    configs = [stage.config for stage in stages]
    joint = next((config for config in reversed(configs) if config.stage.name is Stage.JOINT), configs[-1])
    return f"{joint.method.describe()}. Stages: {', '.join(_steps(config.stage) for config in configs)}"


def _steps(stage: StageConfig) -> str:
    adapters = "" if stage.lora.rank is None else f" on adapters of rank {stage.lora.rank}"
    return f"{stage.name} {stage.steps:,} steps{adapters}"


def _trained(config: RunConfig, metrics: Path, checkpoint: Path | None = None) -> TrainedStage:
    return TrainedStage(config=config, metrics=metrics if metrics.is_file() else None, checkpoint=checkpoint)
