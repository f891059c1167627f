"""Frozen features of whole episodes, as `agra prepare` computes them: latents, teacher grids, resized frames (C.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from agra.alignment.teacher import Teacher, interpolate_grid
from agra.types import Episode
from agra.wam.codec import Codec, to_frames, to_video

_TEACHER_CHUNK = 8


class Latents:
    """Latents of the clip that starts at each control step: (N, C, T, h, w) float16."""

    name = "latents"

    def __init__(self, codec: Codec, frame_size: tuple[int, int], num_frames: int, frame_stride: int) -> None:
        self.codec, self.frame_size, self.num_frames, self.stride = codec, frame_size, num_frames, frame_stride

    @property
    def key(self) -> dict[str, Any]:
        """Codec and geometry."""
        return {
            "codec": self.codec.key,
            "frame_size": list(self.frame_size),
            "num_frames": self.num_frames,
            "frame_stride": self.stride,
        }

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Past the episode's end the last frame repeats."""
        video = to_video(episode.frames, self.frame_size)[0]  # (3, N, h, w)
        offsets = torch.arange(self.num_frames) * self.stride
        rows = (torch.arange(len(episode))[:, None] + offsets).clamp(max=len(episode) - 1)
        encoded = [self.codec.encode(video[:, chunk].transpose(0, 1)) for chunk in rows.split(16)]
        return {self.name: torch.cat(encoded).half().cpu().numpy()}


class FrameLatents:
    """Latents of every frame, each encoded alone: (N, C, h, w) float16."""

    name = "frame_latents"

    def __init__(self, codec: Codec, frame_size: tuple[int, int]) -> None:
        self.codec, self.frame_size = codec, frame_size

    @property
    def key(self) -> dict[str, Any]:
        """Codec and frame size."""
        return {"codec": self.codec.key, "frame_size": list(self.frame_size)}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Each frame as a clip of its own."""
        return {self.name: encode_frames(self.codec, episode.frames, self.frame_size).numpy()}


class Frames:
    """Every frame, resized: (N, H, W, 3) uint8."""

    name = "frames"

    def __init__(self, frame_size: tuple[int, int]) -> None:
        self.frame_size = frame_size

    @property
    def key(self) -> dict[str, Any]:
        """Frame size."""
        return {"frame_size": list(self.frame_size)}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Bilinear and antialiased, as for the codec."""
        return {self.name: resize(episode.frames, self.frame_size).numpy()}


class Targets:
    """The teacher's grid of every frame, interpolated to `grid`: (N, h, w, P) float16 (Eqs. 3, 4).

    With a `limit`, only of an episode's first so many frames.
    """

    name = "targets"

    def __init__(self, teacher: Teacher, grid: tuple[int, int], limit: int | None) -> None:
        self.teacher, self.grid, self.limit = teacher, grid, limit

    @property
    def key(self) -> dict[str, Any]:
        """Teacher, grid and limit."""
        return {"teacher": self.teacher.key, "grid": list(self.grid), "limit": self.limit}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Each frame alone, from the recorded resolution."""
        frames = torch.as_tensor(np.ascontiguousarray(episode.frames[: self.limit]))
        return {self.name: teacher_grids(self.teacher, frames, self.grid).numpy()}


def resize(frames: np.ndarray, size: tuple[int, int]) -> UInt8[Tensor, "N H W 3"]:
    """Frames (N, ., ., 3) uint8 at `size` (H, W)."""
    return torch.from_numpy(to_frames(to_video(frames, size))[0])


def encode_frames(codec: Codec, frames: np.ndarray, size: tuple[int, int]) -> Float[Tensor, "N C h w"]:
    """Latents of frames (N, ., ., 3) uint8, each encoded alone, float16 on the CPU."""
    video = to_video(frames, size)[0].transpose(0, 1)[:, :, None]  # (N, 3, 1, H, W)
    return torch.cat([codec.encode(chunk)[:, :, 0].half().cpu() for chunk in video.split(16)])


def teacher_grids(
    teacher: Teacher, frames: UInt8[Tensor, "N H W 3"], grid: tuple[int, int]
) -> Float[Tensor, "N h w P"]:
    """The teacher's features of frames on a token grid (Eqs. 3, 4), float16 on the CPU.

    Frames go through the teacher `_TEACHER_CHUNK` at a time, the last chunk padded. The kernels then see one shape, and a
    frame's features are the same bits whatever other frames are encoded with it.
    """
    grids = []
    for chunk in frames.split(_TEACHER_CHUNK):
        missing = _TEACHER_CHUNK - len(chunk)
        padded = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
        grids.append(interpolate_grid(teacher(padded), grid)[: len(chunk)].half().cpu())
    return torch.cat(grids)


def teacher_grids_of_windows(
    teacher: Teacher, windows: Sequence[np.ndarray], grid: tuple[int, int]
) -> Float[Tensor, "B T h w P"]:
    """`teacher_grids` of the frames (T, ., ., 3) uint8 of several windows, whose frames may differ in size."""
    grids: list[Tensor | None] = [None] * len(windows)
    for size in {window.shape for window in windows}:
        rows = [row for row, window in enumerate(windows) if window.shape == size]
        stacked = torch.from_numpy(np.concatenate([windows[row] for row in rows]))
        encoded = teacher_grids(teacher, stacked, grid).unflatten(0, (len(rows), -1))
        for row, values in zip(rows, encoded, strict=True):
            grids[row] = values
    return torch.stack([values for values in grids if values is not None])
