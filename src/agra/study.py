"""Layer studies: the same training once for every layer that is aligned alone, or read alone.             Figs. 10, 11

Each variant is a run of its own folder; `study.json` lists them for the report. Interrupted, the same command goes on:
a finished stage, finished trials and a finished diagnosis are not repeated.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from agra.config import RunConfig
from agra.diagnostics.instrument import DiagnosisConfig
from agra.diagnostics.report_study import STUDY
from agra.evaluation.protocols import Protocol, regime_trials
from agra.evaluation.rollout import evaluate
from agra.policy import WAMPolicy
from agra.run import diagnose, train
from agra.simulators.registry import make
from agra.training import checkpoint

Over = Literal["alignment", "bridge"]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How the variants are compared once they are trained."""

    simulator: str | None = "tabletop"
    """None leaves evaluation and diagnosis out: the losses alone are compared."""
    limit: int | None = None
    """Trials of each regime, evenly spread; None plays all."""
    samples: int = 40
    """Samples of the diagnosis; 0 leaves it out."""


def variants(config: RunConfig, over: Over, layers: Sequence[int] | None = None) -> dict[str, RunConfig]:
    """Name to config of every variant, the one without the change first; by default all bridged layers.

    `alignment`: no layer, then each layer aligned alone (Fig. 10). `bridge`: the multi-layer bridge, then one whose
    blocks all read the same layer (Fig. 11). Raises ValueError where nothing is aligned in the config or stage.
    """
    chosen = sorted(set(config.model.bridge.layers if layers is None else layers))
    if over == "alignment":
        if config.alignment is None or not config.aligns:
            raise ValueError(
                "an alignment study needs a recipe and a stage that align; take `tiny` and the joint stage"
            )
        alignment = config.alignment
        return {"without": replace(config, alignment=None)} | {
            f"layer_{layer}": replace(config, alignment=replace(alignment, layers=(layer,))) for layer in chosen
        }
    blocks, model = config.model.action_dit.num_blocks, config.model
    return {"all_layers": config} | {
        f"layer_{layer}": replace(config, model=replace(model, bridge=replace(model.bridge, layers=(layer,) * blocks)))
        for layer in chosen
    }


def study(
    config: RunConfig,
    *,
    over: Over,
    output: Path,
    layers: Sequence[int] | None = None,
    init: str | Path | None = None,
    judgement: Judgement | None = None,
    device: str = "cpu",
) -> Path:
    """Train, evaluate and diagnose every variant into a folder under `output`; returns `output`/study.json.

    Every variant starts from `init`, a checkpoint of the adapt or the joint stage; projectors of layers that were not
    aligned there begin fresh.
    """
    judgement = judgement or Judgement()
    found = variants(config, over, layers)
    output.mkdir(parents=True, exist_ok=True)
    for name, variant in found.items():
        run = output / name
        if not train(variant, output=run, init=init, device=device):
            raise KeyboardInterrupt  # SIGTERM: the checkpoint is written
        if judgement.simulator is not None:
            _judge(run, name, judgement, judgement.simulator, device)
    rows = [{"name": name, "layers": _changed(variant, over)} for name, variant in found.items()]
    content = {"over": over, "steps": config.stage.steps, "stage": config.stage.name, "variants": rows}
    checkpoint.write_text(output / STUDY, json.dumps(content, indent=2) + "\n")
    return output / STUDY


def _changed(config: RunConfig, over: Over) -> list[int]:
    if over == "bridge":
        return sorted(set(config.model.bridge.layers))
    return [] if config.alignment is None else list(config.alignment.layers)


def _judge(run: Path, name: str, judgement: Judgement, simulator: str, device: str) -> None:
    world = make(simulator)
    try:
        evaluate(
            WAMPolicy.load(run, name=name, device=device),
            world,
            regime_trials(world, limit=judgement.limit),
            output=run / "results.jsonl",
            protocol=Protocol(),
            policy_name=name,
        )
    finally:
        world.close()
    if judgement.samples and not (run / "diagnosis" / "diagnosis.json").is_file():
        settings = DiagnosisConfig(gallery=0)
        diagnose(run, simulator=simulator, samples=judgement.samples, device=device, config=settings)
