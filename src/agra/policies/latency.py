"""Latency of a response by stage, measured for several paths in turn: `agra bench-latency`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from agra import files
from agra.alignment.teacher import Teacher
from agra.config import RunConfig
from agra.data.normalization.normalize import NormStats
from agra.policies.instructions import Instructions
from agra.policies.load import load_policy
from agra.policies.policy import MethodPolicy
from agra.precision import local_device
from agra.types import PolicyRequest
from agra.wam.codec import Codec, CodecConfig, SDXLCodec, WanCodec
from agra.wam.patch_pca import PatchPCACodec

INSTRUCTION = "pick it up"
Stages = Mapping[str, float]
Call = Callable[[], Stages]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one path in seconds: an array by stage, with one number for each call."""

    calls: Mapping[str, np.ndarray]

    def milliseconds(self, stage: str, percentile: float) -> float:
        """Return a percentile of a stage's times, in ms."""
        return 1000 * float(np.percentile(self.calls[stage], percentile))


def measure(calls: Mapping[str, Call], *, rounds: int) -> dict[str, Latency]:
    """Call every path once in each of `rounds` rounds, in rotating order.

    Two calls of each come first and do not count.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    names = list(calls)
    timings: dict[str, list[Stages]] = {name: [] for name in names}
    for number in range(rounds + 2):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            stages = dict(calls[name]())
            if number >= 2:
                timings[name].append({**stages, "total": sum(stages.values())})
    return {
        name: Latency(calls={stage: np.array([row[stage] for row in rows]) for stage in rows[0]})
        for name, rows in timings.items()
    }


def paths(*, pool_future: int = 1, compiled: bool = False) -> dict[str, dict[str, Any]]:
    """List the compared paths with their options: plain, fast, and the fast path with the given options."""
    options: dict[str, dict[str, Any]] = {"plain": {"fast": False}, "fast": {}}
    if compiled:
        options["compiled"] = {"compiled": True}
    if pool_future != 1:
        options["pooled"] = {"pool_future": pool_future, "compiled": compiled}
    return options


def checkpoint_calls(
    path: str | Path, compared: Mapping[str, Mapping[str, Any]], *, device: str, batch: int
) -> dict[str, Call]:
    """Make the calls of a checkpoint's policy for `batch` robots together, by path."""
    return {name: timed(load_policy(path, device=device, **options), batch) for name, options in compared.items()}


def recipe_calls(
    config: RunConfig, compared: Mapping[str, Mapping[str, Any]], *, device: str, batch: int
) -> dict[str, Call]:
    """Make the calls of a recipe's policy with random weights, by path."""
    return {name: timed(random_policy(config, device=device, **options), batch) for name, options in compared.items()}


def random_policy(config: RunConfig, *, device: str = "cpu", seed: int = 0, **options: Any) -> MethodPolicy:
    """Make a policy of a recipe's shapes with random weights, also of its frozen networks, and one known instruction.

    It loads no file, so any recipe can be timed. `options` are those of `MethodPolicy`.
    """
    shapes, settings = config.method.shapes, config.method.codec
    torch.manual_seed(seed)
    with local_device(device):
        method = config.method.to_act().build()
        codec = None if settings is None else _random_codec(settings)
        encoder = config.method.teacher if config.method.needs_to_act().features else None
        teacher = None if encoder is None else Teacher.untrained(encoder)
    tokens = torch.randn(*shapes.instruction)

    def statistics(size: int) -> dict[str, np.ndarray]:
        low, high = -np.ones(size), np.ones(size)
        return {"mean": np.zeros(size), "std": high, "min": low, "max": high, "q01": low, "q99": high, "count": high}

    stats = NormStats(method="mean_std", state=statistics(shapes.state_dim), action=statistics(shapes.action_dim))
    return MethodPolicy(
        name=f"random-{config.method.kind}",
        config=config,
        method=method,
        codec=codec,
        instructions=Instructions(None, {INSTRUCTION: tokens}) if config.method.needs_to_act().instruction else None,
        stats={config.data.embodiments[0]: stats},
        teacher=teacher,
        device=device,
        **options,
    )


def _random_codec(config: CodecConfig) -> Codec:
    if config.kind == "patch_pca":
        return PatchPCACodec(config.channels)
    dtype = getattr(torch, config.dtype)
    return (
        SDXLCodec.untrained(dtype=dtype) if config.kind == "sdxl" else WanCodec.untrained(config.channels, dtype=dtype)
    )


def timed(policy: MethodPolicy, batch: int) -> Call:
    """Warm up a policy, and return a call that computes the chunks of `batch` robots and returns its stages' times."""
    policy.warm_up(batch)
    blank = policy.blank_observation()
    height, width = np.maximum(2 * np.array(policy.frame_size), blank.frame.shape[:2])  # large enough for a crop
    frames = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    requests = [
        PolicyRequest(observation=replace(blank, frame=frame), episode=policy.episode(index))
        for index, frame in enumerate(frames)
    ]
    return lambda: policy.act_batch(requests)[0].timings


def report(latencies: Mapping[str, Latency], *, title: str) -> dict[str, Any]:
    """Print the stages side by side. Returns the printed numbers: path, stage, (p50, p95) in ms."""
    table = Table(title=title)
    table.add_column("stage")
    for name in latencies:
        table.add_column(f"{name} p50", justify="right")
        table.add_column("p95", justify="right")
    table.add_column("ratio of p50", justify="right")
    first, *_, last = latencies.values()
    summary: dict[str, Any] = {name: {} for name in latencies}
    for stage in last.calls:
        cells = []
        for name, latency in latencies.items():
            summary[name][stage] = [round(latency.milliseconds(stage, p), 3) for p in (50, 95)]
            cells += [f"{value:.2f} ms" for value in summary[name][stage]]
        table.add_row(stage, *cells, f"{first.milliseconds(stage, 50) / max(last.milliseconds(stage, 50), 1e-6):.2f}x")
    Console(width=100).print(table)
    return summary


def bench(
    subject: str,
    config: RunConfig | None,
    compared: Mapping[str, Mapping[str, Any]],
    *,
    device: str,
    batch: int,
    rounds: int,
    output: Path | None,
) -> None:
    """Measure the `compared` paths of a checkpoint, or with `config` those of a recipe with random weights.

    Prints the stages side by side and writes them as JSON.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if config is None:
        calls = checkpoint_calls(subject, compared, device=device, batch=batch)
    else:
        calls = recipe_calls(config, compared, device=device, batch=batch)
    latencies = measure(calls, rounds=rounds)
    title = f"{subject}, {rounds} calls of {batch}, {device}, {torch.get_num_threads()} threads"
    summary = report(latencies, title=title)
    if output is not None:
        content = {"subject": subject, "batch": batch, "rounds": rounds, "ms": summary}
        files.write_text(output, json.dumps(content) + "\n")
