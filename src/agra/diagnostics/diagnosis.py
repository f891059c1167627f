"""`agra diagnose`: every instrument on one policy, sample by sample, into one folder.              3.2, 4.2.1; Table 1

The random numbers of a sample (video noise, action noise, background sets) follow from its name and the seed alone:
neither the order of the samples nor their number matters, and two policies are examined under the same noise.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from agra.diagnostics.attention import action_attention
from agra.diagnostics.intervention import KINDS, Kind, Probe, Unit, sensitivity_map, set_deviation
from agra.diagnostics.metrics import attention_in_mask_ratio, centroid_error, mask_to_grid
from agra.diagnostics.pca import pca_rgb
from agra.diagnostics.probe import ProbeSample
from agra.diagnostics.record import Diagnosis, summarise, write_diagnosis

if TYPE_CHECKING:
    from agra.policy import WAMPolicy

Teacher = Callable[[np.ndarray], np.ndarray]
"""(N, H, W, 3) uint8 frames to (N, h, w, P) patch features."""


@dataclass(frozen=True, kw_only=True)
class DiagnosisConfig:
    """What is measured and how finely."""

    kinds: tuple[Kind, ...] = KINDS
    """Interventions on the interaction mask and its background sets."""
    draws: int = 8
    """Background sets for each sample."""
    map_kinds: tuple[Kind, ...] = ("mean", "zero")
    """Interventions of the sensitivity maps; each map needs one prediction per cell."""
    map_unit: Unit = "column"
    """`column` replaces a position in all latent frames at once, `token` each token by itself (T times the cost)."""
    gallery: int = 6
    """Samples, spread over the list, that get maps and pictures."""
    pca_layers: tuple[int, ...] | None = None
    """Video layers to picture; None takes the bridged and the aligned ones."""
    mask_threshold: float = 0.25
    """Share of a token's pixels that the mask must cover."""
    steps: int | None = None
    """Euler steps of the action head; None takes the policy's own."""
    batch: int = 16

    def __post_init__(self) -> None:
        unknown = sorted({*self.kinds, *self.map_kinds} - set(KINDS))
        if unknown:
            raise ValueError(f"DiagnosisConfig: unknown interventions {unknown}, expected {KINDS}")
        for name in ("draws", "steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DiagnosisConfig.{name}: expected at least 1, got {value}")
        if self.gallery < 0:
            raise ValueError(f"DiagnosisConfig.gallery: expected at least 0, got {self.gallery}")


