"""What the frozen parts compute, once for every dataset: latents, teacher targets, instruction tokens.      C.1; Eqs. 3-4

Here the frozen encoders of `wam` and `alignment` meet the cache of `data`. A codec that is fit on data is fit here too.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agra.alignment.teacher import Teacher, interpolate_grid, load_teacher, reference_frames
from agra.config import RunConfig
from agra.data import cache
from agra.data.cache import CachedFeature
from agra.data.sources import Source
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


class Preparation:
    """The frozen networks that a config's stage needs, loaded once: what computing their features will take, and doing it."""

    def __init__(self, config: RunConfig, sources: Sequence[Source], *, device: torch.device | str = "cpu") -> None:
        self.config, self.sources, self.root = config, sources, Path(config.data.cache)
        self._wanted = _features(config, sources, device)

    def estimate(self) -> list[tuple[Source, cache.Estimate]]:
        """What `run` will take for every source, measured on one episode of each."""
        return [(s, cache.estimate(s.dataset, self._of(s), self.root, episodes=s.used)) for s in self.sources]

    def run(self, *, rank: int = 0, world_size: int = 1) -> list[Path]:
        """Compute and cache what lacks of every source; returns the features' folders.

        Leaves a file beside each folder by which training finds it without loading a frozen network. Of `world_size`
        processes, each with its own `rank`, every one computes its share of the episodes.
        """
        folders = []
        for source in self.sources:
            paths = cache.prepare(
                source.dataset,
                self._of(source),
                self.root,
                episodes=source.used,
                rank=rank,
                world_size=world_size,
            )
            for name, path in zip(self._wanted, paths, strict=True):
                checkpoint.write_text(_index(self.config, self.sources, source, name), json.dumps(path.name) + "\n")
            folders += paths
        return folders

    def _of(self, source: Source) -> list[cache.Feature]:
        return [make(source) for make in self._wanted.values()]


def open_features(config: RunConfig, sources: Sequence[Source]) -> list[dict[str, CachedFeature]]:
    """What `prepare` made for these settings, by source. Raises FileNotFoundError naming the remedy."""
    opened = []
    for source in sources:
        own = {}
        for name in _needed(config):
            path = _index(config, sources, source, name)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{config.data.cache}: no {name} prepared for {source.dataset.path} with these settings; run agra"
                    " prepare with the same recipe, stage and flags"
                )
            own[name] = CachedFeature.open(path.parent / json.loads(path.read_text()), episodes=source.used)
        opened.append(own)
    return opened


class OnlineEncoder:
    """What is not cached, computed of decoded clips while training."""

    def __init__(self, config: RunConfig, codec: Codec | None, teacher: Teacher | None, device: torch.device | str):
        self.codec, self.teacher, self.device = codec, teacher, device
        self.teacher_width = None if teacher is None else teacher.width
        self._size, self._grid = config.model.frame_size, config.model.token_grid[1:]
        self._references = list(reference_frames(config.model.latent_shape[1]))

    @classmethod
    def open(
        cls, config: RunConfig, sources: Sequence[Source], *, device: torch.device | str = "cpu"
    ) -> "OnlineEncoder | None":
        """The frozen networks whose features the config does not cache; None where it caches all."""
        codec = teacher = None
        if "latents" not in config.data.cached:
            codec = _open_codec(config, sources).to(device)
        if config.aligns and "targets" not in config.data.cached:
            assert config.alignment is not None
            teacher = load_teacher(config.alignment.teacher).to(device)
        return None if codec is None and teacher is None else cls(config, codec, teacher, device)

    def __call__(self, clips: Sequence[np.ndarray]) -> tuple[Tensor | None, Tensor | None]:
        """Clips (T, H, W, 3) uint8 to latents and targets, rounded to float16 as the cache rounds them."""
        latents = targets = None
        if self.codec is not None:
            videos = torch.cat([to_video(clip, self._size) for clip in clips])
            latents = self.codec.encode(videos.to(self.device)).half().cpu()
        if self.teacher is not None:
            frames = [torch.as_tensor(clip[self._references]) for clip in clips]
            targets = torch.stack([interpolate_grid(self.teacher(one), self._grid) for one in frames]).half().cpu()
        return latents, targets


def codec_file(config: RunConfig, sources: Sequence[Source]) -> Path:
    """Where the codec fit on the training episodes of these sources lies."""
    return Path(config.data.cache) / f"codec-{_digest(_codec_settings(config, sources))}.safetensors"


