"""`looking` during training: the same measures from cached features, without a frozen network in memory."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from agra.batch import Batch
from agra.diagnostics.grounding_monitor import CHUNK
from agra.diagnostics.looking import Looking, Swaps, Variant, groups_by_instruction
from agra.wam.model import WAM


class LookingMonitor:
    """Measures a WAM on the first windows of held-out episodes, always under the same noise.

    `batch` holds one window an episode, from its first control step; `instructions` are its texts and `targets` turns
    normalised actions (B, K, D) into the planar targets (B, d) in the robot's units. Masked here is the mean latent of the
    batch: what all scenes share, the table and the resting hands.
    """

    def __init__(
        self,
        batch: Batch,
        instructions: Sequence[str],
        targets: Callable[[Float[Tensor, "B K D"]], np.ndarray],
        *,
        seed: int = 0,
    ) -> None:
        self.batch, self.targets, self.seed = batch, targets, seed
        self.groups = groups_by_instruction(instructions)
        self.swaps = Swaps.of(self.groups, instructions, {})
        self.wanted = targets(batch.actions)

    @torch.no_grad()
    def __call__(self, wam: WAM) -> dict[str, float]:
        """The means of `Looking`, by name, and `error_ratio`, error over constant error. Leaves the model in the mode in which it came."""
        batch = self.batch
        seen = batch.latents[:, :, :1]
        image, instruction = torch.as_tensor(self.swaps.image), torch.as_tensor(self.swaps.instruction)
        shown: dict[Variant, tuple[Tensor, Tensor]] = {
            "seen": (seen, batch.instruction),
            "image_swapped": (seen[image], batch.instruction),
            "image_masked": (seen.mean(dim=0, keepdim=True).expand_as(seen), batch.instruction),
            "instruction_swapped": (seen, batch.instruction[instruction]),
        }
        training = wam.training
        wam.eval()
        try:
            targets: dict[Variant, np.ndarray] = {v: self._targets(wam, batch, *inputs) for v, inputs in shown.items()}
        finally:
            wam.train(training)
        names = [str(row) for row in range(len(self.groups))]
        means = Looking.of(targets, self.wanted, self.swaps, trials=names, groups=self.groups).means()
        if means.get("constant_error"):
            means["error_ratio"] = means["error"] / means["constant_error"]
        return means

    def _targets(self, wam: WAM, batch: Batch, observation: Tensor, instruction: Tensor) -> np.ndarray:
        device, generator = next(wam.parameters()).device, torch.Generator().manual_seed(self.seed)
        video = torch.randn(batch.latents.shape, generator=generator)
        noise = torch.randn(batch.actions.shape, generator=generator)
        chunks = []
        for rows in torch.arange(len(noise)).split(CHUNK):
            inputs = (value[rows].to(device) for value in (observation, video, instruction))
            head = (value[rows].to(device) for value in (batch.state, batch.embodiment, noise))
            chunks.append(wam.act(wam.guide(wam.condition(*inputs)), *head))
        return self.targets(torch.cat(chunks))