@torch.no_grad()
def diagnose(
    policy: "WAMPolicy",
    samples: Sequence[ProbeSample],
    output: Path,
    *,
    teacher: Teacher | None = None,
    teacher_name: str = "",
    seed: int = 0,
    config: DiagnosisConfig | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Measure `policy` on `samples` and write the folder `output` (see `agra.diagnostics.record`).

    Samples whose mask is empty, or too large to be matched with background, keep a row with nulls and a `note`, and
    stay out of the averages. `ValueError` if there are no samples or a sample has not the model's latent frames.
    """
    config = config or DiagnosisConfig()
    if not samples:
        raise ValueError("diagnose: no samples")
    if len({(s.trial, s.step) for s in samples}) != len(samples):
        raise ValueError("diagnose: two samples have the same trial and step")
    gallery = np.unique(np.linspace(0, len(samples) - 1, min(config.gallery, len(samples))).round().astype(int))
    shown = {int(i) for i in gallery}
    rows: list[dict[str, Any]] = []
    arrays: dict[str, list[np.ndarray]] = defaultdict(list)
    features: dict[str, list[np.ndarray]] = defaultdict(list)

    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bar if progress else nullcontext():
        task = bar.add_task(f"Diagnosing {policy.name}", total=len(samples))
        for index, sample in enumerate(samples):
            instrument = _Instrument(policy, sample, seed, config, pictured=index in shown)
            rows.append(instrument.row(arrays))
            if index in shown:
                instrument.picture(arrays, features)
            bar.advance(task)
    if teacher is not None:
        features["pca_teacher"] = [np.asarray(teacher(samples[i].frames)) for i in gallery]

    stacked = {name: np.stack(parts) for name, parts in arrays.items()}
    stacked |= {name: np.stack(pca_rgb(parts)) for name, parts in features.items()}
    header = {
        "policy": policy.name,
        "seed": seed,
        "settings": asdict(config),
        "teacher": teacher_name if teacher is not None else None,
        "grid": list(stacked["mask"].shape[1:]),
        "bridged_layers": list(policy.model.bridged_layers),
        "aligned_layers": list(_aligned_layers(policy)),
        "gallery": gallery.tolist(),
        "summary": summarise(rows, config.kinds, seed=seed),
    }
    diagnosis = Diagnosis(header=header, rows=rows, arrays=stacked)
    write_diagnosis(diagnosis, output)
    return diagnosis


def _aligned_layers(policy: "WAMPolicy") -> tuple[int, ...]:
    return () if policy.config.alignment is None else policy.config.alignment.layers


class _Instrument:
    """One sample under every instrument; the conditioning pass runs once, when it is made."""

    def __init__(
        self, policy: "WAMPolicy", sample: ProbeSample, seed: int, config: DiagnosisConfig, *, pictured: bool
    ) -> None:
        self.model, self.sample, self.config = policy.model, sample, config
        self.steps = policy.action_steps if config.steps is None else config.steps
        self.seed = zlib.crc32(f"{seed}/{sample.trial}/{sample.step}".encode())
        inputs = policy.prepare([sample.observation])
        self.state, self.embodiment = inputs.state, inputs.embodiment
        self.noise = policy.action_noise(1, self.seed)
        read = {*self.model.bridged_layers, *_aligned_layers(policy)}
        self.pca_layers = tuple(sorted(read if config.pca_layers is None else set(config.pca_layers)))
        self.hidden: dict[int, Tensor] = self.model.condition(
            inputs.observation_latent,
            policy.video_noise(1, self.seed),
            inputs.instruction,
            layers=self.pca_layers if pictured else (),
        )
        self.probe = Probe(
            hidden={layer: states[0] for layer, states in self.hidden.items()},
            state=self.state[0],
            embodiment=self.embodiment[0],
            noise=self.noise[0],
        )
        self.dimensions = range(policy.unnormalize(self.noise, sample.embodiment).shape[-1])  # without padding
        frames, rows, columns = self.probe.grid
        if len(sample.masks) != frames:
            raise ValueError(
                f"sample {sample.trial} step {sample.step}: {len(sample.masks)} reference frames, but the model has"
                f" {frames} latent frames"
            )
        self.mask = mask_to_grid(sample.masks, (rows, columns), threshold=config.mask_threshold)

    def row(self, arrays: dict[str, list[np.ndarray]]) -> dict[str, Any]:
        """The sample's line of metrics.jsonl; its attention and mask go to `arrays`."""
        grid = self.probe.grid
        guidance = self.model.guide(self.hidden)
        attention = action_attention(
            self.model, guidance, self.state, self.embodiment, self.noise, grid, steps=self.steps
        )[0]
        blocks = attention.cpu().numpy()
        arrays["attention"].append(blocks.astype(np.float32))
        arrays["mask"].append(self.mask)
        names = ("trial", "step", "regime", "instruction", "embodiment")
        return {name: getattr(self.sample, name) for name in names} | self._grounding(blocks) | self._deviation()

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
            self.probe,
            torch.from_numpy(self.mask),
            kinds=self.config.kinds,
            draws=self.config.draws,
            seed=self.seed,
            dimensions=self.dimensions,
            steps=self.steps,
            batch=self.config.batch,
        )
        return {"deviation": {kind: asdict(both) for kind, both in deviation.items()}, "note": None}

    def picture(self, arrays: dict[str, list[np.ndarray]], features: dict[str, list[np.ndarray]]) -> None:
        """Frames, masks and sensitivity maps to `arrays`, hidden states to `features`."""
        arrays["frames"].append(self.sample.frames)
        arrays["frame_masks"].append(self.sample.masks)
        for kind in self.config.map_kinds:
            generator = torch.Generator().manual_seed(self.seed)
            heat = sensitivity_map(
                self.model,
                self.probe,
                kind=kind,
                unit=self.config.map_unit,
                dimensions=self.dimensions,
                steps=self.steps,
                batch=self.config.batch,
                generator=generator,
            )
            arrays[f"sensitivity_{kind}"].append(heat.numpy())
        for layer in self.pca_layers:
            features[f"pca_layer_{layer}"].append(self.probe.hidden[layer].float().cpu().numpy())
