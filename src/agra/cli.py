"""The command line. Every command is a function; errors a user can mend are one line and exit code 1.

Heavy imports happen inside the commands, so that `agra --help` answers at once and a torch-free install can collect.
"""

import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from agra.cli_evaluate import compare, evaluate, leaderboard
from agra.cli_robot import control, serve, use_threads
from agra.types import SimulatorFailed

if TYPE_CHECKING:
    from agra.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `agra`. Set AGRA_TRACEBACK=1 to see where an error came from."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        raise SystemExit(0 if arguments else 2)
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise ValueError(_unknown("command", name, COMMANDS))
        COMMANDS[name](rest)
    except (ValueError, OSError, ImportError, SimulatorFailed) as error:
        if os.environ.get("AGRA_TRACEBACK"):
            raise
        print(f"agra: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("agra: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


# --- collect ---------------------------------------------------------------------------------------------------------


def collect(
    simulator: Annotated[str, tyro.conf.Positional],
    output: Path,
    episodes: int = 200,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Record demonstrations of the scripted expert as a LeRobot v3.0 dataset. Interrupted, it goes on where it was.

    Args:
        simulator: a registered simulator, e.g. tabletop.
        output: folder of the new dataset.
        episodes: how many demonstrations.
        seed: decides every scene and all noise; the number of workers changes nothing.
        workers: processes that play episodes side by side.
    """
    from agra.collect import collect as run

    run(simulator, output, episodes=episodes, seed=seed, workers=workers)


# --- datasets --------------------------------------------------------------------------------------------------------


def doctor(
    dataset: Annotated[str, tyro.conf.Positional],
    camera: str | None = None,
    every_frame: bool = False,
    seal: bool = False,
    json: Path | None = None,
) -> None:
    """Examine a dataset for everything that can silently spoil training. Exit code 1 where it finds an error.

    Args:
        dataset: a LeRobot dataset of version 2.0, 2.1 or 3.0, a folder or a hub id.
        camera: look through this one only; by default through all.
        every_frame: decode every episode instead of three.
        seal: write checksums of all files as they are now; reading then finds any damage.
        json: write the findings here, for machines.
    """
    from agra.data.doctor import examine
    from agra.data.hub import local_folder
    from agra.data.integrity import seal as write_checksums

    if seal:
        print(write_checksums(local_folder(dataset)))
    diagnosis = examine(dataset, camera=camera, every_frame=every_frame)
    diagnosis.print()
    if json is not None:
        json.write_text(diagnosis.to_json() + "\n", encoding="utf-8")
    if not diagnosis.healthy:
        raise SystemExit(1)


def convert(
    source: Annotated[str, tyro.conf.Positional],
    output: Path,
    kind: Literal["lerobot", "egodex", "libero", "robomimic"] = "lerobot",
    version: Literal["v2.0", "v2.1", "v3.0"] = "v3.0",
    limit: int | None = None,
    instruction: str | None = None,
    fps: int | None = None,
) -> None:
    """Write a dataset in another form: LeRobot of any version, EgoDex, LIBERO's or robomimic's HDF5.

    Args:
        source: the dataset: a folder or a hub id; for HDF5 a file, or a folder of them.
        output: folder of the new dataset.
        kind: what `source` is.
        version: LeRobot version to write, of a LeRobot source; the others become v3.0.
        limit: convert only so many EgoDex trajectories.
        instruction: what HDF5 demonstrations show, where the files do not tell.
        fps: control rate of HDF5 demonstrations, where the files do not tell.
    """
    if kind != "lerobot" and version != "v3.0":
        raise ValueError(f"--version {version}: {kind} is written as v3.0; convert the result")
    if kind == "lerobot":
        from agra.data.convert import convert as run

        run(source, output, version)
    elif kind == "egodex":
        from agra.data.egodex import convert_egodex

        convert_egodex(Path(source), output, limit=limit)
    else:
        from agra.data.robomimic import convert_hdf5

        path = Path(source)
        files = sorted(path.glob("*.hdf5")) if path.is_dir() else [path]
        convert_hdf5(files, output, kind=kind, instruction=instruction, fps=fps)
    print(output)


# --- prepare and train -----------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> None:
    """Train a recipe's stage: agra train RECIPE --stage joint --output DIR --data.path DATASET [--stage.steps 10 ...]"""
    from agra.run import train
    from agra.training.sharding import ParallelConfig
    from agra.wam.groot import GR1_ROW

    @dataclass(frozen=True, kw_only=True)
    class TrainOptions:
        output: Path
        """Folder of the run: checkpoints, metrics.jsonl, tensorboard. A run found there is resumed."""
        init: str | None = None
        """Checkpoint, or run folder, of the stage before; or a diffusers model (folder, or hub id with or without
        @revision) for its transformer."""
        head: str | None = None
        """A GR00T-N1.5 model (folder or hub id) for its action head."""
        head_rows: tuple[int, ...] = (GR1_ROW,)
        """Its embodiments that ours start from, one for each or one for all; none leaves encoders and decoder fresh."""
        mixture: Path | None = None
        """JSON list of the datasets to mix, each with the fields of `--data` that it sets (path, embodiment, weight ...)."""
        augment: bool = False
        """GR00T's image augmentation of clips that are decoded while training (--data.cached must be empty)."""
        parallel: ParallelConfig = field(default_factory=ParallelConfig)
        device: str = "cpu"
        """cpu or cuda; under torchrun each process takes the GPU of its local rank."""
        threads: int | None = None
        """Threads of torch; by default OMP_NUM_THREADS, or all cores."""

    options, config = _recipe_arguments("train", arguments, TrainOptions)
    config = _with_mixture(config, options.mixture)
    if options.augment:
        from agra.data.augment import AugmentConfig

        config = replace(config, data=replace(config.data, augment=AugmentConfig()))
    use_threads(options.threads)
    done = train(
        config,
        output=options.output,
        init=options.init,
        head=options.head,
        head_rows=options.head_rows,
        device=options.device,
        parallel=options.parallel,
    )
    if not done:
        print(f"stopped by SIGTERM; the same command resumes from {options.output}", file=sys.stderr)


def _plan(arguments: list[str]) -> None:
    """Say before launch what fits: agra plan RECIPE --gpus 8 --gpu-memory 80 [--stage joint] [--with PRESET ...]"""
    from agra.planner import Machines, describe, plan

    machines, config = _recipe_arguments("plan", arguments, Machines)
    found = plan(config, machines)
    print(describe(found, config, machines))
    if found.hours == float("inf"):
        raise SystemExit(1)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How the frozen features are computed."""

    device: str = "cpu"
    """cpu or cuda; under torchrun each process takes the GPU of its local rank."""
    mixture: Path | None = None
    """JSON list of the datasets to mix, as for `agra train`."""
    estimate: bool = False
    """Only say how much there is to compute, how large it will be and how long it will take, and what encoding while
    training would cost instead."""
    rank: int = int(os.environ.get("RANK", 0))
    """Which of several processes this is; each computes its share of the episodes. By default what torchrun says."""
    world_size: int = int(os.environ.get("WORLD_SIZE", 1))


def _prepare(arguments: list[str]) -> None:
    """Cache what frozen networks compute for a recipe: agra prepare RECIPE --data.path DATASET [--stage adapt]"""
    options, config = _recipe_arguments("prepare", arguments, PrepareOptions)
    config = _with_mixture(config, options.mixture)
    from agra.run import preparation

    if not 0 <= options.rank < options.world_size:
        raise ValueError(f"--rank {options.rank}: expected 0 to {options.world_size - 1}, as --world-size says")
    features = preparation(config, device=options.device)
    if options.estimate:
        for cost in features.costs():
            print(cost, file=sys.stderr)
    for source, expected in features.estimate() if options.rank == 0 else ():
        print(f"{source.dataset.path}: {expected}", file=sys.stderr)
        if expected.bytes > expected.free_bytes:
            raise ValueError(f"{config.data.cache}: {expected}; choose another --data.cache")
    if not options.estimate:
        for folder in features.run(rank=options.rank, world_size=options.world_size):
            print(folder)


def _with_mixture(config: "RunConfig", path: Path | None) -> "RunConfig":
    if path is None:
        return config
    from agra.config import read_mixture

    return replace(config, data=replace(config.data, mixture=read_mixture(path)))


def _recipe_arguments(command: str, arguments: list[str], options: type) -> tuple:
    """RECIPE, --stage NAME, --with PRESET ..., then every field of the config as a flag (--stage.steps, --data.path ...)."""
    from agra.recipes import PRESETS, RECIPES, compose
    from agra.training.stages import Stage

    if not arguments or arguments[0].startswith("-"):
        print(
            f"usage: agra {command} RECIPE [--stage {{{','.join(Stage)}}}] [--with PRESET ...] [flags]; "
            f"recipes: {', '.join(RECIPES)}; presets: {', '.join(PRESETS)}; "
            f"`agra {command} RECIPE --help` lists the flags"
        )
        raise SystemExit(0 if "-h" in arguments or "--help" in arguments else 2)
    name, *rest = arguments
    if name not in RECIPES:
        raise ValueError(_unknown("recipe", name, RECIPES))
    stages, rest = _take("--stage", rest)
    presets, rest = _take("--with", rest)
    for what, given, known in (("stage", stages, list(Stage)), ("preset", presets, PRESETS)):
        for value in given:
            if value not in known:
                raise ValueError(_unknown(what, value, known))
    config = compose(name, Stage(stages[-1]) if stages else Stage.JOINT, presets)
    return _parse(command, name, config, rest, options)


def _take(flag: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The values after `flag` up to the next flag, and the arguments without them."""
    if flag not in arguments:
        return [], arguments
    start = arguments.index(flag)
    end = next((i for i in range(start + 1, len(arguments)) if arguments[i].startswith("-")), len(arguments))
    return arguments[start + 1 : end] or [""], arguments[:start] + arguments[end:]


def _parse(command: str, recipe: str, config: "RunConfig", rest: list[str], options: type) -> tuple:
    from agra.config import RunConfig

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        run: Annotated[options, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: config)

    settings = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    parsed = _from_flags(Arguments, rest, f"agra {command} {recipe}", settings)
    return parsed.run, parsed.config


def _from_flags(target: Callable[..., Any], arguments: list[str], program: str, settings: Sequence[Any] = ()) -> Any:
    """`target` called with what the flags say. Raises ValueError with tyro's complaint in one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(target, args=arguments, prog=program, config=settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(complaint.getvalue(), program)) from None


def _one_line(box: str, program: str) -> str:
    """The first paragraph of tyro's framed message, and the flag that it thinks was meant."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [i for i, line in enumerate(lines) if line and set(line) <= {"─", " "}] or [len(lines)]
    meant = re.search(r"Perhaps you meant:\W+(--[\w.-]+)", "\n".join(lines))
    hint = f"; did you mean {meant[1]}?" if meant else ""
    return f"{' '.join(lines[: rules[0]])}{hint} (see {program} --help)"


def recipes() -> None:
    """List the recipes, a row of the paper each, and the presets that --with adds to any of them."""
    from agra.recipes import PRESETS, RECIPES

    for title, table in (("recipes", RECIPES), ("presets, for --with", PRESETS)):
        print(f"# {title}")
        for name, function in table.items():
            print(f"{name:28}{(function.__doc__ or '').strip().splitlines()[0]}")


# --- diagnose and report ---------------------------------------------------------------------------------------------


def diagnose(
    policies: Annotated[tuple[str, ...], tyro.conf.Positional],
    simulator: str = "tabletop",
    samples: int = 40,
    noises: int = 2,
    draws: int = 2,
    gallery: int = 6,
    maps: tuple[Literal["zero", "mean", "shuffle", "swap"], ...] = ("mean", "zero"),
    layers: tuple[int, ...] | None = None,
    teacher: Literal["own", "packaged_dinov2_small", "dinov2", "siglip", "none"] = "own",
    probes: Path | None = None,
    masks: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Where a policy's actions come from: attention, interventions, PCA; into the folder `diagnosis` of each run.

    The samples are moments of the scripted expert's episodes on evaluation trials, the same for every policy, with the
    interaction mask that the simulator renders; or, with --probes, those of a folder that `agra probes` wrote.

    Args:
        policies: checkpoint or run folders, or names of policies that come with agra.
        simulator: the world that the samples come from.
        samples: how many, spread evenly over the four regimes.
        noises: draws of video and action noise for each sample.
        draws: background sets for each sample and noise.
        gallery: samples that get maps and pictures.
        maps: interventions of the sensitivity maps.
        layers: video layers to measure and picture; by default those that the action head reads.
        teacher: what hidden states are compared with; `own` is the recipe's, or else the packaged DINOv2.
        probes: a folder of samples instead of the simulator.
        masks: annotations of the samples' frames: COCO, CVAT or labelme.
        seed: decides the noise and the background sets.
        device: where the policies run.
    """
    from agra.diagnostics.instrument import DiagnosisConfig
    from agra.run import diagnose as run

    config = DiagnosisConfig(noises=noises, draws=draws, gallery=gallery, map_kinds=maps, layers=layers)
    for policy in policies:
        run(
            policy, simulator=simulator, samples=samples, seed=seed, device=device, config=config, teacher=teacher,
            probes=probes, masks=masks,
        )  # fmt: skip


def report(
    policies: Annotated[tuple[str, ...], tyro.conf.Positional],
    output: Path = Path("report.html"),
    studies: tuple[Path, ...] = (),
    rerun: Path | None = None,
) -> None:
    """One HTML page that lays runs side by side: training, evaluation, grounding, pictures.

    Args:
        policies: run folders or names of policies that come with agra; each gives what it holds of metrics.jsonl,
            results.jsonl and diagnosis/, and the metrics of the stages that it started from.
        output: the page.
        studies: folders of `agra study`.
        rerun: write the galleries as a .rrd recording for the Rerun viewer as well.
    """
    from agra.run import record
    from agra.run import report as run

    print(run(policies, output=output, studies=studies))
    if rerun is not None:
        print(record(policies, output=rerun))


@dataclass(frozen=True, kw_only=True)
class ProbesOptions:
    """Which moments become probe samples."""

    output: Path
    simulator: str | None = None
    """A world whose scripted expert is recorded, with masks; None takes the recipe's dataset, without masks."""
    samples: int = 24


def _probes(arguments: list[str]) -> None:
    """Write probe samples, and their frames as pictures to annotate: agra probes RECIPE --output DIR [--data.path ...]"""
    options, config = _recipe_arguments("probes", arguments, ProbesOptions)
    from agra.diagnostics.probe import save_samples
    from agra.examine import dataset_samples, probe_samples, write_pictures
    from agra.simulators.registry import make

    if options.simulator is None:
        found = dataset_samples(config, options.samples)
    else:
        world = make(options.simulator)
        try:
            found = probe_samples(world, options.samples, config)
        finally:
            world.close()
    save_samples(found, options.output)
    write_pictures(found, options.output / "pictures")
    print(options.output)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Which layers, and how the trained variants are judged."""

    output: Path
    over: Literal["alignment", "bridge"]
    """Fig. 10: each layer aligned alone. Fig. 11: each layer read alone."""
    layers: tuple[int, ...] | None = None
    """By default all that the recipe's action head reads."""
    init: str | None = None
    """What every variant starts from, say a run of the adapt stage."""
    simulator: str | None = "tabletop"
    """None leaves evaluation and diagnosis out."""
    limit: int | None = 10
    """Trials of each regime."""
    samples: int = 40
    """Samples of the diagnosis; 0 leaves it out."""
    device: str = "cpu"


def _study(arguments: list[str]) -> None:
    """Train, evaluate and diagnose one variant for every layer: agra study RECIPE --over alignment --output DIR"""
    options, config = _recipe_arguments("study", arguments, StudyOptions)
    from agra.study import Judgement, study

    judgement = Judgement(simulator=options.simulator, limit=options.limit, samples=options.samples)
    print(
        study(
            config, over=options.over, output=options.output, layers=options.layers, init=options.init,
            judgement=judgement, device=options.device,
        )
    )  # fmt: skip


# --- latency -----------------------------------------------------------------------------------------------------------


def bench_latency(
    subject: Annotated[str, tyro.conf.Positional],
    rounds: int = 50,
    batch: int = 1,
    compiled: bool = False,
    pool_future: int = 1,
    device: str = "cpu",
    output: Path | None = None,
) -> None:
    """Time an answer stage by stage, p50 and p95, the plain path, the fast one and its options in turn.

    Args:
        subject: a checkpoint or run folder, or a recipe's name: its policy with random weights and a known instruction.
        rounds: calls that count.
        batch: robots that are answered together.
        compiled: the fast path compiled too, on a GPU as CUDA graphs.
        pool_future: the fast path with this approximation too, see `agra serve`.
        device: where the policy runs, in the precision of its training.
        output: write the figures here, for machines.
    """
    from agra.latency import bench, paths
    from agra.recipes import RECIPES, compose
    from agra.training.stages import Stage

    config = compose(subject, Stage.JOINT, []) if subject in RECIPES else None
    ways = paths(pool_future=pool_future, compiled=compiled)
    bench(subject, config, ways, device=device, batch=batch, rounds=rounds, output=output)


# --- checkpoints that leave the machine ------------------------------------------------------------------------------


def export(policy: Annotated[str, tyro.conf.Positional], output: Path, ema: bool = False, half: bool = False) -> None:
    """Write a policy as one folder of whole safetensors with a model card, from whole or sharded checkpoints.

    Args:
        policy: a checkpoint or run folder.
        output: the new folder.
        ema: take the averaged weights.
        half: store the weights in float16.
    """
    from agra.hub import export as run

    print(run(policy, output, ema=ema, half=half))


def push(
    policy: Annotated[str, tyro.conf.Positional],
    name: Annotated[str, tyro.conf.Positional],
    public: bool = False,
    ema: bool = False,
) -> None:
    """Upload a policy to the model hub with a generated card.

    Args:
        policy: a checkpoint or run folder.
        name: owner/model.
        public: let everyone see it.
        ema: take the averaged weights.
    """
    from agra.hub import push as run

    print(run(policy, name, private=not public, ema=ema))


def pull(
    name: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    revision: str | None = None,
) -> None:
    """Download a policy from the model hub and check every file of it.

    Args:
        name: owner/model.
        output: folder for it.
        revision: a branch, tag or commit.
    """
    from agra.hub import pull as run

    print(run(name, output, revision=revision))


def _bound(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """`function` with the same signature, that returns a call to make later: parsing errors are not the command's."""

    @wraps(function)
    def later(*arguments: Any, **options: Any) -> Callable[[], None]:
        return partial(function, *arguments, **options)

    return later


def _command(function: Callable[..., None]) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        call = _from_flags(_bound(function), arguments, f"agra {function.__name__.replace('_', '-')}")
        call()

    run.__doc__ = function.__doc__
    return run


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "collect": _command(collect),
    "convert": _command(convert),
    "doctor": _command(doctor),
    "prepare": _prepare,
    "train": _train,
    "plan": _plan,
    "evaluate": _command(evaluate),
    "compare": _command(compare),
    "leaderboard": _command(leaderboard),
    "diagnose": _command(diagnose),
    "report": _command(report),
    "serve": _command(serve),
    "control": _command(control),
    "bench-latency": _command(bench_latency),
    "probes": _probes,
    "study": _study,
    "export": _command(export),
    "push": _command(push),
    "pull": _command(pull),
    "recipes": _command(recipes),
}


def _help() -> str:
    lines = [f"  {name:15}{(command.__doc__ or '').strip().splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: agra COMMAND [flags]\n\n" + "\n".join(lines) + "\n\n`agra COMMAND --help` lists a command's flags."


def _unknown(what: str, name: str, known: Sequence[str] | dict) -> str:
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f"unknown {what} {name!r}; did you mean {close[0]!r}? Known: {', '.join(names)}"


if __name__ == "__main__":
    main()
