"""The tensors of one training step. Data makes them; `training/objective.py` consumes them."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training step's samples: window of video as latents, the actions that go with it, and frozen features.

    Letters: B samples, C latent channels, T latent frames, h x w the latent grid, L instruction tokens of width E,
    S state and D action dimensions (padded to the widest embodiment), K horizon, H x W the video DiT's token grid,
    P teacher width.
    """

    latents: Float[Tensor, "B C T h w"]  # normalised; latent frame 0 is the observation
    instruction: Float[Tensor, "B L E"]  # tokens of the frozen text encoder
    state: Float[Tensor, "B S"]  # normalised, zero where the embodiment lacks a dimension
    actions: Float[Tensor, "B K D"]  # normalised
    action_mask: Bool[Tensor, "B K D"]  # False where there is no action to learn
    embodiment: Int[Tensor, "B"]  # row of the action DiT's banks
    targets: Float[Tensor, "B T H W P"] | None = None  # the teacher's grid, Eq. 4; None where a stage needs none
    has_targets: Bool[Tensor, "B"] | None = None  # False where a sample's targets were not computed; None: all were

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the batch by its field's name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors.items()})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which a GPU copies without stopping the CPU."""
        return replace(self, **{k: v.pin_memory() for k, v in self.tensors.items()})

    def micro_batch(self, index: int, count: int) -> "Batch":
        """Rows index::count."""
        return replace(self, **{k: v[index::count] for k, v in self.tensors.items()})
