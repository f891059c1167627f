"""The functions behind the commands, for use from Python. They take a config or a run's folder and write files.

`agra` re-exports the public ones. This module connects data, training, policies and diagnostics, which import each
other only as docs/architecture.md allows.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from agra import files
from agra.alignment.teacher import load_teacher
from agra.checkpoints.folder import artifact_dir, newest, resolve
from agra.checkpoints.lineage import check_origin, describe, lineage, record_origin
from agra.checkpoints.recorded_sizes import FILE as RECORDED_SIZES
from agra.checkpoints.recorded_sizes import write_recorded_sizes
from agra.config import RunConfig, VisualRelianceConfig
from agra.data.features.encoders import codec_file, open_codec
from agra.data.features.instruction_tokens import InstructionTokens
from agra.data.features.online import OnlineEncoder
from agra.data.features.preparation import (
    Preparation,
    open_features,
    open_instructions,
    write_instruction_tokens,
)
from agra.data.normalization.normalize import NormStats
from agra.data.sampling.prefetch import Prefetched
from agra.data.sampling.sampler import WindowSampler
from agra.data.source import Source, embodiment_stats, open_sources, recorded_sizes
from agra.diagnostics.diagnosis import diagnose as run_diagnosis
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.monitors import GroundingMonitor, PredictionMonitor, VisualRelianceMonitor, require_video
from agra.diagnostics.record import read_diagnosis
from agra.diagnostics.report.page import PolicyEntry, build_report
from agra.diagnostics.report.rerun_export import write_recording
from agra.diagnostics.report.visual_reliance_section import (
    VISUAL_RELIANCE,
    read_visual_reliance,
    remove_visual_reliance,
)
from agra.diagnostics.samples.masks import read_masks, with_masks
from agra.diagnostics.samples.probe_sample import load_samples
from agra.diagnostics.samples.sources import (
    TeacherKind,
    comparison_teacher,
    initial_observations,
    probe_inputs,
    probe_samples,
    trained_projectors,
)
from agra.diagnostics.study import StudyTopic
from agra.diagnostics.study import study as run_study
from agra.diagnostics.visual_reliance import measure_visual_reliance
from agra.methods.method import Method, ReadsTokens, observation_inputs
from agra.policies.instructions import FILE as INSTRUCTIONS
from agra.policies.load import load_policy
from agra.precision import allow_tensor_cores, local_device
from agra.rng import seed_everything
from agra.simulation import EXPERT, make_simulator, manifest_sha256, open_policy
from agra.simulation import evaluate as evaluate
from agra.training.distributed import DistributedContext, distributed_context
from agra.training.initialization import load_initial_weights
from agra.training.loggers import check_loggers
from agra.training.memory_estimate import flops_per_sample
from agra.training.metrics import ThroughputMeter
from agra.training.parallelize import ParallelConfig, build, check_batch_size
from agra.training.plan import peak_flops
from agra.training.trainer import Monitor, Trainer
from agra.types import ActionNoise, VideoNoise
from agra.wam.action_dit import ActionDiT
from agra.wam.bridge import Bridge
from agra.wam.groot import GR1_ROW, load_groot_head

if TYPE_CHECKING:
    from gradio import Blocks

_RESULTS = ("results.jsonl", "diagnosis")
_LOOKS, _SECONDS_BETWEEN_LOOKS = 7, 10.0


def preparation(config: RunConfig, *, device: str = "cpu") -> Preparation:
    """Open the sources of a config, to estimate or compute the frozen features that its stage needs."""
    return Preparation(config.method, config.data, open_sources(config.data), device=local_device(device))


def prepare(config: RunConfig, *, device: str = "cpu") -> list[Path]:
    """Compute and cache the frozen features that a config's stage needs. Returns their folders."""
    return preparation(config, device=device).run()


