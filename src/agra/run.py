"""A config or a run's folder in, files out: what the commands do, for use from Python as well."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from agra import prepare as frozen
from agra.alignment.teacher import load_teacher, reference_frames
from agra.config import RunConfig
from agra.data.cache import CachedFeature
from agra.data.instructions import InstructionTokens
from agra.data.mixture import WindowSampler
from agra.data.normalize import NormStats
from agra.data.prefetch import Prefetched
from agra.data.sources import Source, embodiment_stats
from agra.diagnostics.diagnosis import diagnose as examine
from agra.diagnostics.grounding_monitor import GroundingMonitor
from agra.diagnostics.instrument import DiagnosisConfig
from agra.diagnostics.looking import TargetConfig, look
from agra.diagnostics.looking_monitor import LookingMonitor
from agra.diagnostics.masks import read_masks, with_masks
from agra.diagnostics.probe import load_samples
from agra.diagnostics.record import read_diagnosis
from agra.diagnostics.report import PolicyEntry, build_report
from agra.diagnostics.report_looking import LOOKING
from agra.diagnostics.rerun_export import write_recording
from agra.draws import seed_everything
from agra.examine import TeacherKind, first_looks, probe_inputs, probe_samples, projectors_of, teacher_of
from agra.footprint import flops_per_sample
from agra.instructions import FILE as INSTRUCTIONS
from agra.planner import peak_flops
from agra.policy import WAMPolicy
from agra.precision import allow_tensor_cores, local_device
from agra.prepare import OnlineEncoder, Preparation, codec_file
from agra.simulators.registry import make
from agra.training import checkpoint, lineage
from agra.training.logbook import Meter
from agra.training.loop import Trainer
from agra.training.objective import Objective
from agra.training.sharding import ParallelConfig, World, build, check_shares, joined
from agra.training.start import initialize
from agra.wam.groot import GR1_ROW, load_groot_head
from agra.wam.model import WAM

_FOUND_OUT = ("results.jsonl", "diagnosis")


def preparation(config: RunConfig, *, device: str = "cpu") -> Preparation:
    """The frozen features that the config's stage needs, still to be estimated or computed."""
    return Preparation(config, config.data.open(), device=local_device(device))


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
        allow_tensor_cores(world.device)
        check_shares(config.stage, parallel, world.size)

        def start(objective: Objective) -> None:
            if init is not None:
                initialize(objective, init, config)
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
    opened, tokens = frozen.open_features(config, sources), frozen.open_instructions(config, sources)
    stats = embodiment_stats(sources)
    online = OnlineEncoder.open(config, sources, device=world.device)
    sampler = make_sampler(config, sources, opened, stats, tokens, online, world)
    width = opened[0]["targets"].shape[-1] if "targets" in opened[0] else online and online.teacher_width

    def make() -> Objective:
        seed_everything(config.stage.seed, 2**31 + 1)
        alignment = config.alignment if config.aligns else None
        return Objective(WAM(config.model), config.stage.objective, alignment, width)

    peak = peak_flops(world.device)
    flops = None if peak is None else flops_per_sample(config, width)
    extra: dict[str, Callable[[Path], object]] = {
        "norm_stats.json": lambda path: NormStats.save_all(stats, path),
        INSTRUCTIONS: lambda path: frozen.write_known_instructions(path, tokens, sources),
    }
    if config.model.codec.kind == "patch_pca":
        fitted = codec_file(config, sources)
        extra["codec.safetensors"] = lambda path: path.write_bytes(fitted.read_bytes())
    workers, pin = 1 if online is None else 2, world.device.type == "cuda"
    with Prefetched(sampler.batch, workers=workers, pin=pin) as batches:
        trainer = Trainer(
            config,
            build(make, config.stage, parallel, world, start),
            batch=batches,
            validation=sampler.validation_batch if sampler.validation else None,
            output=output,
            extra_files=extra,
            monitors=_monitors(config, sampler, stats, tokens, world),
            samples=lambda step: [
                f"{sources[source].dataset.path}, episode {episode} from step {first}"
                for source, episode, first in sampler.windows(step)[world.rank :: world.size]
            ],
            world=world,
            parallel=parallel,
            meter=Meter(device=world.device, flops_per_sample=flops, peak_flops=peak),
        )
        return trainer.run()


