"""A config or a run's folder in, files out: what the commands do, for use from Python as well."""

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
from agra.footprint import flops_per_sample
from agra.planner import peak_flops
from agra.policy import WAMPolicy
from agra.prepare import Preparation, codec_file, window_references
from agra.simulators.registry import expert, make
from agra.training import checkpoint, lineage
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
_FOUND_OUT = ("results.jsonl", "diagnosis")


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
            lineage.note(output, init)
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


def diagnose(run: str | Path, *, simulator: str, samples: int, seed: int = 0, device: str = "cpu") -> Path:
    """Examine a policy, a run's newest checkpoint say, and write the folder `diagnosis` in its home."""
    policy = WAMPolicy.load(run, device=device)
    teacher = name = None
    if policy.config.alignment is not None:
        settings = policy.config.alignment.teacher
        network = load_teacher(settings).to(device)
        teacher, name = (lambda frames: network(frames).cpu().numpy()), settings.kind
    output = checkpoint.home(run) / "diagnosis"
    output.parent.mkdir(parents=True, exist_ok=True)
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


def report(policies: Sequence[str | Path], *, output: Path) -> Path:
    """Lay policies side by side in one HTML page; each gives what its folder, and those it started from, hold."""
    return build_report([_entry(policy) for policy in policies], output)


def _entry(policy: str | Path) -> PolicyEntry:
    found, own = checkpoint.resolve(policy), checkpoint.home(policy)
    stages = lineage.lineage(policy)
    results, diagnosis = (next((f / name for f in (own, found) if (f / name).exists()), None) for name in _FOUND_OUT)
    return PolicyEntry(
        name=own.name,
        description=lineage.describe(stages),
        training_logs={stage.config.stage.name: stage.metrics for stage in stages if stage.metrics is not None},
        results=results,
        diagnosis=diagnosis,
        config=found / "config.json",
    )
