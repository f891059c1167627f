"""`agra diagnose`: every instrument on one policy, sample by sample, into one folder (3.2, 4.2.1; Table 1).

The random numbers of a sample (video noise, action noise, background sets) follow from its name and the seed alone. Neither
the order of the samples nor their number matters, and two policies are diagnosed under the same noise.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agra.alignment.loss import Projectors
from agra.diagnostics.instruments.features import held_out_mean, probed_positions
from agra.diagnostics.instruments.sample import DiagnosisConfig, Instrument, Teacher, measured_layers
from agra.diagnostics.instruments.pca import pca_rgb
from agra.diagnostics.samples.probe_sample import ProbeSample
from agra.diagnostics.record import Diagnosis, summarise, write_diagnosis
from agra.methods.method import ReadsTokens
from agra.policies.policy import MethodPolicy

FEWEST_TRIALS = 8
"""Trials that a linear probe needs."""


@torch.no_grad()
def diagnose(
    policy: MethodPolicy,
    samples: Sequence[ProbeSample],
    output: Path,
    *,
    teacher: Teacher | None = None,
    teacher_name: str = "",
    projectors: Projectors | None = None,
    seed: int = 0,
    config: DiagnosisConfig | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Measure `policy` on `samples` and write the folder `output` (see `agra.diagnostics.record`).

    `projectors` are those of the policy's alignment and belong to `teacher`. Samples whose mask is empty, or too large to
    be matched with background, keep a row with nulls and a `note`, and stay out of the averages. `ValueError` if there
    are no samples or a sample has not the model's latent frames.
    """
    config = config or DiagnosisConfig()
    if not samples:
        raise ValueError("diagnose: no samples")
    if len({(s.trial, s.step) for s in samples}) != len(samples):
        raise ValueError("diagnose: two samples have the same trial and step")
    gallery = np.unique(np.linspace(0, len(samples) - 1, min(config.gallery, len(samples))).round().astype(int))
    layers = measured_layers(policy, config)
    shown = {int(i) for i in gallery}
    rows: list[dict[str, Any]] = []
    arrays: dict[str, list[np.ndarray]] = defaultdict(list)
    features: dict[str, list[np.ndarray]] = defaultdict(list)
    states: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    words: dict[str, tuple[list[str], np.ndarray]] = {}

    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bar if progress else nullcontext():
        task = bar.add_task(f"Diagnosing {policy.name}", total=len(samples))
        for index, sample in enumerate(samples):
            instrument = Instrument(policy, sample, seed, config, teacher=teacher, projectors=projectors)
            rows.append(instrument.measure(arrays))
            if sample.position is not None:
                for layer in layers:
                    states[layer].append(instrument.states(layer).astype(np.float16))
            if index in shown:
                instrument.picture(arrays, features)
                if (text_attention := instrument.text_attention()) is not None:
                    words[str(len(words))] = text_attention
            bar.advance(task)

    stacked = {name: np.stack(parts) for name, parts in arrays.items() if _complete(name, parts, rows, gallery)}
    stacked |= {name: np.stack(pca_rgb(parts)) for name, parts in features.items()}
    stacked |= {f"text_attention_{place}": attention for place, (_, attention) in words.items()}
    _add_probe_errors(rows, samples, states, stacked["mask"].shape[2:])
    header = {
        "policy": policy.name,
        "seed": seed,
        "settings": asdict(config),
        "teacher": teacher_name if teacher is not None else None,
        "grid": list(stacked["mask"].shape[1:]),
        "bridged_layers": list(policy.method.read_layers) if isinstance(policy.method, ReadsTokens) else [],
        "aligned_layers": list(policy.config.method.aligned_layers),
        "layers": list(layers),
        "gallery": gallery.tolist(),
        "words": [texts for texts, _ in words.values()],
        "summary": summarise(rows, config.kinds, seed=seed),
    }
    diagnosis = Diagnosis(header=header, rows=rows, arrays=stacked)
    write_diagnosis(diagnosis, output)
    return diagnosis


def _complete(name: str, parts: list[np.ndarray], rows: list[dict[str, Any]], gallery: np.ndarray) -> bool:
    """Whether every sample, or every one of the gallery, gave its part: some may have come without a video."""
    return len(parts) == (len(rows) if name in ("attention", "mask") else len(gallery))


def _add_probe_errors(
    rows: list[dict[str, Any]],
    samples: Sequence[ProbeSample],
    states: dict[int, list[np.ndarray]],
    grid: tuple[int, int],
) -> None:
    """The distance in grid units between the object and where a linear probe of each layer sees it, held out by trial."""
    seen = {row: sample.position for row, sample in enumerate(samples) if sample.position is not None}
    known = [*seen]
    trials = [samples[row].trial for row in known]
    for row in rows:
        row |= {"probe_error_by_layer": None, "blind_probe_error": None}
    if len(set(trials)) < FEWEST_TRIALS:
        return
    positions = np.stack([*seen.values()]) * np.array(grid)
    read = [probed_positions(np.stack(parts), positions, trials) for parts in states.values()]
    errors = [np.linalg.norm(found - positions, axis=1) for found in (*read, held_out_mean(positions, trials))]
    for place, row in enumerate(known):
        rows[row]["probe_error_by_layer"] = [float(error[place]) for error in errors[:-1]]
        rows[row]["blind_probe_error"] = float(errors[-1][place])
