"""One sample under every instrument: what `diagnose` repeats.                                       3.2, 4.2.1, D

The conditioning pass runs once for all noises of the sample. Attention and deviations are averaged over the noises; what
is pictured, imagined or read from hidden states takes the first one.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agra.alignment.loss import Projectors
from agra.alignment.teacher import interpolate_grid
from agra.diagnostics.attention import action_attention, attention_parts, capture_attention
from agra.diagnostics.features import mean_cosine, teacher_similarity
from agra.diagnostics.imagination import compare_videos, nothing_moves
from agra.diagnostics.intervention import KINDS, Kind, Probe, Unit, sensitivity_map, set_deviation
from agra.diagnostics.metrics import attention_in_mask_ratio, centroid_error, mask_to_grid
from agra.diagnostics.probe import ProbeSample
from agra.wam.codec import to_frames, to_video

if TYPE_CHECKING:
    from agra.policy import WAMPolicy

Teacher = Callable[[np.ndarray], np.ndarray]
"""(N, H, W, 3) uint8 frames to (N, h, w, P) patch features."""


@dataclass(frozen=True, kw_only=True)
class DiagnosisConfig:
    """What is measured and how finely."""

    kinds: tuple[Kind, ...] = KINDS
    """Interventions on the interaction mask and its background sets."""
    noises: int = 2
    """Draws of the policy's own randomness for each sample: the video noise and the action noise together."""
    draws: int = 2
    """Background sets for each sample and noise."""
    map_kinds: tuple[Kind, ...] = ("mean", "zero")
    """Interventions of the sensitivity maps; each map needs one prediction per cell."""
    map_unit: Unit = "column"
    """`column` replaces a position in all latent frames at once, `token` each token by itself (T times the cost)."""
    gallery: int = 6
    """Samples, spread over the list, that get maps and pictures."""
    layers: tuple[int, ...] | None = None
    """Video layers to measure and picture; None takes the bridged and the aligned ones."""
    mask_threshold: float = 0.25
    """Share of a token's pixels that the mask must cover."""
    steps: int | None = None
    """Euler steps of the action head; None takes the policy's own."""
    imagination_steps: int = 6
    """Euler steps of the predicted video; 0 leaves it out."""
    batch: int = 16

    def __post_init__(self) -> None:
        unknown = sorted({*self.kinds, *self.map_kinds} - set(KINDS))
        if unknown:
            raise ValueError(f"DiagnosisConfig: unknown interventions {unknown}, expected {KINDS}")
        for name in ("noises", "draws", "steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DiagnosisConfig.{name}: expected at least 1, got {value}")
        for name in ("gallery", "imagination_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"DiagnosisConfig.{name}: expected at least 0, got {getattr(self, name)}")


class Instrument:
    """A sample and everything that is asked about it; `measure` for all samples, `picture` for the gallery's."""

    def __init__(
        self,
        policy: "WAMPolicy",
        sample: ProbeSample,
        seed: int,
        config: DiagnosisConfig,
        *,
        teacher: Teacher | None = None,
        projectors: Projectors | None = None,
    ) -> None:
        self.policy, self.model, self.sample, self.config = policy, policy.model, sample, config
        self.teacher, self.projectors = teacher, projectors
        self.steps = policy.action_steps if config.steps is None else config.steps
        self.layers = measured_layers(policy, config)
        self.seed = zlib.crc32(f"{seed}/{sample.trial}/{sample.step}".encode())
        self.inputs = policy.prepare([sample.observation])
        seeds = [self.seed + noise for noise in range(config.noises)]
        self.video_noise = torch.cat([policy.video_noise(1, each) for each in seeds])
        self.noise = torch.cat([policy.action_noise(1, each) for each in seeds])
        self.hidden: dict[int, Tensor] = self.model.condition(
            self._repeated(self.inputs.observation_latent),
            self.video_noise,
            self._repeated(self.inputs.instruction),
            layers=self.layers,
        )
        self.state, self.embodiment = self._repeated(self.inputs.state), self._repeated(self.inputs.embodiment)
        self.probes = [
            Probe(
                hidden={layer: states[row] for layer, states in self.hidden.items()},
                state=self.inputs.state[0],
                embodiment=self.inputs.embodiment[0],
                noise=self.noise[row],
            )
            for row in range(config.noises)
        ]
        own = policy.unnormalize(self.noise[:1], sample.embodiment).shape[-1]
        self.dimensions = range(own)  # without padding
        self.grid = self.probes[0].grid
        if len(sample.masks) != self.grid[0]:
            raise ValueError(
                f"sample {sample.trial} step {sample.step}: {len(sample.masks)} reference frames, but the model has"
                f" {self.grid[0]} latent frames"
            )
        self.frames = policy.seen(sample.frames, sample.embodiment)
        self.masks = policy.seen(sample.masks[..., None], sample.embodiment)[..., 0]
        self.mask = mask_to_grid(self.masks, self.grid[1:], threshold=config.mask_threshold)

    def _repeated(self, rows: Tensor) -> Tensor:
        return rows.expand(self.config.noises, *rows.shape[1:])

    # --- every sample -------------------------------------------------------------------------------------------------

    def measure(self, arrays: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """The sample's line of metrics.jsonl; its attention, mask and hidden states go to `arrays`."""
        guidance = self.model.guide(self.hidden)
        arguments = (self.model, guidance, self.state, self.embodiment, self.noise, self.grid)
        blocks = action_attention(*arguments, steps=self.steps).mean(dim=0).cpu().numpy()
        arrays["attention"].append(blocks.astype(np.float32))
        arrays["mask"].append(self.mask)
        names = ("trial", "step", "regime", "instruction", "embodiment")
        return {
            **{name: getattr(self.sample, name) for name in names},
            **self._place(),
            **self._grounding(blocks),
            **self._deviation(),
            **self._layers(),
            **self._imagination(),
            "action_error": self._action_error(guidance),
        }

    def _place(self) -> dict[str, Any]:
        """What brings a mask drawn on the cropped frame back to the recorded one: its size and the crop's corner."""
        height, width = self.sample.frames.shape[1:3]
        numbers = np.arange(height * width).reshape(height, width, 1)
        corner = divmod(int(self.policy.seen(numbers, self.sample.embodiment)[0, 0, 0]), width)
        return {"images": self.sample.image_names(), "frame_size": [height, width], "crop": list(corner)}

    def _grounding(self, blocks: np.ndarray) -> dict[str, Any]:
        """Attention metrics of the blocks' average, of each block, and of attention spread evenly."""
        even = np.ones(self.mask.shape)
        measures = {"in_mask_ratio": attention_in_mask_ratio, "centroid_error": centroid_error}
        answer: dict[str, Any] = {"tokens_in_mask": int(self.mask.sum())}
        for name, measure in measures.items():
            known = self.mask.any()
            answer[name] = float(measure(blocks.mean(axis=0), self.mask)) if known else None
            answer[f"{name}_by_block"] = measure(blocks, self.mask).tolist() if known else None
            answer[f"uniform_{name}"] = float(measure(even, self.mask)) if known else None
        return answer

    def _deviation(self) -> dict[str, Any]:
        """Delta(I) and Delta(B) of every kind, or a note that says why there are none."""
        per_frame = self.mask.reshape(len(self.mask), -1)
        if not per_frame.any():
            return {"deviation": None, "note": "the interaction mask is empty"}
        if (per_frame.mean(axis=1) > 0.5).any():
            return {"deviation": None, "note": "the interaction mask covers more than half of a latent frame"}
        deviation = set_deviation(
            self.model,
            self.probes,
            torch.from_numpy(self.mask),
            kinds=self.config.kinds,
            draws=self.config.draws,
            seed=self.seed,
            dimensions=self.dimensions,
            steps=self.steps,
            batch=self.config.batch,
        )
        return {"deviation": {kind: asdict(both) for kind, both in deviation.items()}, "note": None}

    def states(self, layer: int) -> np.ndarray:
        """A layer's hidden states under the first noise, (T, H, W, D) float32."""
        return self.hidden[layer][0].float().cpu().numpy()

    @cached_property
    def features(self) -> np.ndarray | None:
        """The teacher's features of the reference frames, (T, h, w, P)."""
        return None if self.teacher is None else np.asarray(self.teacher(self.frames))

    @cached_property
    def targets(self) -> np.ndarray | None:
        """The same on the token grid, (T, H, W, P).                                                            Eq. 4"""
        if self.features is None:
            return None
        return interpolate_grid(torch.from_numpy(self.features), self.grid[1:]).numpy()

    def _layers(self) -> dict[str, Any]:
        """Likeness to the teacher and alignment, a number a layer in the order of `self.layers`."""
        if self.targets is None:
            return {"teacher_similarity_by_layer": None, "alignment_cosine_by_layer": None}
        teacher = self.targets.reshape(-1, self.targets.shape[-1])
        similar = [
            teacher_similarity(states.reshape(-1, states.shape[-1]), teacher)
            for states in map(self.states, self.layers)
        ]
        return {"teacher_similarity_by_layer": similar, "alignment_cosine_by_layer": self._alignment(self.targets)}

    def _alignment(self, targets: np.ndarray) -> list[float | None] | None:
        """The cosine of every layer that has a projector; None for the others."""
        if self.projectors is None:
            return None
        aligned = [int(layer) for layer in self.projectors]
        projected = self.projectors.project({layer: self.hidden[layer][:1] for layer in aligned})
        depths = projected[0].shape[-1] != targets.shape[-1]  # a teacher of several depths: each layer has its own
        own = np.split(targets, len(aligned), axis=-1) if depths else [targets] * len(aligned)
        found = {
            layer: mean_cosine(z[0].float().cpu().numpy(), target)
            for layer, z, target in zip(aligned, projected, own, strict=True)
        }
        return [found.get(layer) for layer in self.layers]

    @cached_property
    def imagined(self) -> np.ndarray | None:
        """The predicted video, (F, H, W, 3) uint8 at the model's size."""
        if not self.config.imagination_steps or self.sample.video is None:
            return None
        return self.policy.imagine(self.inputs, self.video_noise[:1], steps=self.config.imagination_steps)[0]

    @cached_property
    def recorded(self) -> np.ndarray:
        """The recorded video as the model would see it, (F, H, W, 3) uint8."""
        assert self.sample.video is not None
        seen = self.policy.seen(self.sample.video, self.sample.embodiment)
        return to_frames(to_video(seen, self.policy.frame_size))[0]

    def _imagination(self) -> dict[str, Any]:
        scores: dict[str, Any] = dict.fromkeys(("psnr", "ssim", "still_psnr", "still_ssim"))
        if self.imagined is None:
            return scores
        ours = compare_videos(self.imagined, self.recorded)
        still = compare_videos(nothing_moves(self.recorded), self.recorded)
        return {"psnr": ours.psnr, "ssim": ours.ssim, "still_psnr": still.psnr, "still_ssim": still.ssim}

    def _action_error(self, guidance: Sequence[Tensor]) -> float | None:
        """Root mean square over the chunk of predicted minus demonstrated actions, normalised; mean over the noises."""
        if self.sample.actions is None:
            return None
        wanted = torch.from_numpy(self.policy.normalize(self.sample.actions, self.sample.embodiment))
        chunk = self.model.act(guidance, self.state, self.embodiment, self.noise, steps=self.steps)
        length, width = min(len(wanted), chunk.shape[1]), wanted.shape[-1]
        error = chunk[:, :length, :width].float().cpu() - wanted[:length]
        return float(error.square().mean(dim=(1, 2)).sqrt().mean())

    # --- the gallery --------------------------------------------------------------------------------------------------

    def picture(self, arrays: dict[str, list[np.ndarray]], features: dict[str, list[np.ndarray]]) -> None:
        """Frames, masks, maps and attention in parts to `arrays`, what PCA will colour to `features`."""
        arrays["frames"].append(self.frames)
        arrays["frame_masks"].append(self.masks)
        for kind in self.config.map_kinds:
            arrays[f"sensitivity_{kind}"].append(self._map(kind))
        captured = capture_attention(
            self.model,
            self.model.guide({layer: states[:1] for layer, states in self.hidden.items()}),
            self.inputs.state,
            self.inputs.embodiment,
            self.noise[:1],
            steps=self.steps,
        )
        for name, part in vars(attention_parts(captured.weights, self.noise.shape[1])).items():
            arrays[f"attention_by_{name}"].append(part[0].unflatten(-1, self.grid).cpu().numpy().astype(np.float16))
        for layer in self.layers:
            features[f"pca_layer_{layer}"].append(self.states(layer))
        if self.features is not None:
            features["pca_teacher"].append(self.features)
        if self.imagined is not None:
            arrays["imagined"].append(self.imagined)
            arrays["recorded"].append(self.recorded)

    def _map(self, kind: Kind) -> np.ndarray:
        return sensitivity_map(
            self.model,
            self.probes[0],
            kind=kind,
            unit=self.config.map_unit,
            dimensions=self.dimensions,
            steps=self.steps,
            batch=self.config.batch,
            generator=torch.Generator().manual_seed(self.seed),
        ).numpy()

    def text_attention(self) -> tuple[list[str], np.ndarray]:
        """The instruction's words and where each is read, (layers, words, T, H, W) float16; a word's tokens together.

        Fig. 14.
        """
        words = [(word, tokens) for word, tokens in self.policy.text.words(self.sample.instruction) if tokens]
        read = self.model.text_attention(
            self.inputs.observation_latent, self.video_noise[:1], self.inputs.instruction, layers=self.layers
        )
        maps = [[read[layer][0][..., list(tokens)].sum(dim=-1) for _, tokens in words] for layer in self.layers]
        stacked = torch.stack([torch.stack(row) for row in maps])
        return [word for word, _ in words], stacked.float().cpu().numpy().astype(np.float16)


def measured_layers(policy: "WAMPolicy", config: DiagnosisConfig) -> tuple[int, ...]:
    """The video layers that are measured and pictured, sorted: the aligned ones always."""
    chosen = policy.model.bridged_layers if config.layers is None else config.layers
    return tuple(sorted({*chosen, *aligned_layers(policy)}))


def aligned_layers(policy: "WAMPolicy") -> tuple[int, ...]:
    """The video layers that the policy's recipe aligns."""
    return () if policy.config.alignment is None else policy.config.alignment.layers