def make_sampler(
    config: RunConfig,
    sources: Sequence[Source],
    features: Sequence[Mapping[str, CachedFeature]],
    stats: Mapping[str, NormStats],
    tokens: InstructionTokens,
    online: OnlineEncoder | None,
    world: World | None = None,
) -> WindowSampler:
    """The sampler of a config's windows, in the shapes of its model. Features that are not cached come from `online`."""
    head, world = config.model.action_dit, world or World()
    return WindowSampler(
        config.data,
        sources,
        features,
        stats,
        horizon=head.horizon,
        num_frames=config.model.num_frames,
        references=reference_frames(config.model.latent_shape[1]),
        batch_size=config.stage.batch_size,
        seed=config.stage.seed,
        max_state_dim=head.state_dim,
        max_action_dim=head.action_dim,
        instructions=tokens,
        encode_latents=online.latents if online is not None and online.codec is not None else None,
        encode_targets=online.targets if online is not None and online.teacher is not None else None,
        rank=world.rank,
        world_size=world.size,
    )


Monitor = Callable[[WAM], Mapping[str, float]]


def _monitors(
    config: RunConfig,
    sampler: WindowSampler,
    stats: Mapping[str, NormStats],
    tokens: InstructionTokens,
    world: World,
) -> dict[str, Monitor]:
    """Measures beside the losses in the stages that train the action head."""
    if config.stage.objective.action_weight == 0:
        return {}
    monitors: dict[str, Monitor] = {}
    if config.monitor.probes:
        inputs = probe_inputs(config, sampler.sources, stats, tokens, world)
        monitors["grounding"] = GroundingMonitor(inputs, config.monitor, seed=config.stage.seed)
    if config.looking is not None and sampler.validation:
        monitors["looking"] = _looking(config, config.looking, sampler, stats)
    return monitors


def _looking(
    config: RunConfig, looking: TargetConfig, sampler: WindowSampler, stats: Mapping[str, NormStats]
) -> LookingMonitor:
    """First looks at the first dataset's held-out episodes."""
    source = sampler.sources[0]
    own_stats = stats[source.dataset.embodiment]
    dimensions, step = looking.select(source.dataset.action_names), looking.step

    def targets(actions: Tensor) -> np.ndarray:
        own = own_stats.unnormalize("action", actions[..., : own_stats.width("action")].float().cpu().numpy())
        return own[:, min(step, own.shape[1] - 1), dimensions]

    instructions = [source.dataset.instruction(episode) for episode in source.validation]
    return LookingMonitor(sampler.first_batch(), instructions, targets, seed=config.stage.seed)


def diagnose(
    run: str | Path,
    *,
    simulator: str,
    samples: int,
    seed: int = 0,
    device: str = "cpu",
    config: DiagnosisConfig | None = None,
    teacher: TeacherKind = "own",
    probes: Path | None = None,
    masks: Path | None = None,
) -> Path:
    """Examine a policy, a run's newest checkpoint say, and write the folder `diagnosis` in its home.

    The samples come from `probes`, a folder of `agra probes`, if it is given, and else from the simulator; `masks` are
    annotations of theirs (`agra.diagnostics.masks`).
    """
    policy = WAMPolicy.load(run, device=device)
    settings = teacher_of(policy.config, teacher)
    network = None if settings is None else load_teacher(settings).to(policy.device)
    projectors = projectors_of(run, network.width) if network is not None and teacher == "own" else None
    if projectors is not None:  # in the type of the hidden states that they read
        projectors = projectors.to(policy.device, next(policy.model.parameters()).dtype)
    output = checkpoint.home(run) / "diagnosis"
    output.parent.mkdir(parents=True, exist_ok=True)
    target = policy.config.looking if probes is None else None
    looks, action_names = [], ()
    if probes is not None:
        found = load_samples(probes)
    else:
        world = make(simulator)
        try:
            found = probe_samples(world, samples, policy.config)
            if target is not None:
                looks, action_names = first_looks(world, target.step + 1), world.embodiment.action_names
        finally:
            world.close()
    examine(
        policy,
        found if masks is None else with_masks(found, read_masks(masks)),
        output,
        teacher=None if network is None else lambda frames: network(frames).cpu().numpy(),
        teacher_name="" if settings is None else settings.kind,
        projectors=projectors,
        seed=seed,
        config=config,
    )
    if target is not None:
        look(policy, looks, action_names, target, seed=seed).save(output / LOOKING)
    return output


def report(policies: Sequence[str | Path], *, output: Path, studies: Sequence[Path] = ()) -> Path:
    """Lay policies side by side in one HTML page; each gives what its folder, and those it started from, hold.

    `studies` are folders of `agra study`.
    """
    return build_report([_entry(policy) for policy in policies], output, studies=studies)


def record(policies: Sequence[str | Path], *, output: Path) -> Path:
    """The galleries of policies' diagnoses as one recording for the Rerun viewer."""
    entries = [_entry(policy) for policy in policies]
    missing = [entry.name for entry in entries if entry.diagnosis is None]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no diagnosis; run `agra diagnose` first")
    return write_recording([(e.name, read_diagnosis(e.diagnosis)) for e in entries if e.diagnosis is not None], output)


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
