"""Measures of a method during training, logged like a loss at every validation (4.2.1, B.2.2).

`GroundingMonitor` measures attention and sensitivity on a folder of probe samples. `VisualRelianceMonitor` measures the
use of the image on held-out episodes. Both read cached features, so no frozen network is in memory. `PredictionMonitor`
predicts the video of held-out windows and decodes it with the codec. All hold the noise fixed. The trainer calls them in
the precision of the training. Figures that a method cannot offer are not logged.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from agra.batch import Batch, PolicyInputs
from agra.config import MonitorConfig
from agra.diagnostics.instruments.attention import action_attention
from agra.diagnostics.instruments.intervention import InterventionInputs, SetDeviation, set_deviation
from agra.diagnostics.metrics import attention_in_mask_ratio, centroid_error, matched_sensitivity_ratio
from agra.diagnostics.visual_reliance import (
    InputVariant,
    Swaps,
    VisualReliance,
    best_constants,
    groups_by_instruction,
)
from agra.methods.method import Attends, Imagines, Method, MethodConfig, ReadsTokens, observation_inputs
from agra.wam.codec import Codec, decode_frames

PICTURED = 4
"""Samples in a picture of the attention."""
CHUNK = 16
"""Samples that are measured together. Memory does not grow with their number."""
PREDICTION_STEPS = 6
"""Denoising steps of a predicted video, as in a policy."""
_IMAGES = ("latents", "frame_latents", "frames", "features")
"""The fields of `PolicyInputs` that come from the camera."""


def draw_noise(method: Method, count: int, seed: int) -> dict[str, Tensor]:
    """Starting noise of `count` answers on the CPU, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in method.noise_shapes().items()}


@contextmanager
def _evaluating(method: Method) -> Iterator[None]:
    """Switch dropout off, and afterwards restore the method's mode."""
    training = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(training)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeInputs:
    """Probe samples as the method takes them, on the CPU or a device, and their masks on the CPU."""

    inputs: PolicyInputs
    masks: Bool[Tensor, "B T H W"]  # on the token grid, none empty
    frames: UInt8[np.ndarray, "B H W 3"] | None = None
    """Frames of the first observations, equally large, for a picture."""


def require_token_grids(method: Method) -> None:
    """Raise ValueError for a method whose action head reads no token grids: nothing of the monitor is applicable to
    it.
    """
    if not isinstance(method, ReadsTokens):
        raise ValueError(
            f"monitor.probes: not applicable to the method {method.config.kind}, whose action head reads no token "
            "grids; leave monitor.probes empty"
        )


def require_video(config: MethodConfig) -> None:
    """Raise ValueError for a method that predicts no video."""
    with torch.device("meta"):
        method = config.build()
    if not isinstance(method, Imagines):
        raise ValueError(
            f"monitor.predictions: not applicable to the method {config.kind}, which predicts no video; "
            "leave monitor.predictions 0"
        )


def attention_over(frame: UInt8[np.ndarray, "H W 3"], attention: Float[np.ndarray, "h w"]) -> np.ndarray:
    """Return the frame (H, W, 3) uint8 with the attention in red, full where it is strongest."""
    height, width = frame.shape[:2]
    scaled = Image.fromarray(attention.astype(np.float32) / max(attention.max(), 1e-9))
    strength = 0.7 * np.asarray(scaled.resize((width, height), Image.Resampling.BILINEAR))[..., None]
    return (frame * (1 - strength) + np.array([255, 0, 0]) * strength).astype(np.uint8)


