"""All instruments on one sample (3.2, 4.2.1, D).

The hidden states are computed once for all noise samples. Attention and deviations are averaged over the noise samples.
Pictures, predicted videos and measures of hidden states use the first one. An instrument that the method cannot offer
is not applicable: its values are None, never zero.
"""

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from agra.alignment.loss import Projectors
from agra.alignment.teacher import interpolate_grid
from agra.diagnostics.instruments.attention import action_attention, attention_parts, capture_attention, require_eval
from agra.diagnostics.instruments.hidden_states import mean_cosine, teacher_similarity
from agra.diagnostics.instruments.imagination import compare_videos, static_video
from agra.diagnostics.instruments.intervention import (
    INTERVENTION_KINDS,
    InterventionInputs,
    InterventionKind,
    MapUnit,
    sensitivity_map,
    set_deviation,
)
from agra.diagnostics.metrics import attention_in_mask_ratio, centroid_error, mask_to_grid
from agra.diagnostics.samples.probe_sample import ProbeSample
from agra.methods.method import Attends, AttendsToText, Imagines, Method, ReadsTokens
from agra.policies.policy import MethodPolicy
from agra.precision import autocast_to_weights
from agra.wam.codec import to_frames, to_video

TeacherFeatures = Callable[[np.ndarray], np.ndarray]
"""(N, H, W, 3) uint8 frames to (N, h, w, P) patch features."""
InstrumentName = Literal["attention", "interventions", "hidden_states", "text_attention", "imagination"]
"""Instruments that a method may lack. The error of the actions and visual reliance apply to every method."""


def applicable_instruments(method: Method) -> dict[InstrumentName, bool]:
    """Whether each instrument applies to the method, from its capabilities (`agra.methods.method`)."""
    reads_tokens = isinstance(method, ReadsTokens)
    return {
        "attention": reads_tokens and isinstance(method, Attends),
        "interventions": reads_tokens,
        "hidden_states": reads_tokens,
        "text_attention": reads_tokens and isinstance(method, AttendsToText),
        "imagination": isinstance(method, Imagines),
    }


