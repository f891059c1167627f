"""How long each stage of an answer takes, the plain path and the fast one in turn: `agra bench-latency`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from agra.config import RunConfig
from agra.policy import Stopwatch, WAMPolicy
from agra.training import checkpoint
from agra.types import Observation, PolicyRequest
from agra.wam.fast import FastWAM
from agra.wam.model import WAM

Stages = Mapping[str, float]
Way = Callable[[], Stages]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one way of answering, seconds: stage -> one number a call."""

    calls: Mapping[str, np.ndarray]

    def milliseconds(self, stage: str, percentile: float) -> float:
        """A percentile of a stage's times, in ms."""
        return 1000 * float(np.percentile(self.calls[stage], percentile))


def measure(ways: Mapping[str, Way], *, rounds: int) -> dict[str, Latency]:
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


def of_checkpoint(
    path: str | Path, ways: Mapping[str, Mapping[str, Any]], *, device: str, batch: int
) -> dict[str, Way]:
    """A checkpoint's answers to `batch` robots at once, each way."""
    return {name: _answering(WAMPolicy.load(path, device=device, **options), batch) for name, options in ways.items()}


def _answering(policy: WAMPolicy, batch: int) -> Way:
    embodiment, robot = next(iter(policy.spec.embodiments.items()))
    height, width = policy.spec.frame_size
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (batch, 2 * height, 2 * width, 3), dtype=np.uint8)
    state = np.asarray(policy.stats[embodiment].state["mean"], np.float32)
    assert state.shape == (robot.state_dim,)
    requests = [
        PolicyRequest(
            observation=Observation(frame=frame, state=state, instruction="pick it up", embodiment=embodiment),
            episode=policy.episode(index),
        )
        for index, frame in enumerate(frames)
    ]
    return lambda: policy.act_batch(requests)[0].timings


def of_recipe(
    config: RunConfig,
    ways: Mapping[str, Mapping[str, Any]],
    *,
    device: str,
    batch: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Way]:
    """A recipe's model with random weights: the stages after codec and text, which need their own weights."""
    place, settings = torch.device(device), config.model
    with place:
        torch.manual_seed(0)
        model = WAM(settings).to(dtype).eval().requires_grad_(False)
        width = settings.video_dit.text_dim
        tokens = torch.randn(settings.text.length, width, dtype=dtype)
        latents = torch.randn(batch, *settings.latent_shape, dtype=dtype)
        head = settings.action_dit
        state = torch.randn(batch, head.state_dim, dtype=dtype)
        noise = torch.randn(batch, head.horizon, head.action_dim, dtype=dtype)
        embodiment = torch.zeros(batch, dtype=torch.long)

    def answering(options: Mapping[str, Any]) -> Way:
        if options.get("fast", True):
            path = FastWAM(model, **options)
            begin, condition = path.begin, partial(path.condition, instructions=[path.instruction(tokens)] * batch)
        else:
            path = model
            begin, condition = None, partial(path.condition, instruction=tokens.expand(batch, -1, -1))

        @torch.no_grad()
        def answer() -> Stages:
            watch = Stopwatch(place)
            if begin is not None:
                begin()
            hidden = condition(latents[:, :, :1], latents)
            watch.lap("video")
            guidance = path.guide(hidden)
            watch.lap("bridge")
            path.act(guidance, state, embodiment, noise)
            watch.lap("action")
            return watch.laps

        return answer

    return {name: answering(options) for name, options in ways.items()}


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
        ways = of_checkpoint(subject, compared, device=device, batch=batch)
    else:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        ways = of_recipe(config, compared, device=device, batch=batch, dtype=dtype)
    found = measure(ways, rounds=rounds)
    title = f"{subject}, {rounds} calls of {batch}, {device}, {torch.get_num_threads()} threads"
    summary = report(found, title=title)
    if output is not None:
        content = {"subject": subject, "batch": batch, "rounds": rounds, "ms": summary}
        checkpoint.write_text(output, json.dumps(content) + "\n")
