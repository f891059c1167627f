"""`agra serve`, `control`, `bench-latency`, `export`, `push` and `pull`. Heavy imports happen inside them."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from agra.cli.arguments import use_threads
from agra.serving.server.config import ServeConfig
from agra.types import ActionNoise, VideoNoise


def serve(
    policy: Annotated[Path, tyro.conf.Positional],
    config: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig(),  # noqa: B008
    fast: bool = True,
    compiled: bool = False,
    pool_future: int = 1,
    imagine: bool = False,
    known_instructions: bool = False,
    action_noise: ActionNoise | None = None,
    video_noise: VideoNoise | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Serve a policy over openpi's websocket protocol. The variable AGRA_API_KEY sets a key that clients must send.

    SIGTERM finishes running requests and stops. SIGHUP loads the newest checkpoint. /healthz, /readyz and /metrics are
    on the same port.

    Args:
        policy: a checkpoint or run folder, or the name of a bundled policy.
        config: addresses, keys, limits, TLS and GR00T's protocol.
        fast: --no-fast runs the forward passes of training, for comparison.
        compiled: compile the model, on a GPU as CUDA graphs. Every batch size is compiled before the server is ready.
        pool_future: an approximation: average squares of this many by this many tokens of the predicted frames before
            the guidance projector. 1 leaves it out (docs/speed.md gives cost and gain of 2).
        imagine: allow clients to request the predicted video, which takes as long as several responses.
        known_instructions: load no text encoder, and answer only the training instructions, whose tokens are in the
            checkpoint.
        action_noise: where the denoising of a chunk starts. random is the paper's, zero gives the policy's central
            answer. By default the one of the policy's recipe.
        video_noise: noise of a world action model's conditioning pass. random is the paper's, fixed is the same in
            every answer, zero is none. By default the one of the policy's recipe.
        device: the policy's device.
        threads: threads of torch. By default OMP_NUM_THREADS, or all cores.
    """
    import asyncio
    import logging

    from agra.checkpoints.folder import resolve
    from agra.policies.load import load_policy
    from agra.serving.server.app import PolicySource
    from agra.serving.server.app import serve as run

    use_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("agra.serving.websockets").setLevel(logging.CRITICAL)  # invalid handshakes
    load = partial(
        load_policy,
        policy,
        device=device,
        fast=fast,
        compiled=compiled,
        pool_future=pool_future,
        imagines=imagine,
        known_instructions=known_instructions,
        action_noise=action_noise,
        video_noise=video_noise,
    )
    source = PolicySource(load=load, stamp=partial(resolve, policy))
    asyncio.run(run(config, source, api_key=os.environ.get("AGRA_API_KEY")))


