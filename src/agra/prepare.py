"""What the frozen parts compute, once for every dataset: latents, teacher targets, instruction tokens.      C.1; Eqs. 3-4

Here the frozen encoders of `wam` and `alignment` meet the cache of `data`. A codec that is fit on data is fit here too.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agra.alignment.teacher import Teacher, interpolate_grid, load_teacher, reference_frames
from agra.config import RunConfig
from agra.data import cache
from agra.data.lerobot import LeRobotDataset
from agra.data.mixture import held_out
from agra.training import checkpoint
from agra.types import Episode
from agra.wam.codec import Codec, PatchPCACodec, load_codec, to_video
from agra.wam.model import WAMConfig
from agra.wam.text import TextEncoder, load_text_encoder
from agra.wam.video_dit import load_text_projection

_CODEC_EPISODES = 64  # enough for a 768 x 768 covariance of 8 x 8 x 4 patches


class Latents:
    """Latents of the window that starts at each control step: (N, C, T, h, w) float16."""

    name = "latents"

    def __init__(self, codec: Codec, model: WAMConfig, frame_stride: int) -> None:
        self.codec, self.model, self.stride = codec, model, frame_stride

    @property
    def key(self) -> dict[str, Any]:
        """Codec and geometry."""
        return {
            "codec": self.codec.key,
            "frame_size": list(self.model.frame_size),
            "num_frames": self.model.num_frames,
            "frame_stride": self.stride,
        }

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Past the episode's end the last frame repeats."""
        video = to_video(episode.frames, self.model.frame_size)[0]  # (3, N, h, w)
        offsets = torch.arange(self.model.num_frames) * self.stride
        rows = (torch.arange(len(episode))[:, None] + offsets).clamp(max=len(episode) - 1)
        encoded = [self.codec.encode(video[:, chosen].transpose(0, 1)) for chosen in rows.split(16)]
        return {"latents": torch.cat(encoded).half().cpu().numpy()}


class Targets:
    """The teacher's grid of every frame on the video DiT's token grid: (N, H, W, P) float16.                 Eqs. 3-4

    Of an episode's first `limit` frames only, where there is a limit.
    """

    name = "targets"

    def __init__(self, teacher: Teacher, model: WAMConfig, limit: int | None) -> None:
        self.teacher, self.grid, self.limit = teacher, model.token_grid[1:], limit

    @property
    def key(self) -> dict[str, Any]:
        """Teacher, grid and limit."""
        return {"teacher": self.teacher.key, "grid": list(self.grid), "limit": self.limit}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Each frame alone, from the recorded resolution."""
        frames = torch.as_tensor(episode.frames[: self.limit])
        grids = [interpolate_grid(self.teacher(chosen), self.grid) for chosen in frames.split(16)]
        return {"targets": torch.cat(grids).half().cpu().numpy()}


class Instruction:
    """The instruction's tokens: (L, E) float16."""

    name = "instruction"

    def __init__(self, text: TextEncoder) -> None:
        self.text = text
        self._known: dict[str, np.ndarray] = {}

    @property
    def key(self) -> dict[str, Any]:
        """The text encoder."""
        return {"text": self.text.key}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Each wording is encoded once."""
        if episode.instruction not in self._known:
            self._known[episode.instruction] = self.text.encode([episode.instruction])[0].half().cpu().numpy()
        return {"instruction": self._known[episode.instruction]}


def prepare(config: RunConfig, dataset: LeRobotDataset, *, device: torch.device | str = "cpu") -> dict[str, Path]:
    """Compute and cache what the config's stage needs; returns each feature's folder by name.

    Leaves a file beside each folder by which training finds it without loading a frozen network.
    """
    wanted: list[cache.Feature] = [
        Latents(_open_codec(config, dataset).to(device), config.model, config.data.frame_stride),
        Instruction(_open_text(config).to(device)),
    ]
    if config.aligns:
        assert config.alignment is not None
        teacher = load_teacher(config.alignment.teacher).to(device)
        wanted.append(Targets(teacher, config.model, _target_frames(config)))
    folders = cache.prepare(dataset, wanted, Path(config.data.cache))
    found = {feature.name: folder for feature, folder in zip(wanted, folders, strict=True)}
    for name, path in _indices(config, dataset).items():
        checkpoint.write_text(path, json.dumps(found[name].name) + "\n")
    return found


def open_features(config: RunConfig, dataset: LeRobotDataset) -> dict[str, cache.CachedFeature]:
    """What `prepare` made for these settings and this dataset. Raises FileNotFoundError naming the remedy."""
    opened = {}
    for name, path in _indices(config, dataset).items():
        if not path.is_file():
            raise FileNotFoundError(
                f"{config.data.cache}: no {name} prepared for {config.data.path} with these settings; run agra prepare "
                "with the same recipe, stage and flags"
            )
        opened[name] = cache.CachedFeature.open(path.parent / json.loads(path.read_text()))
    return opened


def codec_file(config: RunConfig, dataset: LeRobotDataset) -> Path:
    """Where the codec fit on this dataset's training episodes lies."""
    return Path(config.data.cache) / f"codec-{_digest(_codec_settings(config, dataset))}.safetensors"


