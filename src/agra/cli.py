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
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from agra.config import RunConfig
    from agra.types import Policy, Simulator

REGIME_NAMES = Literal["in_distribution", "semantic", "instance", "attribute"]


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
    except (ValueError, OSError, ImportError) as error:
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
        parallel: ParallelConfig = field(default_factory=ParallelConfig)
        device: str = "cpu"
        """cpu or cuda; under torchrun each process takes the GPU of its local rank."""
        threads: int | None = None
        """Threads of torch; by default OMP_NUM_THREADS, or all cores."""

    options, config = _recipe_arguments("train", arguments, TrainOptions)
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
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


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The machines that a run is planned for."""

    gpus: int
    gpu_memory: float = 80.0
    """GB of each GPU."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    shards: int | None = None
    """GPUs that hold one copy of the model between them; by default all."""
    utilisation: float = 0.35
    """Share of the GPU's peak that a step is assumed to reach."""
    price: float = 0.0
    """Of a GPU for an hour."""


def _plan(arguments: list[str]) -> None:
    """Say before launch what fits: agra plan RECIPE --gpus 8 --gpu-memory 80 [--stage joint] [--with PRESET ...]"""
    options, config = _recipe_arguments("plan", arguments, PlanOptions)
    from agra.planner import PEAK_FLOPS, describe, plan

    found = plan(
        config,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
        shards=options.shards,
        peak=PEAK_FLOPS[options.gpu],
        utilisation=options.utilisation,
        price=options.price,
    )
    print(describe(found, config, gpus=options.gpus, gpu_memory=options.gpu_memory))
    if found.hours == float("inf"):
        raise SystemExit(1)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How the frozen features are computed."""

    device: str = "cpu"


def _prepare(arguments: list[str]) -> None:
    """Cache what frozen networks compute for a recipe: agra prepare RECIPE --data.path DATASET [--stage adapt]"""
    options, config = _recipe_arguments("prepare", arguments, PrepareOptions)
    from agra.run import prepare

    for folder in prepare(config, device=options.device):
        print(folder)


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


# --- evaluate and compare --------------------------------------------------------------------------------------------


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    simulator: str = "tabletop",
    regimes: tuple[REGIME_NAMES, ...] = ("in_distribution", "semantic", "instance", "attribute"),
    output: Path | None = None,
    execute_steps: int = 8,
    limit: int | None = None,
    videos: int = 1,
    name: str | None = None,
    device: str = "cpu",
) -> None:
    """Play the trials of C.2.2 and write one JSON line for each. Interrupted, it goes on where it was.

    Args:
        policy: a checkpoint or run folder, or `expert` for the simulator's scripted expert.
        simulator: a registered simulator.
        regimes: which of the four regimes to play.
        output: results file; by default results.jsonl in the run's folder.
        execute_steps: actions executed of each chunk before the policy is asked again.
        limit: play only so many trials of each regime, evenly spread.
        videos: trials of each regime to record as mp4 beside the results.
        name: the policy's name in results; by default its folder's.
        device: where the policy runs.
    """
    from agra.evaluation.protocols import Protocol, regime_trials
    from agra.evaluation.results import print_summary, read_results
    from agra.evaluation.rollout import evaluate as run
    from agra.simulators.registry import make

    world = make(simulator)
    try:
        acting = _policy(policy, world, name, device)
        if output is None:
            if policy == "expert":
                raise ValueError("--output: give a results file for the expert")
            output = Path(policy) / "results.jsonl"
        trials = regime_trials(world, regimes, limit=limit)
        protocol = Protocol(execute_steps=1 if policy == "expert" else execute_steps)
        run(
            acting,
            world,
            trials,
            output=output,
            protocol=protocol,
            videos=videos,
            policy_name=name or ("expert" if policy == "expert" else Path(policy).name),
        )
    finally:
        world.close()
    print_summary(read_results(output))


def _policy(policy: str, world: "Simulator", name: str | None, device: str) -> "Policy":
    if policy == "expert":
        from agra.simulators.registry import expert

        return expert(world)
    from agra.policy import WAMPolicy

    return WAMPolicy.load(policy, name=name, device=device)


def compare(a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional]) -> None:
    """Pair two policies' trials: success side by side, differences, McNemar's exact test.

    Args:
        a: a results file.
        b: another one, over the same trials.
    """
    from agra.evaluation.results import compare as pair
    from agra.evaluation.results import print_comparison, read_results

    print_comparison(pair(read_results(a), read_results(b)))


# --- diagnose and report ---------------------------------------------------------------------------------------------


def diagnose(
    policies: Annotated[tuple[Path, ...], tyro.conf.Positional],
    simulator: str = "tabletop",
    samples: int = 40,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Where a policy's actions come from: attention, interventions, PCA; into the folder `diagnosis` of each run.

    The samples are moments of the scripted expert's episodes on evaluation trials, the same for every policy, with the
    interaction mask that the simulator renders.

    Args:
        policies: checkpoint or run folders.
        simulator: the world that the samples come from.
        samples: how many, spread evenly over the four regimes.
        seed: decides the noise and the background sets.
        device: where the policies run.
    """
    from agra.run import diagnose as run

    for policy in policies:
        run(policy, simulator=simulator, samples=samples, seed=seed, device=device)


def report(
    policies: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path = Path("report.html"),
) -> None:
    """One HTML page that lays runs side by side: training, evaluation, grounding, pictures.

    Args:
        policies: run folders; each gives what it holds of metrics.jsonl, results.jsonl and diagnosis/, and the
            metrics of the stages that it started from.
        output: the page.
    """
    from agra.run import report as run

    print(run(policies, output=output))


# --- checkpoints that leave the machine ------------------------------------------------------------------------------


def export(policy: Annotated[Path, tyro.conf.Positional], output: Path, ema: bool = False) -> None:
    """Write a policy as one folder of whole safetensors with a model card, from whole or sharded checkpoints.

    Args:
        policy: a checkpoint or run folder.
        output: the new folder.
        ema: take the averaged weights.
    """
    from agra.hub import export as run

    print(run(policy, output, ema=ema))


def push(
    policy: Annotated[Path, tyro.conf.Positional],
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
        call = _from_flags(_bound(function), arguments, f"agra {function.__name__}")
        call()

    run.__doc__ = function.__doc__
    return run


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "collect": _command(collect),
    "prepare": _prepare,
    "train": _train,
    "plan": _plan,
    "evaluate": _command(evaluate),
    "compare": _command(compare),
    "diagnose": _command(diagnose),
    "report": _command(report),
    "export": _command(export),
    "push": _command(push),
    "pull": _command(pull),
    "recipes": _command(recipes),
}


def _help() -> str:
    lines = [f"  {name:10}{(command.__doc__ or '').strip().splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: agra COMMAND [flags]\n\n" + "\n".join(lines) + "\n\n`agra COMMAND --help` lists a command's flags."


def _unknown(what: str, name: str, known: Sequence[str] | dict) -> str:
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0)
    return f"unknown {what} {name!r}; did you mean {close[0]!r}? Known: {', '.join(names)}"


if __name__ == "__main__":
    main()