class GroundingMonitor:
    """Measures `in_mask_ratio`, `centroid_error` and `sensitivity_ratio`, the last one of some samples by mean
    replacement.

    A method whose attention cannot be read gets `sensitivity_ratio` alone.
    """

    def __init__(self, probes: ProbeInputs, config: MonitorConfig, *, seed: int = 0) -> None:
        if not len(probes.masks):
            raise ValueError("monitor.probes: no probe sample has a mask")
        self.probes, self.config, self.seed = probes, config, seed

    @torch.no_grad()
    def __call__(self, method: Method) -> dict[str, float | np.ndarray]:
        """Return the figures by name, and a picture of the attention over the first frames. Raises ValueError for a method without token grids."""
        require_token_grids(method)
        with _evaluating(method):
            return self._measure(method)

    def _measure(self, method: Method) -> dict[str, float | np.ndarray]:
        assert isinstance(method, ReadsTokens)
        count, device = len(self.probes.masks), next(method.parameters()).device
        noise = draw_noise(method, count, self.seed)
        measured = set(_matchable(self.probes.masks)[: self.config.sensitivity_samples])
        attention, deviations = [], []
        for rows in torch.arange(count).split(CHUNK):
            inputs = self.probes.inputs.rows(rows).to(device)
            drawn = {name: value[rows].to(inputs.state) for name, value in noise.items()}
            hidden = method.hidden(inputs, drawn)
            if isinstance(method, Attends):
                maps = action_attention(method, hidden, inputs, drawn, method.token_grid)
                attention.append(maps.mean(dim=1).float().cpu().numpy())
            for place, row in enumerate(rows.tolist()):
                if row in measured:
                    sample = InterventionInputs(
                        hidden={layer: states[place] for layer, states in hidden.items()},
                        inputs=inputs.rows([place]),
                        noise={name: value[place : place + 1] for name, value in drawn.items()},
                    )
                    deviations.append(self._deviation(method, sample, row))
        figures: dict[str, float | np.ndarray] = {}
        if attention:
            maps, masks = np.concatenate(attention), self.probes.masks.numpy()
            figures["in_mask_ratio"] = float(attention_in_mask_ratio(maps, masks).mean())
            figures["centroid_error"] = float(np.nanmean(centroid_error(maps, masks)))
            if self.probes.frames is not None:
                overlays = [attention_over(f, m) for f, m in zip(self.probes.frames, maps[:, 0], strict=False)]
                figures["attention"] = np.concatenate(overlays, axis=1)
        if deviations:
            inside, outside = (
                np.array([getattr(deviation, side) for deviation in deviations])
                for side in ("interaction", "background")
            )
            ratio = matched_sensitivity_ratio(inside, outside, resamples=2).ratio.value  # the interval is not used
            if np.isfinite(ratio):
                figures["sensitivity_ratio"] = ratio
        return figures

    def _deviation(self, method: Method, sample: InterventionInputs, row: int) -> SetDeviation:
        return set_deviation(
            method,
            [sample],
            self.probes.masks[row],
            kinds=("mean",),
            background_sets=self.config.background_sets,
            seed=self.seed + row,
        )["mean"]


def _matchable(masks: Bool[Tensor, "B T H W"]) -> Sequence[int]:
    """Samples whose mask leaves at least as many tokens outside it in every latent frame."""
    return (masks.flatten(2).float().mean(dim=2) <= 0.5).all(dim=1).nonzero().flatten().tolist()


