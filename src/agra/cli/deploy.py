"""`agra serve`, `control`, `bench-latency`, `export`, `push` and `pull`. Heavy imports happen inside them."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from agra.cli.arguments import use_threads

if TYPE_CHECKING:
    from agra.serving.server.app import PolicySource
    from agra.types import Policy, Simulator


def serve(
    policy: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    groot_port: int | None = None,
    groot_camera: str = "ego_view",
    groot_version: Literal["n1.5", "n1.6"] = "n1.6",
    embodiment: str | None = None,
    allow_unauthenticated: bool = False,
    image_key: str = "observation/image",
    state_keys: tuple[str, ...] = ("observation/state",),
    prompt_key: str = "prompt",
    max_batch: int = 16,
    max_connections: int = 64,
    reload_interval: float | None = None,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    groot_allow_plaintext: bool = False,
    input_stretch: float = 10.0,
    fast: bool = True,
    compiled: bool = False,
    pool_future: int = 1,
    imagine: bool = False,
    known_instructions: bool = False,
    ready_file: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Serve a policy over openpi's websocket protocol. The variable AGRA_API_KEY sets a key that clients must send.

    SIGTERM finishes running requests and stops. SIGHUP loads the newest checkpoint. /healthz, /readyz and /metrics are on the
    same port.

    Args:
        policy: a checkpoint or run folder.
        host: address to listen on. Any but this machine's own needs AGRA_API_KEY or --allow-unauthenticated.
        port: port of the websocket server. 0 takes a free one.
        groot_port: serve GR00T's ZMQ protocol too, on this port.
        groot_camera: the camera's name there: video.NAME.
        groot_version: the format of get_modality_config there. Later clients read that of n1.6.
        embodiment: the robot of GR00T's clients, where the policy knows several.
        allow_unauthenticated: listen on a network without a key.
        image_key: the clients' key of the frame.
        state_keys: the clients' keys of the state. Several are joined in order.
        prompt_key: the clients' key of the instruction.
        max_batch: requests of different clients that are computed together.
        max_connections: largest number of clients.
        reload_interval: seconds between checks for a newer checkpoint in the run folder, which is then loaded.
        tls_certificate: PEM file. The address is then wss://.
        tls_key: PEM file of its private key.
        groot_allow_plaintext: with TLS, serve GR00T's protocol, which has none, on a network all the same. The key and the
            frames are then sent unencrypted.
        input_stretch: refuse states that lie further outside the training range than this many widths of it.
        fast: --no-fast runs the forward passes of training, for comparison.
        compiled: compile the model, on a GPU as CUDA graphs. Every batch size is compiled before the server is ready.
        pool_future: an approximation: squares of this many by this many tokens of the imagined frames become their mean
            before the guidance projector. 1 leaves them alone (docs/speed.md gives cost and gain of 2).
        imagine: allow clients to request the predicted video, which takes several answers' time.
        known_instructions: load no text encoder, and answer only the training instructions, whose tokens are in the
            checkpoint.
        ready_file: write the address as JSON here when the server accepts clients.
        device: the policy's device.
        threads: threads of torch. By default OMP_NUM_THREADS, or all cores.
    """
    import asyncio
    import json
    import logging
    import ssl

    from agra.files import write_text
    from agra.serving.protocol.messages import WireKeys
    from agra.serving.server.app import run
    from agra.serving.server.groot import GrootNames, GrootServer
    from agra.serving.server.service import Limits, PolicyService, check_key
    from agra.serving.server.websocket import LOOPBACK, WebsocketServer

    key = os.environ.get("AGRA_API_KEY")
    check_key(key)
    for name, value in (("--port", port), ("--groot-port", groot_port)):
        if value is not None and not 0 <= value < 65536:
            raise ValueError(f"{name} {value}: expected 0 to 65535")
    if host not in LOOPBACK and key is None and not allow_unauthenticated:
        raise ValueError(
            f"--host {host}: set AGRA_API_KEY, or use --allow-unauthenticated to let everyone on that network in"
        )
    if (tls_certificate is None) != (tls_key is None):
        raise ValueError("--tls-certificate and --tls-key belong together")
    if tls_certificate is not None and groot_port is not None and host not in LOOPBACK and not groot_allow_plaintext:
        raise ValueError(
            f"--groot-port {groot_port}: GR00T's protocol has no TLS, so the key would be sent unencrypted; use "
            "--groot-allow-plaintext to allow that, or leave one of the two out"
        )
    tls = None
    if tls_certificate is not None and tls_key is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(tls_certificate, tls_key)
    use_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("agra.serving.websockets").setLevel(logging.CRITICAL)  # invalid handshakes
    source = _policy_source(
        policy,
        device=device,
        fast=fast,
        compiled=compiled,
        pool_future=pool_future,
        imagines=imagine,
        known_instructions=known_instructions,
    )
    keys = WireKeys(image=image_key, state=state_keys, prompt=prompt_key)

    async def main() -> None:
        limits = Limits(max_batch=max_batch, max_connections=max_connections, input_stretch=input_stretch)
        service = PolicyService(source.load(), limits)
        server = WebsocketServer(service, host=host, port=port, keys=keys, api_key=key, tls=tls)
        groot = None
        if groot_port is not None:
            names = GrootNames(camera=groot_camera, version=groot_version)
            groot = GrootServer(service, host=host, port=groot_port, embodiment=embodiment, names=names, api_key=key)
        scheme = "ws" if tls is None else "wss"

        def started() -> None:
            address, groot_address = f"{scheme}://{host}:{server.port}", ""
            if groot is not None:
                groot_address = f"tcp://{host}:{groot.port}"
            print(
                " and ".join([f"serving {service.spec.name} on {address}", *filter(None, [groot_address])]), flush=True
            )
            if ready_file is not None:
                write_text(ready_file, json.dumps({"address": address, "groot_address": groot_address}) + "\n")

        await run(service, server, source, groot=groot, reload_interval=reload_interval, started=started)

    asyncio.run(main())


