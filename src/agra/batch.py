"""The tensors of a training step, and those of a policy's observations."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of a training step. The method's `Needs` determine which optional fields are present.

    Letters: B samples, C latent channels, T latent frames, h x w the latent grid, L instruction tokens of width E, S
    state and D action dimensions (padded to the widest embodiment), K horizon, F frames of size Y x X, H x W the grid
    of teacher features of width P.
    """

    state: Float[Tensor, "B S"]  # normalised, zero in dimensions that the embodiment does not have
    actions: Float[Tensor, "B K D"]  # normalised
    action_mask: Bool[Tensor, "B K D"]  # False where there is no action to learn
    embodiment: Int[Tensor, "B"]  # row of the embodiment banks
    instruction: Float[Tensor, "B L E"] | None = None  # tokens of the frozen text encoder
    latents: Float[Tensor, "B C T h w"] | None = None  # normalised; latent frame 0 is the observation
    frame_latents: Float[Tensor, "B F C h w"] | None = None  # of frames that are encoded one by one
    frames: UInt8[Tensor, "B F Y X 3"] | None = None
    features: Float[Tensor, "B F H W P"] | None = None  # teacher features as an input
    frame_mask: Bool[Tensor, "B F"] | None = None  # False for `frame_latents` or `features` outside the episode
    targets: Float[Tensor, "B F H W P"] | None = None  # teacher features as a target (Eq. 4)
    states: Float[Tensor, "B F S"] | None = None  # of several control steps, as `state`
    target_rows: Int[Tensor, "R"] | None = None  # samples with targets; None means all

    def __len__(self) -> int:
        return len(self.state)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def num_targets(self) -> int:
        """Number of samples with targets."""
        return len(self) if self.target_rows is None else len(self.target_rows)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on another device."""
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors.items()})

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which a GPU copies without blocking the CPU."""
        return replace(self, **{k: v.pin_memory() for k, v in self.tensors.items()})

    def micro_batch(self, index: int, count: int) -> "Batch":
        """Return the samples index::count. The batch must be on the CPU."""
        values = {k: v[index::count] for k, v in self.tensors.items() if k != "target_rows"}
        if self.target_rows is not None:
            rows = self.target_rows[self.target_rows % count == index]
            values["target_rows"] = rows // count
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """Observations as inputs of a method.

    Letters as in `Batch`. `Needs` determine which optional fields are present.
    """

    state: Float[Tensor, "B S"]
    embodiment: Int[Tensor, "B"]
    instruction: Float[Tensor, "B L E"] | None = None
    latents: Float[Tensor, "B C 1 h w"] | None = None  # of the observation
    frame_latents: Float[Tensor, "B F C h w"] | None = None
    frames: UInt8[Tensor, "B F Y X 3"] | None = None
    features: Float[Tensor, "B F H W P"] | None = None
    states: Float[Tensor, "B F S"] | None = None

    def __len__(self) -> int:
        return len(self.state)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def rows(self, rows: Tensor | Sequence[int]) -> "PolicyInputs":
        """Select observations by their rows."""
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=self.state.device)
        return PolicyInputs(**{name: value[index] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str) -> "PolicyInputs":
        """Return the observations on another device."""
        return PolicyInputs(**{name: value.to(device) for name, value in self.tensors.items()})

    def expand(self, count: int) -> "PolicyInputs":
        """Repeat a single observation `count` times, without copies."""
        return PolicyInputs(**{name: value.expand(count, *value.shape[1:]) for name, value in self.tensors.items()})
