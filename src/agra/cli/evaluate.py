"""`agra evaluate`, `compare`, `leaderboard` and `demo`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from agra.types import ActionNoise, VideoNoise


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    simulator: str = "tabletop",
    regimes: tuple[str, ...] | None = None,
    tasks: tuple[str, ...] | None = None,
    output: Path | None = None,
    execute_steps: int | None = None,
    max_steps: int | None = None,
    termination: Literal["step", "chunk"] | None = None,
    action_noise: ActionNoise | None = None,
    video_noise: VideoNoise | None = None,
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
    shard: str | None = None,
    checkpoint_sha256: str | None = None,
    computed_on: str | None = None,
) -> None:
    """Play a benchmark's trials and write one JSON line for each. Resumes after an interruption.

    Args:
        policy: a checkpoint or run folder, the name of a bundled policy, a server's address (ws://HOST:PORT, or tcp://
            for GR00T's protocol), or `expert` for the simulator's scripted expert.
        simulator: a registered simulator.
        regimes: the trial lists to play. By default all.
        tasks: play the trials of these tasks only.
        output: results file. By default results.jsonl in the run's folder, outputs/NAME for a bundled policy.
        execute_steps: executed actions of each chunk before the next one is requested. By default 8, on robocasa_gr1
            16, and 1 for the expert.
        max_steps: control steps of a trial. By default the benchmark's.
        termination: check for success after each step, or only after each chunk as GR00T N1.5's evaluation does. By
            default after each step, on robocasa_gr1 after each chunk.
        action_noise: where the denoising of a chunk starts. random is the paper's, zero gives the policy's central
            answer. By default the one of the policy's recipe or server.
        video_noise: noise of a world action model's conditioning pass. random is the paper's, fixed is the same in
            every answer, zero is none. By default the one of the policy's recipe or server.
        limit: play only this many trials of each regime, evenly spread.
        workers: parallel processes, each with a simulator and a policy. The episodes are the same for any number.
        videos: trials of each regime to record as mp4 beside the results, with the policy's predicted video.
        render: render the camera. --no-render is for policies that use no image, such as the experts of Meta-World and
            LIBERO.
        by_task: print the success counts of every task too.
        name: the policy's name in the results. By default its folder's.
        key_mapping: message keys of a server of another package: a mapping's name or a JSON file, see
            docs/benchmarks.md.
        simulator_python: interpreter of the simulator's own environment. The policy is served from here and played
            there.
        device: the policy's device.
        threads: threads of torch in each process. By default OMP_NUM_THREADS, or all cores.
        shard: I/N plays part I, from 0, of N into a file of its own beside the output. `agra merge` joins them.
        checkpoint_sha256: checksum of the checkpoint behind a server, for the results. --simulator-python sets it.
        computed_on: device and precision of the policy behind a server, such as "cuda, bfloat16", for the results.
            --simulator-python sets it.
    """
    from dataclasses import replace

    from agra.evaluation.protocols import parse_shard
    from agra.evaluation.tables import group_table, print_table, summary_table, task_table
    from agra.simulation import checkpoint_of, device_and_precision, manifest_sha256, results_file, usual_protocol
    from agra.simulation import evaluate as run

    protocol = replace(usual_protocol(policy, simulator), max_steps=max_steps)
    if termination is not None:
        protocol = replace(protocol, termination=termination)
    if execute_steps is not None:
        if policy == "expert" and execute_steps != 1:
            raise ValueError(f"--execute-steps: the expert is asked at every step, got {execute_steps}; leave it out")
        protocol = replace(protocol, execute_steps=execute_steps)
    if simulator_python is not None:
        for flag, value in (("--checkpoint-sha256", checkpoint_sha256), ("--computed-on", computed_on)):
            if value is not None:
                raise ValueError(f"{flag}: expected none with --simulator-python, which sets it")
        if key_mapping is not None:
            raise ValueError(
                "--key-mapping: expected none with --simulator-python, which serves a checkpoint of agra; run agra evaluate "
                "ADDRESS --key-mapping in the simulator's own environment"
            )
        output, name = results_file(policy, output, name)
        noise, checkpoint = {"action_noise": action_noise, "video_noise": video_noise}, checkpoint_of(policy)
        settings: dict[str, Any] = {
            "simulator": simulator,
            "regimes": regimes,
            "tasks": tasks,
            "output": output,
            "name": name,
            "limit": limit,
            "workers": workers,
            "videos": videos,
            "no_render": not render,
            "by_task": by_task,
            "shard": shard,
            "checkpoint_sha256": None if checkpoint is None else manifest_sha256(checkpoint),
            "computed_on": None if checkpoint is None else device_and_precision(checkpoint, device),
            **noise,
            **vars(protocol),
        }
        serving = {"device": device, "threads": threads, "imagine": videos > 0, **noise}
        _evaluate_in_subprocess(policy if checkpoint is None else str(checkpoint), simulator_python, settings, serving)
        return
    results = run(
        policy,
        simulator,
        output=output,
        name=name,
        regimes=regimes,
        tasks=tasks,
        limit=limit,
        protocol=protocol,
        videos=videos,
        workers=workers,
        simulator_options={} if render else {"render": False},
        key_mapping=key_mapping,
        device=device,
        threads=threads,
        action_noise=action_noise,
        video_noise=video_noise,
        shard=None if shard is None else parse_shard(shard),
        checkpoint_sha256=checkpoint_sha256,
        computed_on=computed_on,
    )
    print_table(summary_table(results))
    groups = group_table(results)
    if groups is not None:
        print_table(groups)
    if by_task:
        print_table(task_table(results))


def _evaluate_in_subprocess(policy: str, python: Path, evaluate: dict[str, Any], serve: dict[str, Any]) -> None:
    from agra.evaluation.remote import evaluate_in_subprocess

    if policy == "expert" or "://" in policy:
        raise ValueError(
            f"--simulator-python: {policy} needs no server; run this instead: {python} -m agra.cli evaluate {policy}"
        )
    code = evaluate_in_subprocess(policy, python, _as_flags(evaluate), serve=_as_flags(serve))
    if code:
        raise SystemExit(code)


def _as_flags(options: dict[str, Any]) -> list[str]:
    """The flags of a function's arguments. None and False are left out."""
    flags: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def merge(output: Annotated[Path, tyro.conf.Positional], workers: int = 2) -> None:
    """Join the shards of `agra evaluate --shard` into a results file, or those of `agra collect --shard` into a dataset.

    Args:
        output: the output that was given to the shards: a results file (.jsonl), or the folder of a dataset.
        workers: number of processes that record replacements of failed demonstrations.
    """
    if output.suffix == ".jsonl":
        from agra.evaluation.results import merge_results
        from agra.evaluation.tables import print_table, summary_table

        print_table(summary_table(merge_results(output)))
        return
    from agra.cli.data import print_collected
    from agra.evaluation.collect import merge_collection

    print_collected(merge_collection(output, workers=workers))


