"""`agra evaluate`, `compare` and `leaderboard`."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from agra.cli_robot import load_policy, use_threads

if TYPE_CHECKING:
    from agra.types import Policy, Simulator


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    simulator: str = "tabletop",
    regimes: tuple[str, ...] | None = None,
    output: Path | None = None,
    execute_steps: int = 8,
    max_steps: int | None = None,
    termination: Literal["step", "chunk"] = "step",
    limit: int | None = None,
    workers: int = 1,
    videos: int = 1,
    blind: bool = False,
    by_task: bool = False,
    name: str | None = None,
    keys: str | None = None,
    python: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Play a benchmark's trials and write one JSON line for each. Interrupted, it goes on where it was.

    Args:
        policy: a checkpoint or run folder, the name of a policy that comes with agra, a server's address
            (ws://HOST:PORT, or tcp:// on GR00T's wire), or `expert` for the simulator's scripted expert.
        simulator: a registered simulator.
        regimes: which of its trial lists to play; by default all.
        output: results file; by default results.jsonl in the run's folder, outputs/NAME for a policy of agra's own.
        execute_steps: actions executed of each chunk before the policy is asked again; the expert's is 1.
        max_steps: control steps of a trial; by default the benchmark's.
        termination: look for success after each step, or only after each chunk as GR00T N1.5's evaluation does.
        limit: play only so many trials of each regime, evenly spread.
        workers: processes that play side by side, each with a simulator and a policy; the episodes are the same for any
            number.
        videos: trials of each regime to record as mp4 beside the results, with the video that the policy expected.
        blind: render nothing, for policies that do not look, such as the experts of Meta-World and LIBERO.
        by_task: print the counts of every task too.
        name: the policy's name in results; by default its folder's.
        keys: which key carries what on the wire of a server that is not agra's: a table's name or a JSON file, see
            docs/benchmarks.md.
        python: interpreter of the simulator's own environment: the policy is served from here and played from there.
        device: where the policy runs.
        threads: threads of torch in each process; by default OMP_NUM_THREADS, or all cores.
    """
    from agra.evaluation.protocols import Protocol, regime_trials
    from agra.evaluation.rollout import evaluate as run
    from agra.evaluation.tables import print_table, summary_table, task_table
    from agra.simulators.registry import make

    scripted, remote = policy == "expert", "://" in policy
    if (scripted or remote) and output is None:
        raise ValueError(f"--output: give a results file for {policy}")
    if policy.startswith("tcp://") and keys is None:
        raise ValueError(f"--keys: say which key carries what on the wire of {policy}, e.g. groot_gr1")
    if remote and name is None:
        raise ValueError(f"--name: say what the policy at {policy} is called in the results")
    if output is None:
        from agra.training.checkpoint import home

        output = home(policy) / "results.jsonl"
    name = name or Path(policy).name
    protocol = Protocol(execute_steps=1 if scripted else execute_steps, max_steps=max_steps, termination=termination)
    if python is not None:
        given: dict[str, Any] = {
            "simulator": simulator, "regimes": regimes, "output": output, "name": name, "limit": limit, "workers": workers,
            "videos": videos, "by_task": by_task, **vars(protocol),
        }  # fmt: skip
        _evaluate_apart(policy, python, given, {"device": device, "threads": threads, "imagine": videos > 0})
        return
    options = {"blind": True} if blind else {}
    player = partial(_player, policy, simulator, options, name, keys, device, threads)
    acting, world = (None, make(simulator, **options)) if workers > 1 else player()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        results = run(
            acting,
            world,
            regime_trials(world, regimes, limit=limit),
            output=output,
            protocol=protocol,
            videos=videos,
            workers=workers,
            make_player=player,
            policy_name=name,
            policy_settings={"wire_keys": keys} if keys else {},
        )
    finally:
        world.close()
    print_table(summary_table(results))
    if by_task:
        print_table(task_table(results))


def _player(
    policy: str, simulator: str, options: dict[str, Any], name: str, keys: str | None, device: str, threads: int | None
) -> "tuple[Policy, Simulator]":
    """What one process plays with."""
    from agra.simulators.registry import make

    world = make(simulator, **options)
    if keys is not None:
        from agra.serving.foreign import connect_policy, read_table

        return connect_policy(policy, read_table(keys), api_key=os.environ.get("AGRA_API_KEY")), world
    if "://" not in policy:
        use_threads(threads)
    return load_policy(policy, world, name, device, timeout=120.0), world


def _evaluate_apart(policy: str, python: Path, evaluate: dict[str, Any], serve: dict[str, Any]) -> None:
    from agra.apart import evaluate_apart

    if policy == "expert" or "://" in policy:
        raise ValueError(f"--python: {policy} needs no server here; run {python} -m agra.cli evaluate instead")
    code = evaluate_apart(policy, python, _as_flags(evaluate), serve=_as_flags(serve))
    if code:
        raise SystemExit(code)


def _as_flags(options: dict[str, Any]) -> list[str]:
    """Command line of a function's arguments; what is None or False is left to its default."""
    flags: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def compare(a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional]) -> None:
    """Pair two policies' trials (success, its difference, McNemar's exact test) or the samples of their diagnoses.

    Args:
        a: a results file, or a folder of `agra diagnose`.
        b: another one, over the same trials or samples.
    """
    if (a / "diagnosis.json").is_file() or (b / "diagnosis.json").is_file():
        from agra.diagnostics.record import read_diagnosis
        from agra.diagnostics.report_grounding import print_grounding

        both = [read_diagnosis(folder) for folder in (a, b)]
        print_grounding([(i, str(d.header["policy"]), d) for i, d in enumerate(both)])
        return
    from agra.evaluation.results import compare as pair
    from agra.evaluation.results import read_results
    from agra.evaluation.tables import comparison_table, print_table

    print_table(comparison_table(pair(read_results(a), read_results(b))))


def leaderboard(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), benchmark: str = "robocasa_gr1"
) -> None:
    """Results beside what others have published on a benchmark, with the protocols that tell them apart.

    Args:
        results: results files of that benchmark.
        benchmark: the simulator's name.
    """
    from agra.evaluation.results import read_results
    from agra.evaluation.tables import leaderboard_table, print_table

    print_table(leaderboard_table([read_results(path) for path in results], benchmark))
