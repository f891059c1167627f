"""Visual reliance during training, from cached features, without a frozen network in memory."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from agra.batch import PolicyInputs
from agra.diagnostics.monitors.grounding import CHUNK, draw_noise
from agra.diagnostics.visual_reliance import Swaps, Variant, VisualReliance, groups_by_instruction
from agra.methods.method import Method

_IMAGES = ("latents", "frame_latents", "frames", "features")
"""The fields of `PolicyInputs` that come from the camera."""


class VisualRelianceMonitor:
    """Measures a method on the first windows of held-out episodes, always under the same noise.

    `inputs` and the demonstrated `actions` hold one window of each episode, from its first control step, and `instructions`
    its texts. `targets` turns normalised actions (B, K, D) into the targets (B, d) in the robot's units. A masked image is
    the mean over the batch: what all scenes share, the table and the resting hands.
    """

    def __init__(
        self,
        inputs: PolicyInputs,
        actions: Float[Tensor, "B K D"],
        instructions: Sequence[str],
        targets: Callable[[Float[Tensor, "B K D"]], np.ndarray],
        *,
        seed: int = 0,
    ) -> None:
        self.inputs, self.targets, self.seed = inputs, targets, seed
        self.groups = groups_by_instruction(instructions)
        self.swaps = Swaps.of(self.groups, instructions, {})
        self.demonstrated = targets(actions)

    @torch.no_grad()
    def __call__(self, method: Method) -> dict[str, float]:
        """The means of `VisualReliance`, by name, and `error_ratio`, error over constant error.

        Leaves the method's mode as it was.
        """
        training = method.training
        method.eval()
        try:
            targets = {variant: self._targets(method, inputs) for variant, inputs in self._variants().items()}
        finally:
            method.train(training)
        names = [str(row) for row in range(len(self.groups))]
        reliance = VisualReliance.of(targets, self.demonstrated, self.swaps, trials=names, groups=self.groups)
        means = reliance.means()
        if means.get("constant_error"):
            means["error_ratio"] = means["error"] / means["constant_error"]
        return means

    def _variants(self) -> dict[Variant, PolicyInputs]:
        images = {name: value for name, value in self.inputs.tensors.items() if name in _IMAGES}
        swapped = {name: value[torch.as_tensor(self.swaps.image)] for name, value in images.items()}
        masked = {name: _mean(value).expand_as(value) for name, value in images.items()}
        variants: dict[Variant, PolicyInputs] = {
            "seen": self.inputs,
            "image_swapped": replace(self.inputs, **swapped),
            "image_masked": replace(self.inputs, **masked),
        }
        if self.inputs.instruction is not None:
            tokens = self.inputs.instruction[torch.as_tensor(self.swaps.instruction)]
            variants["instruction_swapped"] = replace(self.inputs, instruction=tokens)
        return variants

    def _targets(self, method: Method, inputs: PolicyInputs) -> np.ndarray:
        device, noise = next(method.parameters()).device, draw_noise(method, len(inputs), self.seed)
        chunks = []
        for rows in torch.arange(len(inputs)).split(CHUNK):
            drawn = {name: value[rows].to(device) for name, value in noise.items()}
            chunks.append(method.act(inputs.rows(rows).to(device), drawn))
        return self.targets(torch.cat(chunks))


def _mean(images: Tensor) -> Tensor:
    """The mean over the batch, in the type of the images."""
    mean = images.float().mean(dim=0, keepdim=True)
    return mean.round().to(images.dtype) if images.dtype == torch.uint8 else mean.to(images.dtype)