def _open_codec(config: RunConfig, dataset: LeRobotDataset) -> Any:
    """The frozen codec; a patch PCA is fit on the training episodes the first time and kept in the cache folder."""
    if config.model.codec.kind != "patch_pca":
        return load_codec(config.model.codec)
    path = codec_file(config, dataset)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        PatchPCACodec.fit(_codec_videos(config, dataset), channels=config.model.codec.channels).save(path)
    return load_codec(config.model.codec, path)


def _open_text(config: RunConfig) -> Any:
    """The frozen text encoder; Cosmos's text projection, frozen too, is applied at once: 1 MB an instruction."""
    text, video = config.model.text, config.model.video_dit
    if text.kind != "cosmos_reason" or video.text_projection_dim is None:
        return load_text_encoder(text)
    return load_text_encoder(text, load_text_projection(video, text.source, revision=text.revision))


def _indices(config: RunConfig, dataset: LeRobotDataset) -> dict[str, Path]:
    """Per feature that the stage needs, a file naming its folder; the file is named after what the config says of it."""
    camera = {"dataset": dataset.fingerprint, "camera": dataset.camera}
    settings: dict[str, dict[str, Any]] = {
        "latents": camera | _codec_settings(config, dataset) | {"num_frames": config.model.num_frames},
        "instruction": camera | asdict(config.model.text),
    }
    if config.aligns:
        assert config.alignment is not None
        geometry = {"grid": config.model.token_grid[1:], "limit": _target_frames(config)}
        settings["targets"] = camera | asdict(config.alignment.teacher) | geometry
    return {name: Path(config.data.cache) / f"{name}-{_digest(value)}.json" for name, value in settings.items()}


def _codec_settings(config: RunConfig, dataset: LeRobotDataset) -> dict[str, Any]:
    return {
        "dataset": dataset.fingerprint,
        "frame_size": config.model.frame_size,
        "stride": config.data.frame_stride,
        "codec": asdict(config.model.codec),
        "held_out": config.data.validation_fraction,
    }


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _codec_videos(config: RunConfig, dataset: LeRobotDataset) -> Iterator[Tensor]:
    training = [i for i in range(dataset.num_episodes) if i not in held_out(dataset.num_episodes, config.data)]
    chosen = np.linspace(0, len(training) - 1, min(len(training), _CODEC_EPISODES)).round().astype(int)
    for index in chosen:
        frames = dataset.episode(training[index]).frames[:: config.data.frame_stride]
        whole = (len(frames) - 1) // 4 * 4 + 1
        yield to_video(frames[:whole], config.model.frame_size)


def window_references(config: RunConfig) -> tuple[int, ...]:
    """The control steps after the observation whose frames stand for the latent frames of a window."""
    return tuple(i * config.data.frame_stride for i in reference_frames(config.model.latent_shape[1]))


def _target_frames(config: RunConfig) -> int | None:
    """How many first frames of an episode need targets; None: all."""
    steps = config.data.target_steps
    return None if steps is None else steps + max(window_references(config))