@dataclass(frozen=True, kw_only=True)
class DiagnosisConfig:
    """Instruments of a diagnosis and their resolution."""

    kinds: tuple[InterventionKind, ...] = INTERVENTION_KINDS
    """Interventions on the interaction mask and its background sets."""
    noise_samples: int = 2
    """Samples of the policy's own noise for each probe sample: video noise and action noise together."""
    background_sets: int = 2
    """Background sets for each probe sample and noise sample."""
    map_kinds: tuple[InterventionKind, ...] = ("mean", "zero")
    """Interventions of the sensitivity maps. Each map needs one prediction per cell."""
    map_unit: MapUnit = "column"
    """`column` replaces a position in all latent frames at once, `token` each token alone (T times the cost)."""
    gallery: int = 6
    """Samples, spread over the list, that get maps and pictures."""
    layers: tuple[int, ...] | None = None
    """Layers to measure and picture. None selects the read and the aligned layers."""
    mask_threshold: float = 0.25
    """Fraction of a token's pixels that the mask must cover."""
    steps: int | None = None
    """Denoising steps of the action head. None selects the policy's own."""
    imagination_steps: int = 6
    """Denoising steps of the predicted video. 0 leaves it out."""
    batch: int = 16
    """Interventions that are computed together."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.kinds, *self.map_kinds} - set(INTERVENTION_KINDS))
        if unknown:
            raise ValueError(f"DiagnosisConfig: unknown interventions {unknown}, expected {INTERVENTION_KINDS}")
        for name in ("noise_samples", "background_sets", "steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DiagnosisConfig.{name}: expected at least 1, got {value}")
        for name in ("gallery", "imagination_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"DiagnosisConfig.{name}: expected at least 0, got {getattr(self, name)}")


class SampleMeasurement:
    """A sample and its measurements: `measure` for all samples, `picture` for those of the gallery."""

    def __init__(
        self,
        policy: MethodPolicy,
        sample: ProbeSample,
        seed: int,
        config: DiagnosisConfig,
        *,
        teacher: TeacherFeatures | None = None,
        projectors: Projectors | None = None,
    ) -> None:
        """Raises ValueError for a sample with other frames than the method's token grid, or without its past
        observations.
        """
        self.policy, self.method, self.sample, self.config = policy, policy.method, sample, config
        require_eval(self.method)
        self.tokens = policy.method if isinstance(policy.method, ReadsTokens) else None
        self.teacher, self.projectors = teacher, projectors
        self.steps: int | None = policy.options.get("action_steps") if config.steps is None else config.steps
        self.layers = measured_layers(policy, config)
        self.seed = zlib.crc32(f"{seed}/{sample.trial}/{sample.step}".encode())
        self.inputs = policy.encode([sample.observation_for(policy.past)])
        rows = [policy.noise(1, self.seed + number) for number in range(config.noise_samples)]
        self.noise = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        self.repeated = self.inputs.expand(config.noise_samples)
        self.frames = policy.crop(sample.frames, sample.embodiment)
        self.masks = policy.crop(sample.masks[..., None], sample.embodiment)[..., 0]
        if self.tokens is None:
            return
        with autocast_to_weights(self.method):
            self.hidden: dict[int, Tensor] = self.tokens.hidden(self.repeated, self.noise, layers=self.layers)
        self.noise_samples = [
            InterventionInputs(
                hidden={layer: states[row] for layer, states in self.hidden.items()}, inputs=self.inputs, noise=noise
            )
            for row, noise in enumerate(rows)
        ]
        width = policy.unnormalize(self.noise["action"][:1], sample.embodiment).shape[-1]
        self.dimensions = range(width)  # without padding
        self.grid = self.noise_samples[0].grid
        if len(sample.masks) != self.grid[0]:
            raise ValueError(
                f"sample {sample.trial} step {sample.step}: {len(sample.masks)} reference frames, but the method's "
                f"grid has {self.grid[0]} frames; write the probe samples again for this recipe"
            )
        self.mask = mask_to_grid(self.masks, self.grid[1:], threshold=config.mask_threshold)

    # --- every sample -------------------------------------------------------------------------------------------------

    def measure(self, arrays: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """The sample's line of metrics.jsonl. Its attention and mask are appended to `arrays`."""
        names = ("trial", "step", "regime", "instruction", "embodiment")
        if self.tokens is not None:
            arrays["mask"].append(self.mask)
        return {
            **{name: getattr(self.sample, name) for name in names},
            **self._place(),
            **self._grounding(arrays),
            **self._deviation(),
            **self._layers(),
            **self._imagination(),
            "action_error": self._action_error(),
        }

    def _place(self) -> dict[str, Any]:
        """The recorded frame's size and the crop's corner, which map a mask of the cropped frame to the recorded
        frame.
        """
        height, width = self.sample.frames.shape[1:3]
        numbers = np.arange(height * width).reshape(height, width, 1)
        corner = divmod(int(self.policy.crop(numbers, self.sample.embodiment)[0, 0, 0]), width)
        return {"images": self.sample.image_names(), "frame_size": [height, width], "crop": list(corner)}

    def _grounding(self, arrays: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """Attention metrics of the blocks' average, of each block, and of uniform attention."""
        measures = {"in_mask_ratio": attention_in_mask_ratio, "centroid_error": centroid_error}
        values: dict[str, Any] = {"tokens_in_mask": None}
        for name in measures:
            values |= {name: None, f"{name}_by_block": None, f"uniform_{name}": None}
        if self.tokens is None:
            return values
        values["tokens_in_mask"] = int(self.mask.sum())
        if not isinstance(self.method, Attends):
            return values
        maps = action_attention(self.method, self.hidden, self.repeated, self.noise, self.grid, steps=self.steps)
        blocks = maps.mean(dim=0).cpu().numpy()
        arrays["attention"].append(blocks.astype(np.float32))
        if self.mask.any():
            for name, measure in measures.items():
                values[name] = float(measure(blocks.mean(axis=0), self.mask))
                values[f"{name}_by_block"] = measure(blocks, self.mask).tolist()
                values[f"uniform_{name}"] = float(measure(np.ones(self.mask.shape), self.mask))
        return values

    def _deviation(self) -> dict[str, Any]:
        """Delta(I) and Delta(B) of every kind of intervention, or a note with the reason for their absence."""
        if self.tokens is None:
            return {"deviation": None, "note": f"not applicable to the method {self.policy.config.method.kind}"}
        per_frame = self.mask.reshape(len(self.mask), -1)
        if not per_frame.any():
            return {"deviation": None, "note": "the interaction mask is empty"}
        if (per_frame.mean(axis=1) > 0.5).any():
            return {"deviation": None, "note": "the interaction mask covers more than half of a latent frame"}
        deviation = set_deviation(
            self.method,
            self.noise_samples,
            torch.from_numpy(self.mask),
            kinds=self.config.kinds,
            background_sets=self.config.background_sets,
            seed=self.seed,
            dimensions=self.dimensions,
            steps=self.steps,
            batch=self.config.batch,
        )
        return {"deviation": {kind: asdict(both) for kind, both in deviation.items()}, "note": None}

    def states(self, layer: int) -> np.ndarray:
        """A layer's hidden states under the first noise sample, (T, H, W, D) float32."""
        return self.hidden[layer][0].float().cpu().numpy()

    @cached_property
    def features(self) -> np.ndarray | None:
        """The teacher's features of the reference frames, (T, h, w, P)."""
        return None if self.teacher is None else np.asarray(self.teacher(self.frames))

    @cached_property
    def targets(self) -> np.ndarray | None:
        """The teacher's features on the token grid, (T, H, W, P) (Eq. 4)."""
        if self.features is None:
            return None
        return interpolate_grid(torch.from_numpy(self.features), self.grid[1:]).numpy()

    def _layers(self) -> dict[str, Any]:
        """Similarity to the teacher and alignment, one value for each of `self.layers`."""
        if self.tokens is None or self.targets is None:
            return {"teacher_similarity_by_layer": None, "alignment_cosine_by_layer": None}
        teacher = self.targets.reshape(-1, self.targets.shape[-1])
        similar = [
            teacher_similarity(states.reshape(-1, states.shape[-1]), teacher)
            for states in map(self.states, self.layers)
        ]
        return {"teacher_similarity_by_layer": similar, "alignment_cosine_by_layer": self._alignment(self.targets)}

    def _alignment(self, targets: np.ndarray) -> list[float | None] | None:
        """The cosine of every layer that has a projector, None for the others."""
        if self.projectors is None:
            return None
        aligned = [int(layer) for layer in self.projectors]
        projected = self.projectors.project({layer: self.hidden[layer][:1] for layer in aligned})
        # Where the teacher's features are those of several depths, each aligned layer has a part of its own.
        several = projected[0].shape[-1] != targets.shape[-1]
        split = np.split(targets, len(aligned), axis=-1) if several else [targets] * len(aligned)
        cosines = {
            layer: mean_cosine(z[0].float().cpu().numpy(), target)
            for layer, z, target in zip(aligned, projected, split, strict=True)
        }
        return [cosines.get(layer) for layer in self.layers]

    @cached_property
    def imagined(self) -> np.ndarray | None:
        """The predicted video, (F, H, W, 3) uint8 at the method's frame size."""
        if not self.config.imagination_steps or self.sample.video is None or not isinstance(self.method, Imagines):
            return None
        first = {name: value[:1] for name, value in self.noise.items()}
        return self.policy.imagine(self.inputs, first, steps=self.config.imagination_steps)[0]

    @cached_property
    def recorded(self) -> np.ndarray:
        """The recorded video as the model would receive it, (F, H, W, 3) uint8."""
        assert self.sample.video is not None
        cropped = self.policy.crop(self.sample.video, self.sample.embodiment)
        return to_frames(to_video(cropped, self.policy.frame_size))[0]

    def _imagination(self) -> dict[str, Any]:
        scores: dict[str, Any] = dict.fromkeys(("psnr", "ssim", "still_psnr", "still_ssim"))
        if self.imagined is None:
            return scores
        predicted = compare_videos(self.imagined, self.recorded)
        still = compare_videos(static_video(self.recorded), self.recorded)
        return {"psnr": predicted.psnr, "ssim": predicted.ssim, "still_psnr": still.psnr, "still_ssim": still.ssim}

    def _action_error(self) -> float | None:
        """Root mean square over the chunk of predicted minus demonstrated actions, normalised.

        Mean over the noise samples.
        """
        if self.sample.actions is None:
            return None
        demonstrated = torch.from_numpy(self.policy.normalize(self.sample.actions, self.sample.embodiment))
        with autocast_to_weights(self.method):
            if self.tokens is None:
                chunk = self.method.act(self.repeated, self.noise, steps=self.steps)
            else:
                chunk = self.tokens.act_on(self.hidden, self.repeated, self.noise, steps=self.steps)
        length, width = min(len(demonstrated), chunk.shape[1]), demonstrated.shape[-1]
        error = chunk[:, :length, :width].float().cpu() - demonstrated[:length]
        return float(error.square().mean(dim=(1, 2)).sqrt().mean())

    # --- the gallery --------------------------------------------------------------------------------------------------

    def picture(self, arrays: dict[str, list[np.ndarray]], features: dict[str, list[np.ndarray]]) -> None:
        """Append frames, masks, maps and attention by part to `arrays`, and the inputs of PCA to `features`."""
        arrays["frames"].append(self.frames)
        arrays["frame_masks"].append(self.masks)
        if self.tokens is not None:
            for kind in self.config.map_kinds:
                arrays[f"sensitivity_{kind}"].append(self._map(kind))
            for layer in self.layers:
                features[f"pca_layer_{layer}"].append(self.states(layer))
            if isinstance(self.method, Attends):
                self._picture_attention(arrays)
        if self.features is not None:
            features["pca_teacher"].append(self.features)
        if self.imagined is not None:
            arrays["imagined"].append(self.imagined)
            arrays["recorded"].append(self.recorded)

    def _picture_attention(self, arrays: dict[str, list[np.ndarray]]) -> None:
        first = {layer: states[:1] for layer, states in self.hidden.items()}
        captured = capture_attention(self.method, first, self.inputs, self.noise_samples[0].noise, steps=self.steps)
        for name, part in vars(attention_parts(captured.weights, captured.actions.shape[1])).items():
            arrays[f"attention_by_{name}"].append(part[0].unflatten(-1, self.grid).cpu().numpy().astype(np.float16))

    def _map(self, kind: InterventionKind) -> np.ndarray:
        return sensitivity_map(
            self.method,
            self.noise_samples[0],
            kind=kind,
            unit=self.config.map_unit,
            dimensions=self.dimensions,
            steps=self.steps,
            batch=self.config.batch,
            generator=torch.Generator().manual_seed(self.seed),
        ).numpy()

    def text_attention(self) -> tuple[list[str], np.ndarray] | None:
        """The instruction's words, and the attention of each token to each word (Fig. 14).

        (layers, words, T, H, W) float16. The attention to all tokens of a word is added up. None where it is not
        applicable.
        """
        if self.tokens is None or not isinstance(self.method, AttendsToText) or self.policy.instructions is None:
            return None
        pairs = self.policy.instructions.encoder.words(self.sample.instruction)
        words = [(word, tokens) for word, tokens in pairs if tokens]
        with autocast_to_weights(self.method):
            weights = self.method.text_attention(self.inputs, self.noise_samples[0].noise, layers=self.layers)
        maps = [[weights[layer][0][..., list(tokens)].sum(dim=-1) for _, tokens in words] for layer in self.layers]
        stacked = torch.stack([torch.stack(row) for row in maps])
        return [word for word, _ in words], stacked.float().cpu().numpy().astype(np.float16)


def measured_layers(policy: MethodPolicy, config: DiagnosisConfig) -> tuple[int, ...]:
    """The layers that are measured and pictured, sorted. The aligned layers are always included."""
    if not isinstance(policy.method, ReadsTokens):
        return ()
    layers = policy.method.read_layers if config.layers is None else config.layers
    return tuple(sorted({*layers, *policy.config.method.aligned_layers}))
