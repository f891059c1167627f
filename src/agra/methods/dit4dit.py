"""DiT4DiT (Ma et al., arXiv 2603.10448): an action head that reads one hidden layer of a video DiT.

A training step runs the video DiT twice. The denoising pass trains it on video, at uniform noise levels. The
conditioning pass, pure noise after the observation at the level of the scheduler's first step, gives the hidden states
of one layer. The action head attends to them and learns from several noise draws for each. The hidden states are
detached: actions do not train the video DiT. With `detach=False` they do, which makes it a world action model with a
single-layer bridge.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from agra.alignment.loss import AlignmentConfig
from agra.batch import Batch
from agra.flow import velocity
from agra.hub import weight_files
from agra.methods.method import LossDenominators, Losses
from agra.methods.wam import NoiseLevels, ObjectiveConfig, Pass, WAMMethod, WAMMethodConfig
from agra.rng import noise_like
from agra.stages import Stage
from agra.wam.action_dit import ActionDiTConfig
from agra.wam.bridge import BridgeConfig
from agra.wam.groot import RENAMED
from agra.wam.model import WAMConfig
from agra.weights import check_fit, stored_tensors

FIRST_SCHEDULER_LEVEL = 0.99502
"""Noise level of the first step of Cosmos-Predict2.5's scheduler, at which the conditioning pass runs."""


def published_model() -> WAMConfig:
    """The released model for GR1: Cosmos-Predict2.5-2B, block 17 of 28, a head of 16 sub-blocks."""
    return WAMConfig(
        frame_size=(224, 224),
        num_frames=9,
        guidance_noise_level=FIRST_SCHEDULER_LEVEL,
        bridge=BridgeConfig(layers=(17,) * 8, projector="identity"),
        action_dit=ActionDiTConfig(
            num_heads=12, head_dim=64, hidden_dim=2560, bank_init_std=None, time_grows_with_noise=True
        ),
    )


@dataclass(frozen=True, kw_only=True)
class DiT4DiTConfig(WAMMethodConfig):
    """A WAM without alignment whose head reads one layer. The defaults are the released model's."""

    kind: Literal["dit4dit"] = "dit4dit"  # pyright: ignore[reportIncompatibleVariableOverride]
    model: WAMConfig = field(default_factory=published_model)
    alignment: AlignmentConfig | None = None
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(alignment_weight=0.0, noise_levels=NoiseLevels.UNIFORM, action_draws=4)
    )
    detach: bool = True
    """Whether the action loss stops at the hidden states, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment is not None:
            raise ValueError("method.alignment: DiT4DiT has none; a WAM with an alignment is the method wam")
        if len(layers := set(self.model.bridge.layers)) > 1:
            raise ValueError(f"method.model.bridge.layers: DiT4DiT reads one layer, got {sorted(layers)}")
        if self.objective.guidance_pass is not Pass.CONDITIONING:
            raise ValueError("method.objective.guidance_pass: DiT4DiT's head reads the conditioning pass")

    def check(self, stage: Stage, frozen: Sequence[str]) -> None:
        """Check as for a WAM. Raise ValueError also if no loss trains the video DiT and it is not frozen."""
        super().check(stage, frozen)
        if self.detach and self.objective.video_weight == 0 and "video_dit" not in frozen:
            raise ValueError(
                "method.objective.video_weight: with detach and without a video loss nothing trains the video DiT; add "
                "video_dit to stage.frozen or set method.detach to false"
            )

    def build(self) -> "DiT4DiT":
        """The three networks with fresh weights."""
        return DiT4DiT(self)

    def describe(self) -> str:
        """The layer, and whether actions train the video DiT."""
        trained = "by the video loss alone" if self.detach else "by the video and the action loss"
        return f"DiT4DiT: action head on video layer {self.model.bridge.layers[0]}, video DiT trained {trained}"


class DiT4DiT(WAMMethod):
    """Acts as a WAM does: one conditioning pass, then Euler steps of the action head. The loss is its own."""

    config: DiT4DiTConfig

    def loss(self, batch: Batch, denominators: LossDenominators | None = None) -> Losses:
        """Compute the video and the action loss, those whose weight is above zero, and their weighted sum."""
        weights, terms = self.config.objective.weights, {}
        denominators = denominators or self.denominators(batch)
        if weights["video"] > 0:
            terms["video"] = self.video_loss(batch)
        if weights["action"] > 0:
            guidance = self.wam.guide(self.read(batch))
            terms["action"] = self.action_loss(batch, guidance, denominators["actions"])
        zero = torch.zeros((), device=batch.state.device)
        return Losses(total=sum((weights[name] * term for name, term in terms.items()), start=zero), terms=terms)

    def video_loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Compute the velocity error of the future latent frames: mean of (v(x_s, s) - (noise - x))^2, s uniform.

        `video_batch_fraction` of the batch takes part.
        """
        assert batch.latents is not None
        assert batch.instruction is not None
        count = max(1, round(self.config.objective.video_batch_fraction * len(batch)))
        latents, instruction = batch.latents[:count], batch.instruction[:count]
        level = self._noise_levels(count).to(latents.device)
        noise = noise_like(latents)
        predicted = self.wam.denoise(latents, noise, level, instruction).velocity
        assert predicted is not None
        return (predicted - velocity(latents, noise))[:, :, 1:].float().square().mean()

    def read(self, batch: Batch) -> dict[int, Float[Tensor, "B T H W D"]]:
        """Run the conditioning pass and return the layer's hidden states, detached or not."""
        assert batch.latents is not None
        assert batch.instruction is not None
        with torch.no_grad() if self.config.detach else nullcontext():
            return self.wam.condition(batch.latents[:, :, :1], noise_like(batch.latents), batch.instruction)


