"""A config or a run's folder in, files out: what the commands do, for use from Python as well."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from agra import prepare as frozen
from agra.alignment.teacher import load_teacher, reference_frames
from agra.config import RunConfig
from agra.data.mixture import WindowSampler
from agra.data.normalize import NormStats
from agra.data.prefetch import Prefetched
from agra.data.sources import embodiment_stats
from agra.diagnostics.diagnosis import diagnose as examine
from agra.diagnostics.looking import FirstLook, look
from agra.diagnostics.looking_monitor import LookingMonitor
from agra.diagnostics.probe import ProbeSample, samples_from_episode
from agra.diagnostics.report import PolicyEntry, build_report
from agra.diagnostics.report_looking import LOOKING
from agra.draws import seed_everything
from agra.evaluation.protocols import regime_trials
from agra.evaluation.rollout import run_episode
from agra.planner import flops_per_sample, peak_flops
from agra.policy import WAMPolicy
from agra.prepare import Preparation, codec_file, window_references
from agra.simulators.registry import expert, make
from agra.training import checkpoint
from agra.training.logbook import Meter
from agra.training.loop import Trainer
from agra.training.objective import Objective
from agra.training.sharding import ParallelConfig, World, build, check_shares, joined
from agra.training.start import initialize
from agra.types import REGIMES, Simulator
from agra.wam.groot import GR1_ROW, load_groot_head
from agra.wam.model import WAM

_LATEST_MOMENT = 0.45
"""Share of an expert episode up to which policies are examined: from the first look to about the grasp."""
_LOOKED_AT = ("in_distribution", "semantic")
"""Regimes whose first observations tell whether a policy looks: the same task, things at many places, two candidates."""
_GOLDEN = 0.6180339887498949


def preparation(config: RunConfig, *, device: str = "cpu") -> Preparation:
    """The frozen features that the config's stage needs, still to be estimated or computed."""
    return Preparation(config, config.data.open(), device=device)


def prepare(config: RunConfig, *, device: str = "cpu") -> list[Path]:
    """Compute and cache the frozen features that the config's stage needs; returns their folders."""
    return preparation(config, device=device).run()


def train(
    config: RunConfig,
    *,
    output: Path,
    init: str | Path | None = None,
    head: str | None = None,
    head_rows: Sequence[int] = (GR1_ROW,),
    device: str = "cpu",
    parallel: ParallelConfig | None = None,
) -> bool:
    """Train one stage into `output`, resuming a run found there. False if SIGTERM stopped it early.

    A fresh run starts from `init` (see `initialize`) and from the GR00T-N1.5 action head in `head`, if they are given.
    Under torchrun every process calls this with the same arguments. Raises ValueError where the batch does not divide.
    """
    parallel = parallel or ParallelConfig()
    with joined(parallel, device) as world:
        check_shares(config.stage, parallel, world.size)

        def start(objective: Objective) -> None:
            if init is not None:
                initialize(objective, init, config.stage.name)
            if head is not None:
                load_groot_head(objective.wam.bridge, objective.wam.action_dit, head, rows=head_rows)

        fresh = checkpoint.newest(output) is None
        if fresh and world.leads:
            output.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(_origin(output), json.dumps({"init": _relative(init, output)}) + "\n")
        return _train(config, output, start if fresh else None, parallel, world)


def _train(
    config: RunConfig,
    output: Path,
    start: Callable[[Objective], None] | None,
    parallel: ParallelConfig,
    world: World,
) -> bool:
    sources = config.data.open()
    opened = frozen.open_features(config, sources)
    stats = embodiment_stats(sources)
    online = frozen.OnlineEncoder.open(config, sources, device=world.device)
    sampler = WindowSampler(
        config.data,
        sources,
        opened,
        stats,
        horizon=config.model.action_dit.horizon,
        num_frames=config.model.num_frames,
        references=reference_frames(config.model.latent_shape[1]),
        batch_size=config.stage.batch_size,
        seed=config.stage.seed,
        max_state_dim=config.model.action_dit.state_dim,
        max_action_dim=config.model.action_dit.action_dim,
        encode=online,
        rank=world.rank,
        world_size=world.size,
    )

    def make() -> Objective:
        seed_everything(config.stage.seed, 2**31 + 1)
        width = opened[0]["targets"].shape[-1] if "targets" in opened[0] else online and online.teacher_width
        alignment = config.alignment if config.aligns else None
        return Objective(WAM(config.model), config.stage.objective, alignment, width)

    peak = peak_flops(world.device)
    flops = None if peak is None else flops_per_sample(config)
    extra = {"norm_stats.json": lambda path: NormStats.save_all(stats, path)}
    if config.model.codec.kind == "patch_pca":
        fitted = codec_file(config, sources)
        extra["codec.safetensors"] = lambda path: path.write_bytes(fitted.read_bytes())
    with Prefetched(sampler.batch, workers=1 if online is None else 2) as batches:
        trainer = Trainer(
            config,
            build(make, config.stage, parallel, world, start),
            batch=batches,
            validation=sampler.validation_batch if sampler.validation else None,
            output=output,
            extra_files=extra,
            monitors=_monitors(config, sampler, stats),
            samples=lambda step: [
                f"{sources[source].dataset.path}, episode {episode} from step {first}"
                for source, episode, first in sampler.windows(step)[world.rank :: world.size]
            ],
            world=world,
            parallel=parallel,
            meter=Meter(device=world.device, flops_per_sample=flops, peak_flops=peak),
        )
        return trainer.run()