def _policy_source(path: Path, *, device: str, **options: Any) -> "PolicySource":
    from agra.checkpoints.folder import resolve
    from agra.policies.load import load_policy
    from agra.serving.server.app import PolicySource

    return PolicySource(load=partial(load_policy, path, device=device, **options), stamp=partial(resolve, path))


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
    device: str = "cpu",
) -> None:
    """Control the simulated robot in real time: the simulation does not wait for the policy.

    Args:
        policy: a checkpoint or run folder, or a server's address (ws://HOST:PORT).
        simulator: the simulator.
        executor: execution of chunks while the next one is computed.
        execute_steps: control steps after which the next chunk is requested.
        trial: number of the in-distribution trial to play.
        seconds: longest duration.
        latency: seconds of an answer in simulated time. By default real time and the real latency.
        max_age: seconds after its observation at which an action is no longer executed.
        stop_after: seconds of holding after which to stop.
        max_step: largest change of an action's number from one control step to the next.
        dry_run: decide, but send no command.
        record: record the episode as a LeRobot dataset here.
        device: the policy's device.
    """
    import math
    from contextlib import nullcontext

    from agra.serving.robot.control import ActionLimits, Watchdog
    from agra.serving.robot.control import control as run
    from agra.serving.robot.executors import DelayedInference, ThreadedInference, make_executor
    from agra.serving.robot.recorder import DatasetRecorder
    from agra.serving.robot.robots import SimulatedRobot
    from agra.simulators.registry import make

    env = make(simulator)
    try:
        trials = env.trials("in_distribution")
        if not 0 <= trial < len(trials):
            raise ValueError(f"--trial {trial}: expected 0 to {len(trials) - 1}")
        opened = open_policy(policy, env, None, device)
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
    answers = f"{len(report.delays)} answers after {max(report.delays, default=0)} control steps at most"
    print(
        f"{'success' if robot.succeeded else report.stopped or 'no success'} after {report.steps / env.fps:.1f} s: "
        f"{answers}; held {report.held}, clipped {report.clipped}, lost {report.errors}, late {report.overruns} "
        f"of {report.steps} steps"
    )
    if not report.delays:
        raise ConnectionError(
            f"{policy}: no answer came in {report.steps / env.fps:.1f} s; is the server running there?"
        )


def open_policy(policy: str, env: "Simulator", name: str | None, device: str, *, timeout: float = 10.0) -> "Policy":
    """`expert`, a server's address (with at most `timeout` seconds for an answer), or a checkpoint or run folder."""
    if policy == "expert":
        from agra.simulators.registry import expert

        return expert(env)
    if "://" in policy:
        from agra.serving.client import PolicyClient

        return PolicyClient(policy, api_key=os.environ.get("AGRA_API_KEY"), timeout=timeout)
    from agra.policies.load import load_policy

    return load_policy(policy, name=name, device=device)


def bench_latency(
    subject: Annotated[str, tyro.conf.Positional],
    rounds: int = 50,
    batch: int = 1,
    compiled: bool = False,
    pool_future: int = 1,
    device: str = "cpu",
    output: Path | None = None,
) -> None:
    """Time an answer stage by stage, p50 and p95, over the plain path, the fast one and its options in turn.

    Args:
        subject: a checkpoint or run folder, or a recipe's name: its policy with random weights and a known instruction.
        rounds: calls that count.
        batch: observations that are answered together.
        compiled: measure the compiled fast path too, on a GPU with CUDA graphs.
        pool_future: measure the fast path with this approximation too, see `agra serve`.
        device: the policy's device. It computes in the precision of its training.
        output: write the figures here, for machines.
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
        policy: a checkpoint or run folder.
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
        policy: a checkpoint or run folder.
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
