"""`agra diagnose`, `report`, `probes` and `study`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from agra.cli.arguments import recipe_arguments, with_data
from agra.types import ActionNoise, VideoNoise


def diagnose(
    policies: Annotated[tuple[str, ...], tyro.conf.Positional],
    simulator: str = "tabletop",
    samples: int = 40,
    noise_samples: int = 2,
    background_sets: int = 2,
    gallery: int = 6,
    maps: tuple[Literal["zero", "mean", "shuffle", "swap"], ...] = ("mean", "zero"),
    layers: tuple[int, ...] | None = None,
    teacher: Literal["own", "packaged_dinov2_small", "dinov2", "siglip", "none"] = "own",
    probes: Path | None = None,
    masks: Path | None = None,
    seed: int = 0,
    action_noise: ActionNoise | None = None,
    video_noise: VideoNoise | None = None,
    device: str = "cpu",
) -> None:
    """Diagnose policies by attention, interventions and PCA. Results go to the folder `diagnosis` of each run.

    The samples are moments of the scripted expert's episodes on evaluation trials, the same for every policy, with the
    interaction mask that the simulator renders. With --probes the samples are those of a folder written by
    `agra probes`.

    Args:
        policies: checkpoint or run folders, or names of bundled policies.
        simulator: the simulator of the samples.
        samples: number of samples, spread evenly over the four regimes.
        noise_samples: draws of video and action noise for each sample.
        background_sets: background sets for each sample and draw of noise.
        gallery: number of samples with maps and pictures.
        maps: interventions of the sensitivity maps.
        layers: layers to measure and show. By default those that the action head reads.
        teacher: visual encoder to compare hidden states with. `own` is the recipe's, or the packaged DINOv2 without
            one.
        probes: a folder of samples instead of the simulator.
        masks: annotations of the samples' frames: COCO, CVAT or labelme.
        seed: seed of the noise and the background sets.
        action_noise: where the denoising of a chunk starts, see `agra evaluate`.
        video_noise: noise of a world action model's conditioning pass, see `agra evaluate`.
        device: the policies' device.
    """
    from agra.api import diagnose as run
    from agra.diagnostics.measurement import DiagnosisConfig

    config = DiagnosisConfig(
        noise_samples=noise_samples,
        background_sets=background_sets,
        gallery=gallery,
        map_kinds=maps,
        layers=layers,
    )
    for policy in policies:
        run(
            policy,
            simulator=simulator,
            samples=samples,
            seed=seed,
            device=device,
            config=config,
            teacher=teacher,
            probes=probes,
            masks=masks,
            action_noise=action_noise,
            video_noise=video_noise,
        )


def report(
    policies: Annotated[tuple[str, ...], tyro.conf.Positional],
    output: Path = Path("report.html"),
    studies: tuple[Path, ...] = (),
    rerun: Path | None = None,
) -> None:
    """Write an HTML report that compares policies: training, evaluation, grounding, pictures.

    Args:
        policies: run folders or names of bundled policies. The report shows their metrics.jsonl, results.jsonl and
            diagnosis/ where they exist, and the metrics of their earlier stages.
        output: file of the report.
        studies: folders of `agra study`.
        rerun: also write the galleries to this .rrd recording for the Rerun viewer.
    """
    from agra.api import record
    from agra.api import report as run

    print(run(policies, output=output, studies=studies))
    if rerun is not None:
        print(record(policies, output=rerun))


@dataclass(frozen=True, kw_only=True)
class ProbesOptions:
    """Options of `agra probes`."""

    output: Path
    """Folder of the samples."""
    simulator: str | None = None
    """Simulator whose scripted expert gives the samples, with masks. By default they come from the recipe's dataset,
    without masks."""
    samples: int = 24
    """Number of samples."""
    tasks: tuple[str, ...] | None = None
    """Tasks of the simulator to play. By default all."""
    simulator_python: Path | None = None
    """Interpreter of the simulator's own environment, in which the expert plays."""


def probes(arguments: list[str]) -> None:
    """Write probe samples, and their frames as pictures to annotate: agra probes RECIPE --output DIR [--data.path ...]"""
    options, config = recipe_arguments("probes", arguments, ProbesOptions)
    if options.simulator is None and (options.tasks is not None or options.simulator_python is not None):
        raise ValueError("--tasks and --simulator-python need --simulator NAME")
    config = with_data(config, arguments, None)
    from agra.diagnostics.samples.expert_samples import in_environment
    from agra.diagnostics.samples.probe_sample import save_samples
    from agra.diagnostics.samples.sources import dataset_samples, probe_samples, sample_steps, write_pictures
    from agra.simulators.registry import make

    if options.simulator is None:
        samples = dataset_samples(config, options.samples)
    elif options.simulator_python is not None:
        steps = sample_steps(config, config.data.embodiments)
        samples = in_environment(
            options.simulator_python,
            options.simulator,
            options.samples,
            steps,
            tasks=options.tasks,
        )
    else:
        env = make(options.simulator)
        try:
            samples = probe_samples(env, options.samples, config, tasks=options.tasks)
        finally:
            env.close()
    write_pictures(samples, options.output / "pictures")
    save_samples(samples, options.output)  # last: its file marks the folder as complete
    print(options.output)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of `agra study`."""

    output: Path
    """Folder of the study."""
    over: Literal["alignment", "bridge"]
    """alignment: each layer is aligned alone (Fig. 10). bridge: each layer is read alone (Fig. 11)."""
    layers: tuple[int, ...] | None = None
    """Layers of the study. By default those that the recipe's action head reads."""
    init_from: str | None = None
    """Starting point of every variant, such as a run of the adapt stage."""
    simulator: str | None = "tabletop"
    """Simulator of evaluation and diagnosis. None compares the losses alone."""
    limit: int | None = 10
    """Trials of each regime."""
    samples: int = 40
    """Samples of the diagnosis. 0 turns it off."""
    device: str = "cpu"
    """Device of training and evaluation."""


def study(arguments: list[str]) -> None:
    """Train, evaluate and diagnose one variant for every layer: agra study RECIPE --over alignment --output DIR"""
    options, config = recipe_arguments("study", arguments, StudyOptions)
    config = with_data(config, arguments, None)
    from agra.api import study as run

    print(run(config, **vars(options)))
