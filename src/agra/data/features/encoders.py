"""The frozen networks of a method: its codec, its text encoder and its teacher.

A patch-PCA codec is fit on the training episodes and stored in the cache folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agra.alignment.teacher import Teacher, load_teacher
from agra.data.config import DataConfig
from agra.data.source import Source
from agra.methods.method import MethodConfig
from agra.wam.codec import load_codec, to_video
from agra.wam.patch_pca import PatchPCACodec
from agra.wam.text import load_text_encoder
from agra.wam.video_dit import load_text_projection

_CODEC_EPISODES = 64  # enough for a 768 x 768 covariance of 8 x 8 x 4 patches


def open_codec(
    method: MethodConfig, data: DataConfig, sources: Sequence[Source], *, device: torch.device | str = "cpu"
) -> Any:
    """Open the frozen codec. The first call fits a patch-PCA codec on the training episodes."""
    assert method.codec is not None
    if method.codec.kind != "patch_pca":
        return load_codec(method.codec).to(device)
    path = codec_file(method, data, sources)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        PatchPCACodec.fit(_codec_videos(method, sources), channels=method.codec.channels).save(path)
    return load_codec(method.codec, path).to(device)


def open_text_encoder(method: MethodConfig, *, device: torch.device | str = "cpu") -> Any:
    """Open the frozen text encoder.

    A method's frozen projection is applied to its tokens, 1 MB for each Cosmos instruction.
    """
    assert method.text is not None
    projection = None
    if method.text_projection is not None:
        projection = load_text_projection(method.text_projection, method.text.source, revision=method.text.revision)
    return load_text_encoder(method.text, projection).to(device)


def open_teacher(method: MethodConfig, *, device: torch.device | str = "cpu") -> Teacher:
    """Open the frozen teacher."""
    assert method.teacher is not None
    return load_teacher(method.teacher).to(device)


def codec_file(method: MethodConfig, data: DataConfig, sources: Sequence[Source]) -> Path:
    """Return the file of the codec that is fit on the training episodes of these sources."""
    return Path(data.cache) / f"codec-{digest(codec_settings(method, sources))}.safetensors"


def codec_settings(method: MethodConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """Return all settings that a fitted codec depends on."""
    assert method.codec is not None
    fit_on = [[s.dataset.fingerprint, dict(s.dataset.view), s.config.frame_stride, len(s.training)] for s in sources]
    return {"fit_on": fit_on, "frame_size": method.shapes.frame_size, "codec": asdict(method.codec)}


def digest(settings: Mapping[str, Any]) -> str:
    """Return 16 hex digits that identify JSON-serialisable settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _codec_videos(method: MethodConfig, sources: Sequence[Source]) -> Iterator[Tensor]:
    assert method.codec is not None
    stride = method.codec.time_stride
    training = [(source, episode) for source in sources for episode in source.training]
    indices = np.linspace(0, len(training) - 1, min(len(training), _CODEC_EPISODES)).round().astype(int)
    for source, episode in (training[index] for index in indices):
        frames = source.dataset.frames(episode)[:: source.config.frame_stride]
        length = (len(frames) - 1) // stride * stride + 1
        yield to_video(frames[:length], method.shapes.frame_size)