def compare(a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional]) -> None:
    """Compare two policies on the same trials (success, difference, McNemar's exact test) or samples of their diagnoses.

    Args:
        a: a results file, or a folder of `agra diagnose`.
        b: another file or folder, with the same trials or samples.
    """
    if (a / "diagnosis.json").is_file() or (b / "diagnosis.json").is_file():
        from agra.diagnostics.record import read_diagnosis
        from agra.diagnostics.report.grounding_section import print_grounding

        diagnoses = [read_diagnosis(folder) for folder in (a, b)]
        print_grounding([(i, str(d.header["policy"]), d) for i, d in enumerate(diagnoses)])
        return
    from agra.evaluation.results import compare as compare_results
    from agra.evaluation.results import read_results
    from agra.evaluation.tables import comparison_table, print_table

    print_table(comparison_table(compare_results(read_results(a), read_results(b))))


def leaderboard(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), benchmark: str = "robocasa_gr1"
) -> None:
    """Show results, measured rows and published averages on a benchmark, with their protocols.

    On the tabletop, where nothing is published, compare the methods that come with agra (docs/methods.md).

    Args:
        results: results files of that benchmark.
        benchmark: the simulator's name.
    """
    from agra.evaluation.measured import measured
    from agra.evaluation.published import PUBLISHED
    from agra.evaluation.results import read_results
    from agra.evaluation.tables import leaderboard_table, methods_tables, print_table

    own, methods = [read_results(path) for path in results], measured(benchmark)
    if methods and benchmark not in {row.benchmark for row in PUBLISHED}:
        tables = methods_tables(methods, own)
    else:
        of_rows = [played for row in methods for played in row.results.values()]
        tables = [leaderboard_table([*of_rows, *own], benchmark)]
    for table in tables:
        print_table(table)


def demo(
    policies: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tabletop-wam", "tabletop-agra"),
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Open a browser page that shows policies side by side on the tabletop.

    You can move objects and mask the image while they act. Needs the extra `demo`. See docs/demo.md.

    Args:
        policies: checkpoint or run folders, names of bundled policies, servers' addresses (ws://HOST:PORT), or `expert`.
        host: address to listen on. 0.0.0.0 lets other machines in.
        port: port to listen on. By default the first free one from 7860.
        browser: open the page in the default browser.
        device: the policies' device.
        threads: threads of torch. By default OMP_NUM_THREADS, or all cores.
    """
    from agra.api import make_demo
    from agra.cli.arguments import use_threads

    use_threads(threads)
    make_demo(policies, device=device).launch(server_name=host, server_port=port, inbrowser=browser)
