"""`agra diagnose` (3.2, 4.2.1, Table 1): every instrument on one policy, sample by sample, into one folder.

The random numbers of a sample (video noise, action noise, background sets) follow from its name and the seed alone.
They do not depend on the order or number of the samples, and two policies are diagnosed under the same noise.
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
from agra.diagnostics.instruments.hidden_states import held_out_mean, probed_positions
from agra.diagnostics.instruments.pca import pca_rgb
from agra.diagnostics.measurement import (
    DiagnosisConfig,
    SampleMeasurement,
    TeacherFeatures,
    applicable_instruments,
    measured_layers,
)
from agra.diagnostics.record import Diagnosis, summarise, write_diagnosis
from agra.diagnostics.samples.probe_sample import ProbeSample
from agra.methods.method import ReadsTokens
from agra.policies.policy import MethodPolicy

FEWEST_TRIALS = 8
"""Trials with a known object position that a linear probe needs."""


@torch.no_grad()
def diagnose(
    policy: MethodPolicy,
    samples: Sequence[ProbeSample],
    output: Path,
    *,
    teacher: TeacherFeatures | None = None,
    teacher_name: str = "",
    projectors: Projectors | None = None,
    checkpoint_sha256: str | None = None,
    seed: int = 0,
    config: DiagnosisConfig | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Measure `policy` on `samples` and write the folder `output` (see `agra.diagnostics.record`).

    `projectors` are those of the policy's alignment and belong to `teacher`. `checkpoint_sha256`, of the checkpoint's
    manifest, and the policy's kinds of noise go into the header. A sample whose mask is empty, or too large
    to be matched with background, keeps a row with nulls and a `note`, and is left out of the averages. Instruments
    that do not apply to the method are listed in the header as `not_applicable`, and their values are null. Raises
    ValueError without samples, for duplicate samples, and for a sample with other frames than the method's token grid.
    """
    config = config or DiagnosisConfig()
    if not samples:
        raise ValueError("diagnose: expected at least one sample, got none")
    if len({(s.trial, s.step) for s in samples}) != len(samples):
        raise ValueError("diagnose: two samples have the same trial and step; they name a sample, so remove one")
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
            measurement = SampleMeasurement(policy, sample, seed, config, teacher=teacher, projectors=projectors)
            rows.append(measurement.measure(arrays))
            if sample.position is not None:
                for layer in layers:
                    states[layer].append(measurement.states(layer).astype(np.float16))
            if index in shown:
                measurement.picture(arrays, features)
                if (text_attention := measurement.text_attention()) is not None:
                    words[str(len(words))] = text_attention
            bar.advance(task)

    stacked = {name: np.stack(parts) for name, parts in arrays.items() if _complete(name, parts, rows, gallery)}
    stacked |= {name: np.stack(pca_rgb(parts)) for name, parts in features.items()}
    stacked |= {f"text_attention_{place}": attention for place, (_, attention) in words.items()}
    grid = stacked["mask"].shape[1:] if "mask" in stacked else None
    _add_probe_errors(rows, samples, states, None if grid is None else grid[1:])
    header = {
        "policy": policy.name,
        "checkpoint_sha256": checkpoint_sha256,
        "action_noise": policy.action_noise,
        "video_noise": policy.video_noise,
        "seed": seed,
        "settings": asdict(config),
        "teacher": teacher_name if teacher is not None else None,
        "method": policy.config.method.kind,
        "not_applicable": [name for name, applies in applicable_instruments(policy.method).items() if not applies],
        "grid": None if grid is None else list(grid),
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
    """Whether every sample (for pictures, every sample of the gallery) has a part.

    Samples without a video have none.
    """
    return len(parts) == (len(rows) if name in ("attention", "mask") else len(gallery))


def _add_probe_errors(
    rows: list[dict[str, Any]],
    samples: Sequence[ProbeSample],
    states: dict[int, list[np.ndarray]],
    grid: tuple[int, ...] | None,
) -> None:
    """Add the distance in grid units between the object and a linear probe's prediction, by layer and held out by
    trial.

    `grid` is (H, W) of the tokens. The errors are None without one, and with too few trials to fit a probe.
    """
    for row in rows:
        row |= {"probe_error_by_layer": None, "blind_probe_error": None}
    located = [(row, s.trial, s.position) for row, s in enumerate(samples) if s.position is not None]
    trials = [trial for _, trial, _ in located]
    if grid is None or len(set(trials)) < FEWEST_TRIALS:
        return
    positions = np.stack([position for _, _, position in located]) * np.array(grid)
    predictions = [probed_positions(np.stack(parts), positions, trials) for parts in states.values()]
    predictions.append(held_out_mean(positions, trials))
    errors = [np.linalg.norm(predicted - positions, axis=1) for predicted in predictions]
    for place, (row, _, _) in enumerate(located):
        rows[row]["probe_error_by_layer"] = [float(error[place]) for error in errors[:-1]]
        rows[row]["blind_probe_error"] = float(errors[-1][place])