class VisualRelianceMonitor:
    """Measures visual reliance on the first windows of held-out episodes (`agra.diagnostics.visual_reliance`).

    `inputs` and the demonstrated `actions` hold one window of each episode, from its first control step. `instructions`
    holds the episodes' instructions. `targets` turns normalised actions (B, K, D) into targets (B, d) in the robot's
    units. A masked image is the mean image of the batch, which shows what all scenes share, such as the table and the
    resting hands.
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
        self.demonstrated = targets(actions)
        self.swaps = Swaps.of(self.groups, instructions, self.demonstrated, {})
        self.constants = best_constants(self.demonstrated, self.groups)

    @torch.no_grad()
    def __call__(self, method: Method) -> dict[str, float]:
        """The means of `VisualReliance`, by name, and `error_ratio`, the error over the constant error."""
        with _evaluating(method):
            targets = self._targets_by_variant(method)
        names = [str(row) for row in range(len(self.groups))]
        reliance = VisualReliance.of(
            targets, self.demonstrated, self.swaps, trials=names, groups=self.groups, constants=self.constants
        )
        means = reliance.means()
        if means.get("constant_error"):
            means["error_ratio"] = means["error"] / means["constant_error"]
        return means

    def _variants(self) -> dict[InputVariant, PolicyInputs]:
        """The inputs of each variant. A method that reads no instruction has no variant with another one."""
        images = {name: value for name, value in self.inputs.tensors.items() if name in _IMAGES}
        swapped = {name: value[torch.as_tensor(self.swaps.image)] for name, value in images.items()}
        masked = {name: _mean(value).expand_as(value) for name, value in images.items()}
        variants: dict[InputVariant, PolicyInputs] = {
            "unchanged": self.inputs,
            "image_swapped": replace(self.inputs, **swapped),
            "image_masked": replace(self.inputs, **masked),
        }
        if self.inputs.instruction is not None:
            tokens = self.inputs.instruction[torch.as_tensor(self.swaps.instruction)]
            variants["instruction_swapped"] = replace(self.inputs, instruction=tokens)
        return variants

    def _targets_by_variant(self, method: Method) -> dict[InputVariant, np.ndarray]:
        return {variant: self._targets(method, inputs) for variant, inputs in self._variants().items()}

    def _targets(self, method: Method, inputs: PolicyInputs) -> np.ndarray:
        device, noise = next(method.parameters()).device, draw_noise(method, len(inputs), self.seed)
        chunks = []
        for rows in torch.arange(len(inputs)).split(CHUNK):
            drawn = {name: value[rows].to(device) for name, value in noise.items()}
            chunks.append(method.act(inputs.rows(rows).to(device), drawn))
        return self.targets(torch.cat(chunks))


class PredictionMonitor:
    """Predicts the video of the first `count` windows of `batch` and compares it with the recorded one.

    Both are decoded by the codec, so its own error is in neither.
    """

    def __init__(self, batch: Batch, count: int, config: MethodConfig, codec: Codec, *, seed: int = 0) -> None:
        self.inputs, self.codec, self.seed = observation_inputs(batch, config).rows(range(count)), codec, seed
        self.clip = bool(config.needs().clip)
        recorded = batch.latents if self.clip else batch.frame_latents
        assert recorded is not None
        self.recorded = recorded[:count] if self.clip else recorded[:count].transpose(1, 2)
        self._recorded_frames: np.ndarray | None = None  # decoded once

    @torch.no_grad()
    def __call__(self, method: Method) -> dict[str, float | np.ndarray]:
        """Return `psnr` in dB over the predicted frames, and `video` (F, 2H, B W, 3) uint8: the recording above, the
        prediction below, windows side by side.
        """
        assert isinstance(method, Imagines)  # require_video
        device = next(method.parameters()).device
        noise = {name: value.to(device) for name, value in draw_noise(method, len(self.inputs), self.seed).items()}
        with _evaluating(method):
            latents = method.imagine(self.inputs.to(device), noise, steps=PREDICTION_STEPS)
        predicted = decode_frames(self.codec, latents, clip=self.clip)
        if self._recorded_frames is None:
            same_frames = self.recorded[:, :, : latents.shape[2]].to(latents)
            self._recorded_frames = decode_frames(self.codec, same_frames, clip=self.clip)
        recorded = self._recorded_frames
        future = slice(1 if self.clip else 0, None)  # a clip begins with the observation, which both share
        error = np.mean((predicted[:, future].astype(np.float64) - recorded[:, future]) ** 2)
        rows = [np.concatenate([*videos], axis=2) for videos in (recorded, predicted)]
        return {"psnr": float(10 * np.log10(255**2 / max(error, 1e-9))), "video": np.concatenate(rows, axis=1)}


def _mean(images: Tensor) -> Tensor:
    """The mean over the batch, in the type of the images."""
    mean = images.float().mean(dim=0, keepdim=True)
    return mean.round().to(images.dtype) if images.dtype == torch.uint8 else mean.to(images.dtype)