def train(
    config: RunConfig,
    *,
    output: Path,
    init_from: str | Path | None = None,
    head: str | None = None,
    head_rows: Sequence[int] = (GR1_ROW,),
    device: str = "cpu",
    parallel: ParallelConfig | None = None,
    loggers: Sequence[str] | None = None,
    prepare_missing: Callable[[Preparation], object] | None = None,
) -> bool:
    """Train one stage into `output`, or resume the run there. Returns False if SIGTERM stopped it early.

    A new run starts from `init_from` (see `load_initial_weights`), and its action head from the GR00T-N1.5 model
    `head`. A resumed run keeps its start. Another one raises ValueError. `loggers` are names of
    `agra.training.loggers.LOGGERS`, by default TensorBoard where it is installed. `prepare_missing` is called where
    features are not cached, in a run of one process. Without it they are an error. Under torchrun every process calls
    this with the same arguments. Raises ValueError where the batch does not divide over processes and micro-batches.
    """
    parallel = parallel or ParallelConfig()
    check_loggers(loggers or ())
    options = {"shard_degree": parallel.shard_degree, "deterministic": parallel.deterministic}
    with (
        distributed_context(device, **options) as context,
        files.lock(output) if context.is_main else nullcontext(),
    ):
        allow_tensor_cores(context.device)
        check_batch_size(
            config.stage.batch_size,
            config.method.batch_multiple,
            parallel.gradient_accumulation_steps,
            context.world_size,
        )

        def initialize(method: Method) -> None:
            if init_from is not None:
                load_initial_weights(method, init_from, config)
            if head is not None:
                _load_head(method, head, head_rows)
            method.update_averages(restart=True)

        fresh = _agree_on_newest(output, context) is None
        if not fresh:
            check_origin(output, init_from, head)
        elif context.is_main:
            output.mkdir(parents=True, exist_ok=True)
            record_origin(output, init_from, head)
        return _train(config, output, initialize if fresh else None, parallel, context, loggers, prepare_missing)


def _agree_on_newest(output: Path, context: DistributedContext) -> Path | None:
    """Return the newest checkpoint in `output`, the same one for all processes.

    A machine's view of a shared folder may be late, so they look for a minute. Raises ValueError if they still differ.
    """
    for _ in range(_LOOKS):
        checkpoint = newest(output)
        names = set(context.gather("none" if checkpoint is None else checkpoint.name))
        if len(names) == 1:
            return checkpoint
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise ValueError(
        f"{output}: the processes see different newest checkpoints ({', '.join(sorted(names))}); the folder must be on a "
        "file system that all machines share"
    )


def _load_head(method: Method, head: str, rows: Sequence[int]) -> None:
    bridge, action_dit = (method.parts().get(name) for name in ("bridge", "action_dit"))
    if not isinstance(bridge, Bridge) or not isinstance(action_dit, ActionDiT):
        raise ValueError(
            f"--head: expected a method with GR00T-N1.5's action head, such as wam, got {method.config.kind}"
        )
    load_groot_head(bridge, action_dit, head, rows=rows)


def _train(
    config: RunConfig,
    output: Path,
    initialize: Callable[[Method], None] | None,
    parallel: ParallelConfig,
    context: DistributedContext,
    loggers: Sequence[str] | None,
    prepare_missing: Callable[[Preparation], object] | None,
) -> bool:
    sources = open_sources(config.data)
    features = Preparation(config.method, config.data, sources, device=context.device)
    if prepare_missing is not None and context.world_size == 1 and features.missing:
        prepare_missing(features)
    stats, tokens = embodiment_stats(sources), open_instructions(config.method, config.data, sources)
    online = OnlineEncoder.open(config.method, config.data, sources, device=context.device)
    sampler = make_sampler(config, sources, stats, tokens, online, context)

    def make_method() -> Method:
        seed_everything(config.stage.seed, 2**31 + 1)
        return config.method.build()

    peak = peak_flops(context.device)
    meter = ThroughputMeter(
        device=context.device,
        flops_per_sample=None if peak is None else flops_per_sample(config),
        peak_flops=peak,
    )
    workers, pin = 1 if online is None else 2, context.device.type == "cuda"
    with Prefetched(sampler.batch, workers=workers, pin=pin) as batches:
        trainer = Trainer(
            config,
            build(make_method, config.stage, parallel, context, initialize),
            batch=batches,
            validation=sampler.validation_batch if sampler.validation else None,
            output=output,
            extra_files=_extra_files(config, sources, stats, tokens),
            monitors=_monitors(config, sampler, stats, tokens, context),
            sample_names=lambda step: [
                f"{sources[source].dataset.path}, episode {episode} from step {first}"
                for source, episode, first in sampler.windows(step)[context.rank :: context.world_size]
            ],
            context=context,
            parallel=parallel,
            meter=meter,
            loggers=loggers,
        )
        return trainer.run()


def _extra_files(
    config: RunConfig,
    sources: Sequence[Source],
    stats: Mapping[str, NormStats],
    tokens: InstructionTokens | None,
) -> dict[str, Callable[[Path], object]]:
    """Return writers of the files that a policy needs besides the weights."""
    writers: dict[str, Callable[[Path], object]] = {"norm_stats.json": partial(NormStats.save_all, stats)}
    if sizes := recorded_sizes(sources):
        writers[RECORDED_SIZES] = partial(write_recorded_sizes, sizes=sizes)
    if tokens is not None:
        writers[INSTRUCTIONS] = lambda path: write_instruction_tokens(path, tokens, sources)
    codec = config.method.codec
    if codec is not None and codec.kind == "patch_pca":
        fitted = codec_file(config.method, config.data, sources)
        writers["codec.safetensors"] = lambda path: path.write_bytes(fitted.read_bytes())
    return writers


