"""The stages of training and the settings of one run. Read by training, loading and serving."""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum

from agra.lora import LoRAConfig
from agra.precision import Precision


class Stage(StrEnum):
    """Stages of training, in order (C.3). Most methods have only the joint stage."""

    ADAPT = "adapt"  # representations before actions: a WAM's video DiT on the video loss
    JOINT = "joint"  # all parts on all losses
    FINETUNE = "finetune"  # the action head on the action loss


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of one training run.

    The defaults are those of the simulation experiments' joint stage (C.3). Where the paper is silent, they are the
    optimiser settings of the GR00T family (docs/paper.md #26).
    """

    name: Stage = Stage.JOINT
    """Name of the stage. On the command line choose it with `--stage`, which also takes the recipe's settings for it."""
    steps: int = 80_000
    """Steps of the optimiser."""
    batch_size: int = 256
    """Windows (training samples) of a step, over all processes and micro-batches."""
    learning_rate: float = 1e-4
    """Highest learning rate, after the warm-up. A cosine then lowers it to 0."""
    learning_rate_by_part: dict[str, float] = field(default_factory=dict)
    """Learning rates of parts of the method that differ from `learning_rate`, such as {"video_dit": 1e-5}."""
    frozen: tuple[str, ...] = ()
    """Parts of the method that are not trained."""
    warmup_ratio: float = 0.05
    """Fraction of the steps in which the learning rate rises linearly."""
    weight_decay: float = 1e-5
    """Weight decay of AdamW. Vectors, such as biases and norms, have none."""
    betas: tuple[float, float] = (0.95, 0.999)
    """Decays of AdamW's first and second moment."""
    clip_norm: float | None = 1.0
    """Largest norm of all gradients together. A longer gradient is scaled down to it. None turns clipping off."""
    ema_decay: float | None = None
    """Decay of an additional exponential moving average of the trained weights. Not in the paper
    (docs/paper.md #26)."""
    ema_power: float | None = None
    """Power p of the average's warm-up: at step n the decay is at most 1 - (1 + n)^-p. None applies `ema_decay` from
    the first step."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters, trained instead of the weights. Not in the paper (docs/paper.md #26)."""
    precision: Precision = "auto"
    """Precision of matrix products: auto is bfloat16 on GPUs with instructions for it and float32 elsewhere."""
    seed: int = 0
    """Seed of the initial weights, the windows and all noise."""
    log_every: int = 10
    """Steps between two rows of losses in the log."""
    validate_every: int = 1_000
    """Steps between two validations on the held-out episodes. The last step is always validated."""
    save_every: int = 1_000
    """Steps between two checkpoints. The last step is always saved."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""
    keep_best: str = ""
    """`min:NAME` or `max:NAME` of a metric logged at validation, such as `min:validation/action_loss` or
    `max:grounding/in_mask_ratio`. The checkpoint with the best value is saved and kept. RUN/best refers to it."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "validate_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage.{name}: expected at least 1, got {getattr(self, name)}")
        rates = {f"learning_rate_by_part.{part}": rate for part, rate in self.learning_rate_by_part.items()}
        for name, value in ({"learning_rate": self.learning_rate, "weight_decay": self.weight_decay} | rates).items():
            if not value >= 0:
                raise ValueError(f"stage.{name}: expected at least 0, got {value}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"stage.clip_norm: expected a number above 0, or None for no clipping, got {self.clip_norm}"
            )
        if self.keep_best and not re.fullmatch(r"(min|max):\S+", self.keep_best):
            raise ValueError(f"stage.keep_best: expected min:NAME or max:NAME, got {self.keep_best!r}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"stage.ema_decay: expected a number in [0, 1) or None, got {self.ema_decay}")
        if self.ema_power is not None and not self.ema_power > 0:
            raise ValueError(f"stage.ema_power: expected a number above 0 or None, got {self.ema_power}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"stage.warmup_ratio: expected a number in [0, 1], got {self.warmup_ratio}")

    def rate_of(self, part: str) -> float:
        """Return the learning rate of a part before the schedule."""
        return self.learning_rate_by_part.get(part, self.learning_rate)

    def ema_decay_at(self, step: int) -> float | None:
        """The decay of the average at a step, counted from 0."""
        if self.ema_decay is None or self.ema_power is None:
            return self.ema_decay
        return min(self.ema_decay, 1 - (1 + step) ** -self.ema_power)

    def learning_rate_factor(self, step: int) -> float:
        """Return the schedule's factor: linear warm-up over `warmup_ratio` of the steps, then a cosine to 0 (C.3)."""
        warmup = max(1, round(self.warmup_ratio * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