# --- released weights -------------------------------------------------------------------------------------------------

_VIDEO, _ACTION = "backbone_interface.extractor.transformer.", "action_model."
_MLPS = ("state_encoder.", "action_encoder.", "action_decoder.")
"""Linear layers there, banks of one embodiment here."""


def load_dit4dit(method: DiT4DiT, folder: str | Path) -> tuple[str, ...]:
    """Copy the video DiT and the action head of a released checkpoint, converted to safetensors (docs/methods.md).

    Returns the names of its tensors without counterpart here, the frozen VAE's and text encoder's apart. Its velocity
    is noise - actions and its level 1 is noise, as here. Raises FileNotFoundError without safetensors files, ValueError
    for a method of another architecture.
    """
    model = method.config.model
    head = model.action_dit
    if model.bridge.has_weights or not head.time_grows_with_noise or head.self_attention_first:
        raise ValueError(
            "load_dit4dit: expected an identity bridge, time_grows_with_noise and cross-attention first, as in the "
            "recipe dit4dit"
        )
    what = f"{folder}: DiT4DiT's networks"
    targets = {_released_name(name): (name, tensor) for name, tensor in method.state_dict().items()}
    with stored_tensors(weight_files(Path(folder)), what) as stored, torch.no_grad():
        names = [name for name in stored if name.startswith((_VIDEO, _ACTION))]
        shapes = {name: _bank_shape(name, stored[name].get_shape()) for name in names if name in targets}
        check_fit(shapes, {name: tensor for name, (_, tensor) in targets.items()}, what)
        for name, (_, tensor) in targets.items():
            value = stored[name][...]
            tensor.copy_((value.mT if value.ndim == 2 else value)[None] if _is_bank(name) else value)
    return tuple(sorted(set(names) - targets.keys()))


def _released_name(name: str) -> str:
    if name.startswith("wam.video_dit.transformer."):
        return _VIDEO + name.removeprefix("wam.video_dit.transformer.")
    name = name.removeprefix("wam.")
    if not name.removeprefix("action_dit.").startswith(_MLPS):
        for part, released in RENAMED:  # GR00T's names, but for the encoders and the decoder
            name = name.replace(part, released)
    return _ACTION + name.removeprefix("action_dit.")


def _is_bank(released_name: str) -> bool:
    return released_name.removeprefix(_ACTION).startswith(_MLPS)


def _bank_shape(released_name: str, shape: Sequence[int]) -> Sequence[int]:
    """The shape here: a bank of one embodiment, whose weights are (inputs, outputs)."""
    return (1, *reversed(shape)) if _is_bank(released_name) else shape
