"""The alignment objective: projectors P_k (Eq. 5) and the loss of AGRA (Eq. 6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agra.alignment.teacher import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Aligned video layers, teacher and projector. The defaults are AGRA-DinoL8."""

    layers: tuple[int, ...] = (8,)  # S_agra, 0-based (docs/paper.md #3)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    projector: Literal["mlp", "conv"] = "mlp"
    """REPA's three-layer MLP, or iREPA's 3x3 convolution over each frame's grid. The paper does not say which
    (docs/paper.md #18)."""
    hidden_dim: int = 2048  # of the MLP
    include_observation: bool = True
    """Align latent frame 0 too, as the sum over all T_v frames requires (Eq. 6, docs/paper.md #13)."""
    include_future: bool = True
    """Align the later latent frames too, as Eq. 6 does. False aligns the observation alone."""
    spatial_normalization: bool = False
    """Standardise every feature of the targets over each frame's grid, as iREPA does (arXiv 2512.10794). Off in the
    paper."""

    def __post_init__(self) -> None:
        if not (self.include_observation or self.include_future):
            raise ValueError(
                "AlignmentConfig: include_observation and include_future are both false, so no frame is aligned"
            )
        if self.spatial_normalization and self.teacher.token == "class":
            raise ValueError(
                "AlignmentConfig.spatial_normalization: expected false, because the class token has no grid"
            )
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(
                f"AlignmentConfig.layers: expected at least one video layer and no repetition, got {self.layers}"
            )
        if self.teacher.depths and len(self.teacher.depths) != len(self.layers):
            raise ValueError(
                f"AlignmentConfig.teacher.depths: expected one for each of the layers {self.layers}, got "
                f"{self.teacher.depths}"
            )


class Projector(nn.Module):
    """Projector P_k from the hidden states of one video layer to the teacher's feature space (Eq. 5)."""

    def __init__(self, width: int, teacher_width: int, config: AlignmentConfig) -> None:
        super().__init__()
        if config.projector == "mlp":
            hidden = config.hidden_dim
            self.layers: nn.Module = nn.Sequential(
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, teacher_width),
            )
        else:
            self.layers = FrameConv(width, teacher_width)

    def forward(self, hidden: Float[Tensor, "B T H W D"]) -> Float[Tensor, "B T H W P"]:
        """Project to Z_k (Eq. 5)."""
        return self.layers(hidden)


class FrameConv(nn.Conv2d):
    """A 3x3 convolution over the grid of every latent frame, channels last."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__(width, teacher_width, kernel_size=3, padding=1)

    def forward(self, input: Float[Tensor, "B T H W D"]) -> Float[Tensor, "B T H W P"]:
        """Convolve each frame separately."""
        batch = input.shape[:2]
        return super().forward(input.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, batch)


class Projectors(nn.ModuleDict):
    """One projector for each aligned layer, keyed by the layer.

    With several depths each projects to its part of the width.
    """

    def __init__(self, width: int, teacher_width: int, config: AlignmentConfig) -> None:
        depth_width = teacher_width // max(1, len(config.teacher.depths))
        super().__init__({str(layer): Projector(width, depth_width, config) for layer in config.layers})

    def project(self, hidden: Mapping[int, Float[Tensor, "B T H W D"]]) -> list[Float[Tensor, "B T H W P"]]:
        """Return Z_k of every aligned layer, in the order of the config."""
        return [projector(hidden[int(layer)]) for layer, projector in self.items()]


def spatially_normalized(
    targets: Float[Tensor, "*frames H W P"], epsilon: float = 1e-6
) -> Float[Tensor, "*frames H W P"]:
    """Subtract each feature's mean over the grid and divide by its deviation there (iREPA, arXiv 2512.10794)."""
    mean, deviation = targets.mean(dim=(-3, -2), keepdim=True), targets.std(dim=(-3, -2), keepdim=True)
    return (targets - mean) / (deviation + epsilon)


def cosine(
    x: Float[Tensor, "*shape P"], y: Float[Tensor, "*shape P"], epsilon: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Return x.y / (|x| |y| + epsilon) in float32, the cosine (Eq. 6)."""
    x, y = x.float(), y.float()
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + epsilon)


def alignment_loss(
    projected: Sequence[Float[Tensor, "B T H W P"]], targets: Float[Tensor, "B T H W P"]
) -> Float[Tensor, ""]:
    """Return minus the mean cosine over layers, samples, latent frames and positions (Eq. 6).

    Raises ValueError if `projected` is empty or a shape differs from that of the targets.
    """
    if not projected:
        raise ValueError("alignment_loss: expected at least one projected layer, got none")
    for index, z in enumerate(projected):
        if z.shape != targets.shape:
            raise ValueError(
                f"alignment_loss: projected[{index}]: expected the targets' shape {tuple(targets.shape)}, got "
                f"{tuple(z.shape)}"
            )
    return -torch.stack([cosine(z, targets).mean() for z in projected]).mean()


def cosine_gain(
    projected: Sequence[Float[Tensor, "B T H W P"]], targets: Float[Tensor, "B T H W P"]
) -> Float[Tensor, ""]:
    """Return the mean cosine minus that of a constant prediction, the batch mean of the targets at each position.

    In a static scene the constant prediction already reaches a cosine of about 0.9, so the loss alone says little. The
    gain of a small batch is lower, since its mean is nearer to its samples. Not in the paper.
    """
    constant = targets.mean(dim=0, keepdim=True).expand_as(targets)
    return -alignment_loss(projected, targets) - cosine(constant, targets).mean()
