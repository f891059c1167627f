"""The frame encoder of Diffusion Policy and UWM: a ResNet-18 with group norm, from scratch, and windows of frames."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from agra.rng import sample_shard

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pooling = Literal["mean", "spatial_softmax"]
"""Summary of a frame's feature map: its mean, or the mean positions of learned maps, the keypoints."""


class ResidualBlock2d(nn.Module):
    """ResNet's basic block with group norm, 16 channels a group. Batch norm does not go with averaged weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(outputs // 16, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(outputs // 16, outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(outputs // 16, outputs)
            )

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        """Two convolutions beside the shortcut."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class FrameEncoder(nn.Module):
    """A ResNet-18 without its classifier, from scratch: a frame to one vector."""

    def __init__(self, channels: Sequence[int], *, pooling: Pooling = "mean", num_keypoints: int = 32) -> None:
        """`channels` are those of the stages, two blocks each. Multiples of 16."""
        super().__init__()
        self.width = frame_width(channels, pooling, num_keypoints)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False),
            nn.GroupNorm(channels[0] // 16, channels[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks = [ResidualBlock2d(channels[0], channels[0], 1), ResidualBlock2d(channels[0], channels[0], 1)]
        for inputs, outputs in pairwise(channels):
            blocks += [ResidualBlock2d(inputs, outputs, 2), ResidualBlock2d(outputs, outputs, 1)]
        self.blocks = nn.ModuleList(blocks)
        self.keypoints: nn.Conv2d | None = None
        self.project: nn.Linear | None = None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if pooling == "spatial_softmax":
            self.keypoints = nn.Conv2d(channels[-1], num_keypoints, 1)
            self.project = nn.Linear(self.width, self.width)

    def forward(self, frames: UInt8[Tensor, "N H W 3"]) -> Float[Tensor, "N E"]:
        """Features of frames, normalised by ImageNet's statistics as in the original."""
        mean, std = (torch.tensor(values, device=frames.device) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
        x = self.stem(((frames / 255 - mean) / std).movedim(-1, 1))
        for block in self.blocks:
            x = block(x)
        if self.keypoints is None or self.project is None:
            return x.mean(dim=(2, 3))
        return torch.relu(self.project(spatial_softmax(self.keypoints(x))))


def frame_width(channels: Sequence[int], pooling: Pooling, num_keypoints: int) -> int:
    """Return the width of a frame's vector. Raises ValueError for channels that do not divide into groups of 16."""
    if any(count % 16 for count in channels):
        raise ValueError(f"method.encoder_channels: expected multiples of 16, got {tuple(channels)}")
    return channels[-1] if pooling == "mean" else 2 * num_keypoints


def spatial_softmax(maps: Float[Tensor, "N C H W"]) -> Float[Tensor, "N 2*C"]:
    """The mean position (x, y) in [-1, 1] under the softmax of each map, of one map after the other."""
    height, width = maps.shape[-2:]
    weights = maps.flatten(2).float().softmax(dim=-1).unflatten(2, (height, width))
    rows, columns = (torch.linspace(-1, 1, size, device=maps.device) for size in (height, width))
    x, y = (weights.sum(dim=2) * columns).sum(dim=-1), (weights.sum(dim=3) * rows).sum(dim=-1)
    return torch.stack([x, y], dim=-1).flatten(1)


def cut(
    frames: UInt8[Tensor, "N Y X 3"], corners: Int[Tensor, "N 2"], size: tuple[int, int]
) -> UInt8[Tensor, "N H W 3"]:
    """A window of `size` from each frame, with its upper left pixel at `corners`."""
    rows, columns = (
        corners[:, axis, None] + torch.arange(length, device=frames.device) for axis, length in enumerate(size)
    )
    index = torch.arange(len(frames), device=frames.device)
    return frames[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def crop(frames: UInt8[Tensor, "B F Y X 3"], size: tuple[int, int], *, at_random: bool) -> UInt8[Tensor, "B F H W 3"]:
    """Cut a window of `size` from every frame: at a random place of its own, or at the centre."""
    count = frames.shape[0] * frames.shape[1]
    spare = torch.tensor([frames.shape[2] - size[0], frames.shape[3] - size[1]])
    if at_random:
        corners = (sample_shard(lambda n: torch.rand(n, 2), count) * (spare + 1)).long()
    else:
        corners = (spare // 2).expand(count, 2)
    return cut(frames.flatten(0, 1), corners.to(frames.device), size).unflatten(0, frames.shape[:2])