def _monitors(config: RunConfig, sampler: WindowSampler, stats: Mapping[str, NormStats]) -> dict[str, LookingMonitor]:
    """What is measured beside the losses, on the first dataset, in the stages that train the action head."""
    if config.looking is None or config.stage.objective.action_weight == 0 or not sampler.validation:
        return {}
    source = sampler.sources[0]
    own_stats = stats[source.dataset.embodiment]
    dimensions, step = config.looking.select(source.dataset.action_names), config.looking.step

    def targets(actions: Tensor) -> np.ndarray:
        own = own_stats.unnormalize("action", actions[..., : own_stats.width("action")].float().cpu().numpy())
        return own[:, min(step, own.shape[1] - 1), dimensions]

    instructions = [source.dataset.instruction(episode) for episode in source.validation]
    return {"looking": LookingMonitor(sampler.first_batch(), instructions, targets, seed=config.stage.seed)}


def probe_samples(simulator: Simulator, count: int, references: Sequence[int]) -> list[ProbeSample]:
    """Moments of the scripted expert's episodes on evaluation trials, evenly spread over regimes and over
    the first part of an episode.

    `references` are the control steps from the observation to each latent frame's reference frame.
    """
    acting = expert(simulator)
    found: list[ProbeSample] = []
    for trial in regime_trials(simulator, limit=-(-count // len(REGIMES))):
        episode = run_episode(acting, simulator, trial, execute_steps=1, masks=True)
        step = int(_LATEST_MOMENT * (len(found) * _GOLDEN % 1) * len(episode))
        found += samples_from_episode(episode, [step], references, trial=trial.name, regime=trial.regime)
    return found


def first_looks(simulator: Simulator, regimes: Sequence[str], steps: int) -> list[FirstLook]:
    """What every trial of `regimes` shows first, and the scripted expert's first `steps` actions; a regime is a group."""
    acting = expert(simulator)
    return [
        FirstLook.of(
            run_episode(acting, simulator, trial, execute_steps=1, max_steps=steps),
            trial=trial.name,
            group=trial.regime,
        )
        for trial in regime_trials(simulator, regimes)
    ]


def diagnose(run: Path, *, simulator: str, samples: int, seed: int = 0, device: str = "cpu") -> Path:
    """Examine a run's newest checkpoint and write its folder `diagnosis`."""
    policy = WAMPolicy.load(run, device=device)
    teacher = name = None
    if policy.config.alignment is not None:
        settings = policy.config.alignment.teacher
        network = load_teacher(settings).to(device)
        teacher, name = (lambda frames: network(frames).cpu().numpy()), settings.kind
    output = checkpoint.resolve(run).parent / "diagnosis"
    world, target = make(simulator), policy.config.looking
    try:
        probes = probe_samples(world, samples, window_references(policy.config))
        looks = [] if target is None else first_looks(world, _LOOKED_AT, target.step + 1)
    finally:
        world.close()
    examine(policy, probes, output, teacher=teacher, teacher_name=name or "", seed=seed)
    if target is not None:
        look(policy, looks, world.embodiment.action_names, target, seed=seed).save(output / LOOKING)
    return output


def report(runs: Sequence[Path], *, output: Path) -> Path:
    """Lay runs side by side in one HTML page; each gives what its folder, and those it started from, hold."""
    return build_report([_entry(run) for run in runs], output)


def _origin(run: Path) -> Path:
    """The file that says what a run started from."""
    return run / "origin.json"


def _relative(init: str | Path | None, output: Path) -> str | None:
    """`init` as seen from the run's folder, so that both may be moved together; a hub id stays as it is."""
    if init is None or not Path(init).is_dir():
        return None if init is None else str(init)
    return os.path.relpath(init, output)


def _lineage(run: Path) -> list[Path]:
    """The run's folder and, before it, those that it started from, as far as they are still there."""
    found = [run]
    while _origin(found[0]).is_file():
        init = json.loads(_origin(found[0]).read_text())["init"]
        earlier = None if init is None else found[0] / init
        if earlier is None or not earlier.is_dir():
            break
        found.insert(0, earlier if checkpoint.newest(earlier) else earlier.parent)
    return found


def _entry(run: Path) -> PolicyEntry:
    newest = checkpoint.resolve(run)
    lineage = _lineage(newest.parent)
    configs = [checkpoint.read_config(checkpoint.resolve(path)) for path in lineage]
    logs = {c.stage.name: path / "metrics.jsonl" for c, path in zip(configs, lineage, strict=True)}
    results, diagnosis = newest.parent / "results.jsonl", newest.parent / "diagnosis"
    return PolicyEntry(
        name=run.name,
        description=_describe(configs),
        training_logs={stage: path for stage, path in logs.items() if path.is_file()},
        results=results if results.is_file() else None,
        diagnosis=diagnosis if diagnosis.is_dir() else None,
        config=newest / "config.json",
    )


def _describe(lineage: Sequence[RunConfig]) -> str:
    """One sentence about the stages that made a policy."""
    stages = ", ".join(f"{config.stage.name} {config.stage.steps:,} steps" for config in lineage)
    for config in lineage:
        if config.aligns:
            assert config.alignment is not None
            layers, objective = ", ".join(map(str, config.alignment.layers)), config.stage.objective
            teacher = config.alignment.teacher.kind.replace("_", " ")
            return (
                f"World action model with AGRA: video layer {layers} aligned with {teacher} on the "
                f"{objective.aligned_pass} pass, weight {objective.alignment_weight:g}. Stages: {stages}"
            )
    return f"World action model without alignment. Stages: {stages}"
