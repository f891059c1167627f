"""Encoding of uncached features from decoded frames during training."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from agra.alignment.teacher import Teacher
from agra.data.config import DataConfig
from agra.data.features.encoders import open_codec, open_teacher
from agra.data.features.jobs import encode_frames, teacher_grids_of_windows
from agra.data.source import Source
from agra.methods.method import MethodConfig
from agra.wam.codec import Codec, to_video


class OnlineEncoder:
    """The codec and the teacher of a method. Each is None where its features are cached.

    The values equal cached values bit for bit on one device. They come from the same networks and are rounded to
    float16.
    """

    def __init__(self, method: MethodConfig, codec: Codec | None, teacher: Teacher | None) -> None:
        self.codec, self.teacher, self._shapes = codec, teacher, method.shapes

    @classmethod
    def open(
        cls,
        method: MethodConfig,
        data: DataConfig,
        sources: Sequence[Source],
        *,
        device: torch.device | str = "cpu",
    ) -> Self | None:
        """Open the networks of uncached features. Returns None where no feature needs a network."""
        needs = method.needs()
        codec = teacher = None
        if (needs.clip and "latents" not in data.cached) or (
            needs.frame_latents and "frame_latents" not in data.cached
        ):
            codec = open_codec(method, data, sources, device=device)
        if (needs.targets or needs.features) and "targets" not in data.cached:
            teacher = open_teacher(method, device=device)
        return None if codec is None and teacher is None else cls(method, codec, teacher)

    def latents(self, clips: Sequence[np.ndarray]) -> Float[Tensor, "B C T h w"]:
        """Encode clips (T, H, W, 3) uint8. Returns float16 on the CPU."""
        assert self.codec is not None
        videos = torch.cat([to_video(clip, self._shapes.frame_size) for clip in clips])
        return self.codec.encode(videos).half().cpu()

    def frame_latents(self, windows: Sequence[np.ndarray]) -> Float[Tensor, "B F C h w"]:
        """Encode each of the frames (F, H, W, 3) uint8 of each window alone. Returns float16 on the CPU."""
        assert self.codec is not None
        return torch.stack([encode_frames(self.codec, window, self._shapes.frame_size) for window in windows])

    def teacher_grids(self, windows: Sequence[np.ndarray]) -> Float[Tensor, "B T h w P"]:
        """Compute the teacher's grids of the frames (T, H, W, 3) uint8 of each window. Returns float16 on the CPU."""
        assert self.teacher is not None
        return teacher_grids_of_windows(self.teacher, windows, self._shapes.feature_grid)