def control(
    policy: Annotated[str, tyro.conf.Positional],
    simulator: str = "tabletop",
    executor: Literal["synchronous", "asynchronous", "ensemble", "rtc"] = "rtc",
    execute_steps: int = 8,
    trial: int = 0,
    seconds: float = 10.0,
    latency: float | None = None,
    max_age: float = 3.0,
    stop_after: float | None = None,
    max_step: float | None = None,
    dry_run: bool = False,
    record: Path | None = None,
    action_noise: ActionNoise | None = None,
    video_noise: VideoNoise | None = None,
    device: str = "cpu",
) -> None:
    """Control the simulated robot in real time: the simulation does not wait for the policy.

    Args:
        policy: a checkpoint or run folder, the name of a bundled policy, or a server's address (ws://HOST:PORT).
        simulator: the simulator.
        executor: what the robot does while the next chunk is computed.
        execute_steps: control steps after which the next chunk is requested.
        trial: number of the in-distribution trial to play.
        seconds: time limit of the run, in seconds.
        latency: latency of the policy in seconds of simulated time. By default real time and the actual latency.
        max_age: largest age of an action's observation, seconds. The robot holds instead of executing an older action.
        stop_after: seconds of holding after which the run stops.
        max_step: largest change of each action dimension from one control step to the next.
        dry_run: decide, but send no command.
        record: record the episode as a LeRobot dataset here.
        action_noise: where the denoising of a chunk starts, see `agra serve`.
        video_noise: noise of a world action model's conditioning pass, see `agra serve`.
        device: the policy's device.
    """
    import math
    from contextlib import nullcontext

    from agra.serving.robot.control import ActionLimits, Watchdog
    from agra.serving.robot.control import control as run
    from agra.serving.robot.executors import DelayedInference, ThreadedInference, make_executor
    from agra.serving.robot.recorder import DatasetRecorder
    from agra.serving.robot.robots import SimulatedRobot
    from agra.simulation import make_simulator, open_policy

    env = make_simulator(simulator)
    try:
        trials = env.trials("in_distribution")
        if not 0 <= trial < len(trials):
            raise ValueError(f"--trial {trial}: expected 0 to {len(trials) - 1}")
        opened = open_policy(policy, env, device=device, action_noise=action_noise, video_noise=video_noise)
        delayed = None if latency is None else math.ceil(latency * env.fps)
        inference = ThreadedInference(opened) if delayed is None else DelayedInference(opened, delayed)
        robot = SimulatedRobot(env, trials[trial])
        robot.connect()
        with DatasetRecorder(record, robot, fps=env.fps) if record is not None else nullcontext() as recorder:
            report = run(
                robot,
                make_executor(executor, inference, execute_steps=execute_steps),
                fps=env.fps,
                steps=max(1, round(seconds * env.fps)),
                seed=trials[trial].seed,
                limits=ActionLimits(max_step=max_step),
                watchdog=Watchdog(max_age=max_age, stop_after=stop_after),
                dry_run=dry_run,
                real_time=delayed is None,
                recorder=recorder,
                until=lambda: robot.succeeded,
            )
        if isinstance(inference, ThreadedInference):
            inference.close()
        robot.disconnect()
    finally:
        env.close()
    answers = f"{len(report.delays)} answers after at most {max(report.delays, default=0)} control steps"
    print(
        f"{'success' if robot.succeeded else report.stopped or 'no success'} after {report.steps / env.fps:.1f} s: "
        f"{answers}; held {report.held}, clipped {report.clipped}, lost {report.errors}, late {report.overruns} "
        f"of {report.steps} steps"
    )
    if not report.delays:
        raise ConnectionError(
            f"{policy}: no answer in {report.steps / env.fps:.1f} s; check that the server is running"
        )


def bench_latency(
    subject: Annotated[str, tyro.conf.Positional],
    rounds: int = 50,
    batch: int = 1,
    compiled: bool = False,
    pool_future: int = 1,
    device: str = "cpu",
    output: Path | None = None,
) -> None:
    """Measure the latency of each stage of a policy call (p50, p95), for the plain path, the fast path and its options.

    Args:
        subject: a checkpoint or run folder, the name of a bundled policy, or a recipe's name: its policy with random
            weights and a known instruction.
        rounds: timed calls of each path.
        batch: observations that are answered together.
        compiled: measure the compiled fast path too, on a GPU with CUDA graphs.
        pool_future: measure the fast path with this approximation too, see `agra serve`.
        device: the policy's device. It computes in the precision of its training.
        output: JSON file of the results.
    """
    from agra.policies.latency import bench, paths
    from agra.recipes import RECIPES, compose
    from agra.stages import Stage

    config = compose(subject, Stage.JOINT, []) if subject in RECIPES else None
    compared = paths(pool_future=pool_future, compiled=compiled)
    bench(subject, config, compared, device=device, batch=batch, rounds=rounds, output=output)


def export(policy: Annotated[str, tyro.conf.Positional], output: Path, ema: bool = False, half: bool = False) -> None:
    """Write a policy as one folder of whole safetensors with a model card, from whole or sharded checkpoints.

    Args:
        policy: a checkpoint or run folder, or the name of a bundled policy.
        output: the new folder.
        ema: take the averaged weights.
        half: store the weights in float16.
    """
    from agra.policies.export import export as run

    print(run(policy, output, ema=ema, half=half))


def push(
    policy: Annotated[str, tyro.conf.Positional],
    name: Annotated[str, tyro.conf.Positional],
    public: bool = False,
    ema: bool = False,
) -> None:
    """Upload a policy to the model hub with a generated card.

    Args:
        policy: a checkpoint or run folder, or the name of a bundled policy.
        name: owner/model.
        public: make it visible to everyone.
        ema: take the averaged weights.
    """
    from agra.policies.export import push as run

    print(run(policy, name, private=not public, ema=ema))


def pull(
    name: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    revision: str | None = None,
) -> None:
    """Download a policy from the model hub and check every file of it.

    Args:
        name: owner/model.
        output: its new folder.
        revision: a branch, tag or commit.
    """
    from agra.policies.export import pull as run

    print(run(name, output, revision=revision))
