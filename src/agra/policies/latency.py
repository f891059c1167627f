"""Latency of an answer by stage, for several paths in turn: `agra bench-latency`."""

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
from agra.config import RunConfig
from agra.data.normalization.normalize import NormStats
from agra.policies.instructions import Instructions
from agra.policies.load import load_policy
from agra.policies.policy import MethodPolicy
from agra.precision import local_device
from agra.types import PolicyRequest
from agra.wam.codec import Codec, CodecConfig, WanCodec
from agra.wam.patch_pca import PatchPCACodec

INSTRUCTION = "pick it up"
Stages = Mapping[str, float]
Call = Callable[[], Stages]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one way of answering, seconds: stage -> one number a call."""

    calls: Mapping[str, np.ndarray]

    def milliseconds(self, stage: str, percentile: float) -> float:
        """A percentile of a stage's times, in ms."""
        return 1000 * float(np.percentile(self.calls[stage], percentile))


def measure(ways: Mapping[str, Call], *, rounds: int) -> dict[str, Latency]:
    """Call every way once in each of `rounds` rounds, in changing order, after two calls each that do not count."""
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    names = list(ways)
    calls: dict[str, list[Stages]] = {name: [] for name in names}
    for number in range(rounds + 2):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            stages = dict(ways[name]())
            if number >= 2:
                calls[name].append({**stages, "total": sum(stages.values())})
    return {
        name: Latency(calls={stage: np.array([one[stage] for one in own]) for stage in own[0]})
        for name, own in calls.items()
    }


def paths(*, pool_future: int = 1, compiled: bool = False) -> dict[str, dict[str, Any]]:
    """What is compared, each by its options: the plain path, the fast one, and the fast one with what is asked for."""
    ways: dict[str, dict[str, Any]] = {"plain": {"fast": False}, "fast": {}}
    if compiled:
        ways["compiled"] = {"compiled": True}
    if pool_future != 1:
        ways["pooled"] = {"pool_future": pool_future, "compiled": compiled}
    return ways


def checkpoint_calls(
    path: str | Path, ways: Mapping[str, Mapping[str, Any]], *, device: str, batch: int
) -> dict[str, Call]:
    """A checkpoint's answers to `batch` robots at once, by each path."""
    return {name: timed(load_policy(path, device=device, **options), batch) for name, options in ways.items()}


def recipe_calls(
    config: RunConfig, ways: Mapping[str, Mapping[str, Any]], *, device: str, batch: int
) -> dict[str, Call]:
    """The answers of a recipe's policy with random weights, by each path."""
    return {name: timed(random_policy(config, device=device, **options), batch) for name, options in ways.items()}


def random_policy(config: RunConfig, *, device: str = "cpu", seed: int = 0, **options: Any) -> MethodPolicy:
    """A policy of a recipe's shapes with random weights, its codec included, and one known instruction.

    It loads no file, so any recipe can be timed. `options` are those of `MethodPolicy`.
    """
    shapes, settings = config.method.shapes, config.method.codec
    torch.manual_seed(seed)
    with local_device(device):
        method = config.method.to_act().build()
        codec = None if settings is None else _random_codec(settings)
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
        device=device,
        **options,
    )


def _random_codec(config: CodecConfig) -> Codec:
    if config.kind == "patch_pca":
        return PatchPCACodec(config.channels)
    return WanCodec.untrained(config.channels, dtype=getattr(torch, config.dtype))


def timed(policy: MethodPolicy, batch: int) -> Call:
    """A call that answers `batch` robots at once and returns its stages' times. The policy is warmed up first."""
    policy.warm_up(batch)
    blank = policy.blank_observation()
    height, width = policy.frame_size
    frames = np.random.default_rng(0).integers(0, 256, (batch, 2 * height, 2 * width, 3), dtype=np.uint8)
    requests = [
        PolicyRequest(observation=replace(blank, frame=frame), episode=policy.episode(index))
        for index, frame in enumerate(frames)
    ]
    return lambda: policy.act_batch(requests)[0].timings


def report(found: Mapping[str, Latency], *, title: str) -> dict[str, Any]:
    """Print the stages side by side; the same as a map for machines."""
    table = Table(title=title)
    table.add_column("stage")
    for name in found:
        table.add_column(f"{name} p50", justify="right")
        table.add_column("p95", justify="right")
    table.add_column("ratio of p50", justify="right")
    first, *_, last = found.values()
    summary: dict[str, Any] = {name: {} for name in found}
    for stage in last.calls:
        cells = []
        for name, one in found.items():
            summary[name][stage] = [round(one.milliseconds(stage, p), 3) for p in (50, 95)]
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
    """Measure the `compared` paths of a checkpoint, or of a recipe with random weights where `config` is given.

    Prints the stages side by side and writes them as JSON.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if config is None:
        ways = checkpoint_calls(subject, compared, device=device, batch=batch)
    else:
        ways = recipe_calls(config, compared, device=device, batch=batch)
    found = measure(ways, rounds=rounds)
    title = f"{subject}, {rounds} calls of {batch}, {device}, {torch.get_num_threads()} threads"
    summary = report(found, title=title)
    if output is not None:
        content = {"subject": subject, "batch": batch, "rounds": rounds, "ms": summary}
        files.write_text(output, json.dumps(content) + "\n")