def _needed(config: RunConfig) -> tuple[str, ...]:
    """The features that are cached for the config's stage."""
    seen = ("latents", "targets") if config.aligns else ("latents",)
    return (*(name for name in seen if name in config.data.cached), "instruction")


def _features(
    config: RunConfig, sources: Sequence[Source], device: torch.device | str
) -> dict[str, Callable[[Source], cache.Feature]]:
    """How to make each needed feature for a source; the frozen networks are loaded once."""
    text, model = Instruction(_open_text(config).to(device)), config.model
    made: dict[str, Callable[[Source], cache.Feature]] = {"instruction": lambda source: text}
    needed = _needed(config)
    if "latents" in needed:
        codec = _open_codec(config, sources).to(device)
        made["latents"] = lambda source: Latents(codec, model, source.config.frame_stride)
    if "targets" in needed:
        assert config.alignment is not None
        teacher = load_teacher(config.alignment.teacher).to(device)
        made["targets"] = lambda source: Targets(teacher, model, _target_frames(config, source))
    return made


def _open_codec(config: RunConfig, sources: Sequence[Source]) -> Any:
    """The frozen codec; a patch PCA is fit on the training episodes the first time and kept in the cache folder."""
    if config.model.codec.kind != "patch_pca":
        return load_codec(config.model.codec)
    path = codec_file(config, sources)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        PatchPCACodec.fit(_codec_videos(config, sources), channels=config.model.codec.channels).save(path)
    return load_codec(config.model.codec, path)


def _open_text(config: RunConfig) -> Any:
    """The frozen text encoder; Cosmos's text projection, frozen too, is applied at once: 1 MB an instruction."""
    text, video = config.model.text, config.model.video_dit
    if text.kind != "cosmos_reason" or video.text_projection_dim is None:
        return load_text_encoder(text)
    return load_text_encoder(text, load_text_projection(video, text.source, revision=text.revision))


def _index(config: RunConfig, sources: Sequence[Source], source: Source, name: str) -> Path:
    """A file that names a feature's folder; it is itself named after what the config says of the feature."""
    settings: dict[str, Any] = {"dataset": source.dataset.fingerprint, "view": dict(source.dataset.view)}
    if name == "latents":
        fitted = config.model.codec.kind == "patch_pca"
        codec = _codec_settings(config, sources) if fitted else {"codec": asdict(config.model.codec)}
        geometry = {"frame_size": config.model.frame_size, "num_frames": config.model.num_frames}
        settings |= codec | geometry | {"stride": source.config.frame_stride}
    elif name == "instruction":
        settings |= asdict(config.model.text)
    else:
        assert config.alignment is not None
        settings |= asdict(config.alignment.teacher) | {
            "grid": config.model.token_grid[1:],
            "limit": _target_frames(config, source),
        }
    return Path(config.data.cache) / f"{name}-{_digest(settings)}.json"


def _codec_settings(config: RunConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """Whatever decides a codec that is fit on data."""
    fit_on = [[s.dataset.fingerprint, dict(s.dataset.view), s.config.frame_stride, len(s.training)] for s in sources]
    return {"fit_on": fit_on, "frame_size": config.model.frame_size, "codec": asdict(config.model.codec)}


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _codec_videos(config: RunConfig, sources: Sequence[Source]) -> Iterator[Tensor]:
    training = [(source, episode) for source in sources for episode in source.training]
    chosen = np.linspace(0, len(training) - 1, min(len(training), _CODEC_EPISODES)).round().astype(int)
    for source, episode in (training[index] for index in chosen):
        frames = source.dataset.frames(episode)[:: source.config.frame_stride]
        whole = (len(frames) - 1) // 4 * 4 + 1
        yield to_video(frames[:whole], config.model.frame_size)


def window_references(config: RunConfig) -> tuple[int, ...]:
    """The control steps after the observation whose frames stand for the latent frames of a window."""
    return tuple(i * config.data.frame_stride for i in reference_frames(config.model.latent_shape[1]))


def _target_frames(config: RunConfig, source: Source) -> int | None:
    """How many first frames of an episode need targets; None: all."""
    steps, last = config.data.target_steps, reference_frames(config.model.latent_shape[1])[-1]
    return None if steps is None else steps + last * source.config.frame_stride