def make_sampler(
    config: RunConfig,
    sources: Sequence[Source],
    stats: Mapping[str, NormStats],
    tokens: InstructionTokens | None,
    online: OnlineEncoder | None,
    context: DistributedContext | None = None,
) -> WindowSampler:
    """Make the sampler of a config's windows. `online` encodes features that are not cached."""
    context = context or DistributedContext()
    return WindowSampler(
        config.data,
        config.method,
        sources,
        open_features(config.method, config.data, sources),
        stats,
        batch_size=config.stage.batch_size,
        seed=config.stage.seed,
        instructions=tokens,
        online=online,
        rank=context.rank,
        world_size=context.world_size,
    )


def _monitors(
    config: RunConfig,
    sampler: WindowSampler,
    stats: Mapping[str, NormStats],
    tokens: InstructionTokens | None,
    context: DistributedContext,
) -> dict[str, Monitor]:
    """Make the monitors of validation. Those of actions need a stage with an action loss."""
    monitors: dict[str, Monitor] = {}
    held_out = sampler.sources[0].validation
    if config.monitor.predictions and held_out:
        require_video(config.method)
        codec = open_codec(config.method, config.data, sampler.sources, device=context.device)
        count = min(config.monitor.predictions, len(held_out))
        monitors["prediction"] = PredictionMonitor(
            sampler.first_batch(count=count), count, config.method, codec, seed=config.stage.seed
        )
    if not config.method.trains_actions:
        return monitors
    if config.monitor.probes:
        probes = probe_inputs(config, sampler.sources, stats, tokens, context)
        monitors["grounding"] = GroundingMonitor(probes, config.monitor, seed=config.stage.seed)
    if config.visual_reliance is not None and held_out:
        monitors["visual_reliance"] = _visual_reliance_monitor(config, config.visual_reliance, sampler, stats)
    return monitors


def _visual_reliance_monitor(
    config: RunConfig, reliance: VisualRelianceConfig, sampler: WindowSampler, stats: Mapping[str, NormStats]
) -> VisualRelianceMonitor:
    """Make the monitor of visual reliance on the initial observations of the first dataset's held-out episodes."""
    source = sampler.sources[0]
    statistics = stats[source.dataset.embodiment]

    def targets(actions: Tensor) -> np.ndarray:
        narrow = actions[..., : statistics.width("action")].float().cpu().numpy()
        return reliance.target(statistics.unnormalize("action", narrow), source.dataset.action_names)

    batch = sampler.first_batch()
    instructions = [source.dataset.instruction(episode) for episode in source.validation]
    inputs = observation_inputs(batch, config.method)
    return VisualRelianceMonitor(inputs, batch.actions, instructions, targets, seed=config.stage.seed)


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
    action_noise: ActionNoise | None = None,
    video_noise: VideoNoise | None = None,
) -> Path:
    """Diagnose a policy, such as a run's newest checkpoint, and write the folder `diagnosis` beside its results.

    The samples come from the simulator, or from `probes`, a folder of `agra probes`, for which visual reliance is not
    measured. A diagnosis that was there is replaced. `masks` are annotations of the samples' frames
    (`agra.diagnostics.samples.masks`). `action_noise` and `video_noise` are those of
    `agra.policies.policy.MethodPolicy`.
    """
    checkpoint = resolve(run)  # the same one for all that follows, whatever a training run adds
    policy = load_policy(
        checkpoint, name=Path(run).name, device=device, action_noise=action_noise, video_noise=video_noise
    )
    settings = comparison_teacher(policy.config, teacher) if isinstance(policy.method, ReadsTokens) else None
    network = None if settings is None else load_teacher(settings).to(policy.device)
    projectors = trained_projectors(checkpoint) if network is not None and teacher == "own" else None
    if projectors is not None:  # in the type of the hidden states that they read
        projectors = projectors.to(policy.device, next(policy.method.parameters()).dtype)
    output = artifact_dir(run) / "diagnosis"
    output.parent.mkdir(parents=True, exist_ok=True)
    reliance = policy.config.visual_reliance if probes is None else None
    initial, action_names = [], ()
    if probes is not None:
        moments = load_samples(probes)
    else:
        env = make_simulator(simulator)
        try:
            moments = probe_samples(env, samples, policy.config)
            if reliance is not None:
                initial, action_names = initial_observations(env, reliance.step + 1), env.embodiment.action_names
        finally:
            env.close()
    remove_visual_reliance(output)  # it is written last, and so marks a complete diagnosis of a simulator
    run_diagnosis(
        policy,
        moments if masks is None else with_masks(moments, read_masks(masks)),
        output,
        teacher=None if network is None else lambda frames: network(frames).cpu().numpy(),
        teacher_name="" if settings is None else settings.kind,
        projectors=projectors,
        checkpoint_sha256=manifest_sha256(checkpoint),
        seed=seed,
        config=config,
    )
    if reliance is not None:
        reads = policy.config.method.needs_to_act().instruction
        result = measure_visual_reliance(policy, initial, action_names, reliance, seed=seed, reads_instruction=reads)
        result.save(output / VISUAL_RELIANCE)
    return output


