"""Grounding during training: attention and sensitivity on a folder of probe samples, logged like a loss (4.2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from agra.batch import PolicyInputs
from agra.config import MonitorConfig
from agra.diagnostics.instruments.attention import action_attention
from agra.diagnostics.instruments.intervention import Probe, set_deviation
from agra.diagnostics.metrics import attention_in_mask_ratio, centroid_error
from agra.methods.method import Attends, Method, ReadsTokens

CHUNK = 16
"""Samples that are measured together, so that memory does not grow with their number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeInputs:
    """Probe samples as the method takes them, on the CPU or a device, and their masks on the CPU."""

    inputs: PolicyInputs
    masks: Bool[Tensor, "B T H W"]  # on the token grid, none empty


def draw_noise(method: Method, count: int, seed: int) -> dict[str, Tensor]:
    """Starting noise of `count` answers on the CPU, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in method.noise_shapes().items()}


class GroundingMonitor:
    """Measures `in_mask_ratio`, `centroid_error` and, of some samples, `sensitivity_ratio` under mean replacement.

    Always under the same noise. Raises ValueError for a method without token grids.
    """

    def __init__(self, probes: ProbeInputs, config: MonitorConfig, *, seed: int = 0) -> None:
        if not len(probes.masks):
            raise ValueError("monitor: no probe sample has a mask")
        self.probes, self.config, self.seed = probes, config, seed

    @torch.no_grad()
    def __call__(self, method: Method) -> dict[str, float]:
        """The figures by name. Leaves the method's mode as it was."""
        training = method.training
        method.eval()
        try:
            return self._measure(method)
        finally:
            method.train(training)

    def _measure(self, method: Method) -> dict[str, float]:
        if not isinstance(method, ReadsTokens) or not isinstance(method, Attends):
            raise ValueError(f"monitor.probes: not applicable to {method.config.kind}, which reads no token grids")
        count, device = len(self.probes.masks), next(method.parameters()).device
        noise = draw_noise(method, count, self.seed)
        measured = set(_matchable(self.probes.masks)[: self.config.sensitivity_samples])
        attention, ratios = [], []
        for rows in torch.arange(count).split(CHUNK):
            inputs = self.probes.inputs.rows(rows).to(device)
            drawn = {name: value[rows].to(inputs.state) for name, value in noise.items()}
            hidden = method.hidden(inputs, drawn)
            maps = action_attention(method, hidden, inputs, drawn, method.token_grid)
            attention.append(maps.mean(dim=1).float().cpu().numpy())
            for place, row in enumerate(rows.tolist()):
                if row in measured:
                    probe = Probe(
                        hidden={layer: states[place] for layer, states in hidden.items()},
                        inputs=inputs.rows([place]),
                        noise={name: value[place : place + 1] for name, value in drawn.items()},
                    )
                    ratios.append(self._ratio(method, probe, row))
        read, masks = np.concatenate(attention), self.probes.masks.numpy()
        figures = {
            "in_mask_ratio": float(attention_in_mask_ratio(read, masks).mean()),
            "centroid_error": float(np.nanmean(centroid_error(read, masks))),
        }
        return figures | ({"sensitivity_ratio": float(np.median(ratios))} if ratios else {})

    def _ratio(self, method: Method, probe: Probe, row: int) -> float:
        deviation = set_deviation(
            method,
            [probe],
            self.probes.masks[row],
            kinds=("mean",),
            background_sets=self.config.background_sets,
            seed=self.seed + row,
        )["mean"]
        return float(np.divide(np.mean(deviation.interaction), np.mean(deviation.background)))


def _matchable(masks: Bool[Tensor, "B T H W"]) -> Sequence[int]:
    """Samples whose mask leaves at least as many tokens outside it in every latent frame."""
    return (masks.flatten(2).float().mean(dim=2) <= 0.5).all(dim=1).nonzero().flatten().tolist()
