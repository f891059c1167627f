"""`agra evaluate`, `compare` and `leaderboard`."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from agra.cli.arguments import use_threads
from agra.cli.deploy import open_policy

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
    render: bool = True,
    by_task: bool = False,
    name: str | None = None,
    key_mapping: str | None = None,
    simulator_python: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Play a benchmark's trials and write one JSON line for each. Resumes after an interruption.

    Args:
        policy: a checkpoint or run folder, the name of a policy that comes with agra, a server's address
            (ws://HOST:PORT, or tcp:// for GR00T's protocol), or `expert` for the simulator's scripted expert.
        simulator: a registered simulator.
        regimes: the trial lists to play. By default all.
        output: results file. By default results.jsonl in the run's folder, outputs/NAME for a bundled policy.
        execute_steps: executed actions of each chunk before the next one is requested. 1 for the expert.
        max_steps: control steps of a trial. By default the benchmark's.
        termination: check for success after each step, or only after each chunk as GR00T N1.5's evaluation does.
        limit: play only this many trials of each regime, evenly spread.
        workers: processes that play side by side, each with a simulator and a policy. The episodes are the same for any
            number.
        videos: trials of each regime to record as mp4 beside the results, with the video that the policy predicted.
        render: render the camera. --no-render is for policies that use no image, such as the experts of Meta-World and LIBERO.
        by_task: print the counts of every task too.
        name: the policy's name in results. By default its folder's.
        key_mapping: keys of the messages of a server that is not agra's: a mapping's name or a JSON file, see
            docs/benchmarks.md.
        simulator_python: interpreter of the simulator's own environment. The policy is served from here and played there.
        device: the policy's device.
        threads: threads of torch in each process. By default OMP_NUM_THREADS, or all cores.
    """
    from agra.evaluation.protocols import Protocol, regime_trials
    from agra.evaluation.rollout import evaluate as run
    from agra.evaluation.tables import print_table, summary_table, task_table
    from agra.simulators.registry import make

    scripted, remote = policy == "expert", "://" in policy
    if (scripted or remote) and output is None:
        raise ValueError(f"--output: give a results file for {policy}")
    if policy.startswith("tcp://") and key_mapping is None:
        raise ValueError(f"--key-mapping: {policy} needs the keys of its messages, e.g. groot_gr1")
    if remote and name is None:
        raise ValueError(f"--name: give the name of the policy at {policy} in the results")
    if output is None:
        from agra.checkpoints.folder import artifact_dir

        output = artifact_dir(policy) / "results.jsonl"
    name = name or Path(policy).name
    protocol = Protocol(execute_steps=1 if scripted else execute_steps, max_steps=max_steps, termination=termination)
    if simulator_python is not None:
        settings: dict[str, Any] = {
            "simulator": simulator,
            "regimes": regimes,
            "output": output,
            "name": name,
            "limit": limit,
            "workers": workers,
            "videos": videos,
            "by_task": by_task,
            **vars(protocol),
        }
        serving = {"device": device, "threads": threads, "imagine": videos > 0}
        _evaluate_in_subprocess(policy, simulator_python, settings, serving)
        return
    options = {} if render else {"render": False}
    player = partial(_player, policy, simulator, options, name, key_mapping, device, threads)
    opened, env = (None, make(simulator, **options)) if workers > 1 else player()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        results = run(
            opened,
            env,
            regime_trials(env, regimes, limit=limit),
            output=output,
            protocol=protocol,
            videos=videos,
            workers=workers,
            make_player=player,
            policy_name=name,
            policy_settings={"key_mapping": key_mapping} if key_mapping else {},
        )
    finally:
        env.close()
    print_table(summary_table(results))
    if by_task:
        print_table(task_table(results))


def _player(
    policy: str,
    simulator: str,
    options: dict[str, Any],
    name: str,
    key_mapping: str | None,
    device: str,
    threads: int | None,
) -> "tuple[Policy, Simulator]":
    """The policy and the simulator of one process."""
    from agra.simulators.registry import make

    env = make(simulator, **options)
    if key_mapping is not None:
        from agra.serving.remote_policies import connect_policy, read_key_mapping

        return connect_policy(policy, read_key_mapping(key_mapping), api_key=os.environ.get("AGRA_API_KEY")), env
    if "://" not in policy:
        use_threads(threads)
    return open_policy(policy, env, name, device, timeout=120.0), env


def _evaluate_in_subprocess(policy: str, python: Path, evaluate: dict[str, Any], serve: dict[str, Any]) -> None:
    from agra.evaluation.remote import evaluate_in_subprocess

    if policy == "expert" or "://" in policy:
        raise ValueError(
            f"--simulator-python: {policy} needs no server here; run {python} -m agra.cli evaluate instead"
        )
    code = evaluate_in_subprocess(policy, python, _as_flags(evaluate), serve=_as_flags(serve))
    if code:
        raise SystemExit(code)


def _as_flags(options: dict[str, Any]) -> list[str]:
    """The flags of a function's arguments. None and False are left to their defaults."""
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
        from agra.diagnostics.report.grounding import print_grounding

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
    """Show results beside published ones on a benchmark, with their protocols.

    Args:
        results: results files of that benchmark.
        benchmark: the simulator's name.
    """
    from agra.evaluation.results import read_results
    from agra.evaluation.tables import leaderboard_table, print_table

    print_table(leaderboard_table([read_results(path) for path in results], benchmark))