def study(
    config: RunConfig,
    *,
    over: StudyTopic,
    output: Path,
    layers: Sequence[int] | None = None,
    init_from: str | Path | None = None,
    simulator: str | None = "tabletop",
    limit: int | None = None,
    samples: int = 40,
    device: str = "cpu",
) -> Path:
    """Train, evaluate and diagnose a variant for every layer (`agra.diagnostics.study`). Returns `output`/study.json.

    Every variant starts from `init_from`, a checkpoint of the adapt or the joint stage. Projectors of layers that were
    not aligned there start fresh. `limit` trials of each regime are run, by default all, as by `agra evaluate`, and
    `samples` are diagnosed.
    Without a `simulator` only the losses are compared.
    """

    def judge(run: Path, name: str) -> None:
        if simulator is None:
            return
        evaluate(run, simulator, output=run / "results.jsonl", name=name, limit=limit, device=device)
        folder = run / "diagnosis"
        measured = config.visual_reliance is None or read_visual_reliance(folder) is not None
        if samples and not (measured and (folder / "diagnosis.json").is_file()):
            settings = DiagnosisConfig(gallery=0)
            diagnose(run, simulator=simulator, samples=samples, device=device, config=settings)

    def train_variant(variant: RunConfig, run: Path) -> bool:
        return train(variant, output=run, init_from=init_from, device=device)

    return run_study(config, over=over, output=output, layers=layers, train=train_variant, judge=judge)


def report(policies: Sequence[str | Path], *, output: Path, studies: Sequence[Path] = ()) -> Path:
    """Write an HTML report comparing policies, from the logs, results and diagnoses of each run and its parent stages.

    `studies` are folders of `agra study`.
    """
    return build_report([_entry(policy) for policy in policies], output, studies=studies)


def record(policies: Sequence[str | Path], *, output: Path) -> Path:
    """Write the galleries of policies' diagnoses as one recording for the Rerun viewer."""
    entries = [_entry(policy) for policy in policies]
    missing = [entry.name for entry in entries if entry.diagnosis is None]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no diagnosis; run `agra diagnose` first")
    return write_recording([(e.name, read_diagnosis(e.diagnosis)) for e in entries if e.diagnosis is not None], output)


def make_demo(policies: Sequence[str] = ("tabletop-wam", "tabletop-agra"), *, device: str = "cpu") -> "Blocks":
    """Make the page of `agra demo`: policies side by side on the tabletop, live. Call `launch()` on it.

    `policies` are those of `agra.simulation.open_policy`. Checkpoints are loaded once for all visitors. Raises
    ImportError without Gradio, and ValueError for a policy that was not trained on the tabletop's hands.
    """
    from agra.demo.page import build_page  # Gradio is optional

    names = [str(policy) for policy in policies]
    loaded = {name: load_policy(name, device=device) for name in names if name != EXPERT and "://" not in name}
    return build_page(names, lambda name, simulator: loaded[name] if name in loaded else open_policy(name, simulator))


def _entry(policy: str | Path) -> PolicyEntry:
    checkpoint, folder = resolve(policy), artifact_dir(policy)
    stages = lineage(policy)
    results, diagnosis = (
        next((place / name for place in (folder, checkpoint) if (place / name).exists()), None) for name in _RESULTS
    )
    return PolicyEntry(
        name=folder.name,
        description=describe(stages),
        training_logs={stage.config.stage.name: stage.metrics for stage in stages if stage.metrics is not None},
        results=results,
        diagnosis=diagnosis,
        config=checkpoint / "config.json",
    )
