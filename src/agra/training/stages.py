"""The three stages of C.3: what each trains, on which losses, how fast."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from torch import nn

from agra.precision import Precision
from agra.training.lora import LoRAConfig, is_adapter
from agra.training.objective import Objective, ObjectiveConfig


class Stage(StrEnum):
    """The order of training."""

    ADAPT = "adapt"  # the video DiT alone, on the video loss
    JOINT = "joint"  # everything, on all three losses; the action loss reaches the video DiT
    FINETUNE = "finetune"  # the bridge and the action DiT alone, on the action loss


_WEIGHTS_OFF = {
    Stage.ADAPT: ("action_weight", "alignment_weight"),
    Stage.JOINT: (),
    Stage.FINETUNE: ("video_weight", "alignment_weight"),
}


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training run; defaults are the simulation experiments' joint stage (C.3) and, where the paper is silent,
    the optimiser of the GR00T family (docs/paper.md #26)."""

    name: Stage = Stage.JOINT
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    steps: int = 80_000
    batch_size: int = 256
    video_lr: float = 1e-4
    action_lr: float = 1e-4  # bridge, action DiT and projectors
    train_video_dit: bool = True
    warmup_share: float = 0.05
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.95, 0.999)
    clip_norm: float = 1.0
    ema_decay: float | None = None
    """Keep an exponential average of the trained weights beside them; not in the paper (docs/paper.md #26)."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters instead of the weights themselves; not in the paper (docs/paper.md #26)."""
    precision: Precision = "auto"
    seed: int = 0
    log_every: int = 10
    validate_every: int = 1_000
    save_every: int = 1_000
    keep_checkpoints: int = 2
    keep_best: str = ""
    """`min:NAME` or `max:NAME` of a figure logged with the held-out losses, say `min:validation/action_loss` or
    `max:grounding/in_mask_ratio`: where it is best, a checkpoint is saved and kept; RUN/best stands for it."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "validate_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage.{name}: expected at least 1, got {getattr(self, name)}")
        if self.keep_best and not re.fullmatch(r"(min|max):\S+", self.keep_best):
            raise ValueError(f"stage.keep_best: expected min:NAME or max:NAME, got {self.keep_best!r}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"stage.ema_decay: expected a share in [0, 1) or None, got {self.ema_decay}")
        for weight in _WEIGHTS_OFF[self.name]:
            if getattr(self.objective, weight) != 0:
                raise ValueError(
                    f"stage.objective.{weight}: must be 0 in the {self.name} stage, got "
                    f"{getattr(self.objective, weight)}"
                )
        if self.name is Stage.FINETUNE and self.train_video_dit:
            raise ValueError("stage.train_video_dit: the finetune stage keeps the video DiT frozen")
        if self.name is Stage.ADAPT and not self.train_video_dit:
            raise ValueError("stage.train_video_dit: the adapt stage trains nothing else")

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up over the first `warmup_share` of the steps, then a cosine to 0.                          C.3"""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


def freeze(objective: Objective, stage: StageConfig) -> None:
    """Leave gradients on only where this stage trains: of a part that holds adapters, in those alone.

    Cosmos's text projection stays frozen in every stage, so that projected instruction tokens can be cached. Raises
    ValueError where adapters are on a part that the stage does not train.
    """
    wam = objective.wam
    objective.requires_grad_(stage.name is not Stage.ADAPT)
    wam.video_dit.requires_grad_(stage.train_video_dit)
    if wam.config.video_dit.text_projection_dim is not None:
        wam.video_dit.transformer.crossattn_proj.requires_grad_(False)
    for name, module in modules(objective).items():
        parameters = dict(module.named_parameters())
        if not any(map(is_adapter, parameters)):
            continue
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(f"stage.lora.layers: some are of the {name}, which the {stage.name} stage does not train")
        for own, parameter in parameters.items():
            parameter.requires_grad_(is_adapter(own))


def modules(objective: Objective) -> dict[str, nn.Module]:
    """The parts whose learning rates and gradient norms are told apart."""
    wam = objective.wam
    parts = {"video_dit": wam.video_dit, "bridge": wam.bridge, "action_dit": wam.action_dit}
    return parts if objective.projectors is None else {**parts, "projectors": objective.projectors}


def parameter_groups(objective: Objective, stage: StageConfig) -> Iterator[dict]:
    """AdamW's groups: each trained module with its own learning rate; no weight decay on biases and vectors.

    A bank of biases (n, out), one row per embodiment, counts as biases.
    """
    for name, module in modules(objective).items():
        rate = stage.video_lr if name == "video_dit" else stage.action_lr
        trained = [(own, p) for own, p in module.named_parameters() if p.requires_grad]
        for decays in (True, False):
            chosen = [p for own, p in trained if (p.ndim > 1 and not own.endswith("bias")) == decays]
            if chosen:
                yield {
                    "params": chosen,
                    "lr": rate,
                    "base_lr": rate,
                    "weight_decay": stage.weight_decay if decays else 0.0,
                }
