"""Grounding during training: attention and sensitivity on a folder of probe samples, logged like a loss.      4.2.1"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from agra.diagnostics.attention import action_attention
from agra.diagnostics.intervention import Probe, set_deviation
from agra.diagnostics.metrics import attention_in_mask_ratio, centroid_error
from agra.wam.model import WAM

CHUNK = 16
"""Samples that are measured together, so that memory does not grow with their number."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is measured on held-out probe samples wherever held-out windows are: every `stage.validate_every` steps."""

    probes: str = ""
    """A folder that `agra probes` wrote; empty measures nothing. Samples without a mask are left out."""
    sensitivity_samples: int = 8
    """Samples, the first ones, whose sensitivity ratio is measured: the costly part."""
    draws: int = 2
    """Background sets of each."""

    def __post_init__(self) -> None:
        if self.sensitivity_samples < 0 or self.draws < 1:
            raise ValueError(
                f"monitor: expected sensitivity_samples >= 0 and draws >= 1, got {self.sensitivity_samples}, {self.draws}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeInputs:
    """Probe samples as the model takes them. Letters as in `WAM.act`."""

    observation_latent: Float[Tensor, "B C 1 h w"]
    instruction: Float[Tensor, "B L E"]
    state: Float[Tensor, "B S"]
    embodiment: Int[Tensor, "B"]
    masks: Bool[Tensor, "B T H W"]  # on the token grid, none empty

    def rows(self, rows: Tensor, device: torch.device) -> "ProbeInputs":
        """Some of the samples, on a device; the masks stay on the CPU."""
        moved = {name: value[rows].to(device) for name, value in vars(self).items() if name != "masks"}
        return ProbeInputs(**moved, masks=self.masks[rows])


class GroundingMonitor:
    """`in_mask_ratio`, `centroid_error` and, of some samples, `sensitivity_ratio` under mean replacement; always under the
    same noise."""

    def __init__(self, inputs: ProbeInputs, config: MonitorConfig, *, seed: int = 0) -> None:
        if not len(inputs.masks):
            raise ValueError("monitor: no probe sample has a mask")
        self.inputs, self.config, self.seed = inputs, config, seed

    @torch.no_grad()
    def __call__(self, wam: WAM) -> dict[str, float]:
        """The figures by name. Leaves the model in the mode in which it came."""
        training = wam.training
        wam.eval()
        try:
            return self._measure(wam)
        finally:
            wam.train(training)

    def _measure(self, wam: WAM) -> dict[str, float]:
        count, config, head = len(self.inputs.masks), wam.config, wam.config.action_dit
        generator = torch.Generator().manual_seed(self.seed)
        video = torch.randn(count, *config.latent_shape, generator=generator)
        noise = torch.randn(count, head.horizon, head.action_dim, generator=generator)
        measured = set(_matchable(self.inputs.masks)[: self.config.sensitivity_samples])
        attention, ratios = [], []
        for rows in torch.arange(count).split(CHUNK):
            part = self.inputs.rows(rows, next(wam.parameters()).device)
            hidden = wam.condition(part.observation_latent, video[rows].to(part.state), part.instruction)
            actions = noise[rows].to(part.state)
            arguments = (wam.guide(hidden), part.state, part.embodiment, actions, config.token_grid)
            attention.append(action_attention(wam, *arguments).mean(dim=1).float().cpu().numpy())
            for place, row in enumerate(rows.tolist()):
                if row in measured:
                    probe = Probe(
                        hidden={layer: states[place] for layer, states in hidden.items()},
                        state=part.state[place],
                        embodiment=part.embodiment[place],
                        noise=actions[place],
                    )
                    ratios.append(self._ratio(wam, probe, row))
        read, masks = np.concatenate(attention), self.inputs.masks.numpy()
        figures = {
            "in_mask_ratio": float(attention_in_mask_ratio(read, masks).mean()),
            "centroid_error": float(np.nanmean(centroid_error(read, masks))),
        }
        return figures | ({"sensitivity_ratio": float(np.median(ratios))} if ratios else {})

    def _ratio(self, wam: WAM, probe: Probe, row: int) -> float:
        both = set_deviation(
            wam, [probe], self.inputs.masks[row], kinds=("mean",), draws=self.config.draws, seed=self.seed + row
        )["mean"]
        return float(np.divide(np.mean(both.interaction), np.mean(both.background)))


def _matchable(masks: Bool[Tensor, "B T H W"]) -> Sequence[int]:
    """Samples whose mask leaves as many tokens outside it in every latent frame."""
    return (masks.flatten(2).float().mean(dim=2) <= 0.5).all(dim=1).nonzero().flatten().tolist()
