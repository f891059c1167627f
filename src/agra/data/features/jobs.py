"""The features that `agra prepare` computes for each episode: latents, teacher grids and resized frames (C.1)."""

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
    """Latents (N, C, T, h, w) float16 of the clip that starts at each control step."""

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
        """Encode the clips. Past the episode's end the last frame repeats."""
        video = to_video(episode.frames, self.frame_size)[0]  # (3, N, h, w)
        offsets = torch.arange(self.num_frames) * self.stride
        rows = (torch.arange(len(episode))[:, None] + offsets).clamp(max=len(episode) - 1)
        encoded = [self.codec.encode(video[:, chunk].transpose(0, 1)) for chunk in rows.split(16)]
        return {self.name: torch.cat(encoded).half().cpu().numpy()}


class FrameLatents:
    """Latents (N, C, h, w) float16 of every frame, each encoded alone."""

    name = "frame_latents"

    def __init__(self, codec: Codec, frame_size: tuple[int, int]) -> None:
        self.codec, self.frame_size = codec, frame_size

    @property
    def key(self) -> dict[str, Any]:
        """Codec and frame size."""
        return {"codec": self.codec.key, "frame_size": list(self.frame_size)}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Encode each frame as a clip of one frame."""
        return {self.name: encode_frames(self.codec, episode.frames, self.frame_size).numpy()}


class Frames:
    """Every frame, resized to (N, H, W, 3) uint8."""

    name = "frames"

    def __init__(self, frame_size: tuple[int, int]) -> None:
        self.frame_size = frame_size

    @property
    def key(self) -> dict[str, Any]:
        """Frame size."""
        return {"frame_size": list(self.frame_size)}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Resize the frames, bilinear with antialiasing, as for the codec."""
        return {self.name: resize(episode.frames, self.frame_size).numpy()}


class Targets:
    """The teacher's grid (N, h, w, P) float16 of every frame, interpolated to `grid` (Eqs. 3, 4).

    `limit` is the number of first frames of an episode to encode. None: all.
    """

    name = "targets"

    def __init__(self, teacher: Teacher, grid: tuple[int, int], limit: int | None) -> None:
        self.teacher, self.grid, self.limit = teacher, grid, limit

    @property
    def key(self) -> dict[str, Any]:
        """Teacher, grid and limit."""
        return {"teacher": self.teacher.key, "grid": list(self.grid), "limit": self.limit}

    def compute(self, episode: Episode) -> Mapping[str, np.ndarray]:
        """Encode each frame alone, from the recorded resolution."""
        frames = torch.as_tensor(np.ascontiguousarray(episode.frames[: self.limit]))
        return {self.name: teacher_grids(self.teacher, frames, self.grid).numpy()}


def resize(frames: np.ndarray, size: tuple[int, int]) -> UInt8[Tensor, "N H W 3"]:
    """Resize frames (N, ., ., 3) uint8 to `size` (H, W)."""
    return torch.from_numpy(to_frames(to_video(frames, size))[0])


def encode_frames(codec: Codec, frames: np.ndarray, size: tuple[int, int]) -> Float[Tensor, "N C h w"]:
    """Encode each of the frames (N, ., ., 3) uint8 alone. Returns float16 on the CPU."""
    video = to_video(frames, size)[0].transpose(0, 1)[:, :, None]  # (N, 3, 1, H, W)
    return torch.cat([codec.encode(chunk)[:, :, 0].half().cpu() for chunk in video.split(16)])


def teacher_grids(
    teacher: Teacher, frames: UInt8[Tensor, "N H W 3"], grid: tuple[int, int], *, size: int = _TEACHER_CHUNK
) -> Float[Tensor, "N h w P"]:
    """Compute the teacher's features of frames on a token grid (Eqs. 3, 4), float16 on the CPU.

    Frames go through the teacher in chunks of `size`, the last one padded. Kernels then run on one shape, and the
    features of a frame do not depend on the other frames, bit for bit.
    """
    grids = []
    for chunk in frames.split(size):
        missing = size - len(chunk)
        padded = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
        grids.append(interpolate_grid(teacher(padded), grid)[: len(chunk)].half().cpu())
    return torch.cat(grids)


def teacher_grids_of_windows(
    teacher: Teacher, windows: Sequence[np.ndarray], grid: tuple[int, int], *, alone: bool = False
) -> Float[Tensor, "B T h w P"]:
    """Compute `teacher_grids` of the frames (T, ., ., 3) uint8 of several windows. Windows may differ in frame size.

    `alone` encodes one frame at a time, without padding. The features then differ by rounding.
    """
    chunk = 1 if alone else _TEACHER_CHUNK
    grids: list[Tensor | None] = [None] * len(windows)
    for size in {window.shape for window in windows}:
        rows = [row for row, window in enumerate(windows) if window.shape == size]
        stacked = torch.from_numpy(np.concatenate([windows[row] for row in rows]))
        encoded = teacher_grids(teacher, stacked, grid, size=chunk).unflatten(0, (len(rows), -1))
        for row, values in zip(rows, encoded, strict=True):
            grids[row] = values
    return torch.stack([values for values in grids if values is not None])
