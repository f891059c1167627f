"""The commands that bring a policy to a robot: agra serve and agra control. Heavy imports happen inside them."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from agra.serving.app import Source
    from agra.types import Policy, Simulator


def serve(
    policy: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    groot_port: int | None = None,
    groot_camera: str = "ego_view",
    groot_version: Literal["n1.5", "n1.6"] = "n1.6",
    embodiment: str | None = None,
    without_key: bool = False,
    image_key: str = "observation/image",
    state_keys: tuple[str, ...] = ("observation/state",),
    prompt_key: str = "prompt",
    max_batch: int = 16,
    max_connections: int = 64,
    watch: float | None = None,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    plain: bool = False,
    compiled: bool = False,
    pool_future: int = 1,
    imagine: bool = False,
    known_instructions: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Serve a policy on openpi's websocket wire; the variable AGRA_API_KEY sets a key that clients must send.

    SIGTERM finishes what is running and stops, SIGHUP loads the newest checkpoint. /healthz, /readyz and /metrics are
    on the same port.

    Args:
        policy: a checkpoint or run folder.
        host: address to listen on; any but this machine's own needs AGRA_API_KEY or --without-key.
        port: port of the websocket wire; 0 takes a free one.
        groot_port: serve GR00T's ZMQ wire too, on this port.
        groot_camera: the camera's name there: video.NAME.
        groot_version: the form in which get_modality_config answers there; later clients read that of n1.6.
        embodiment: which robot GR00T's clients are, where the policy knows several.
        without_key: listen on a network without a key.
        image_key: what clients call the frame.
        state_keys: what clients call the state; several are joined in order.
        prompt_key: what clients call the instruction.
        max_batch: requests of different clients that are computed together.
        max_connections: clients at a time.
        watch: look every so many seconds for a newer checkpoint in the run folder and swap to it.
        tls_certificate: PEM file; the wire is then wss://.
        tls_key: PEM file of its private key.
        plain: without the fast path; for comparison.
        compiled: compile the model, on a GPU as CUDA graphs; every batch size is compiled before the server is ready.
        pool_future: an approximation: squares of so many by so many tokens of the imagined frames become their mean before
            the guidance projector; 1 leaves them alone (docs/speed.md says what 2 costs and saves).
        imagine: clients may ask for the video that the policy expects, which takes several answers' time.
        known_instructions: load no text encoder and answer the training instructions only, whose tokens lie beside the
            weights.
        device: where the policy runs.
        threads: threads of torch; by default OMP_NUM_THREADS, or all cores.
    """
    import asyncio
    import logging
    import ssl

    from agra.serving.app import run
    from agra.serving.groot import GrootNames, GrootServer
    from agra.serving.messages import WireKeys
    from agra.serving.server import WebsocketServer
    from agra.serving.service import Limits, PolicyService

    key = os.environ.get("AGRA_API_KEY")
    if host not in ("127.0.0.1", "::1", "localhost") and key is None and not without_key:
        raise ValueError(f"--host {host}: set AGRA_API_KEY, or say --without-key to let everyone on that network in")
    if (tls_certificate is None) != (tls_key is None):
        raise ValueError("--tls-certificate and --tls-key belong together")
    tls = None
    if tls_certificate is not None and tls_key is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(tls_certificate, tls_key)
    use_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("agra.serving.websockets").setLevel(logging.CRITICAL)  # strangers' broken handshakes
    options = {"fast": not plain, "compiled": compiled, "pool_future": pool_future, "imagines": imagine}
    options["known_instructions"] = known_instructions
    source = _policy_source(policy, device=device, **options)
    keys = WireKeys(image=image_key, state=state_keys, prompt=prompt_key)

    async def main() -> None:
        limits = Limits(max_batch=max_batch, max_connections=max_connections)
        service = PolicyService(source.load(), limits)
        server = WebsocketServer(service, host=host, port=port, keys=keys, api_key=key, tls=tls)
        groot = None
        if groot_port is not None:
            names = GrootNames(camera=groot_camera, version=groot_version)
            groot = GrootServer(service, host=host, port=groot_port, embodiment=embodiment, names=names, api_key=key)
        scheme = "ws" if tls is None else "wss"

        def started() -> None:
            also = f" and tcp://{host}:{groot.port}" if groot is not None else ""
            print(f"serving {service.spec.name} on {scheme}://{host}:{server.port}{also}", flush=True)

        await run(service, server, source, groot=groot, watch_every=watch, started=started)

    asyncio.run(main())


def _policy_source(path: Path, *, device: str, **options: Any) -> "Source":
    from agra.policy import WAMPolicy
    from agra.serving.app import Source
    from agra.training.checkpoint import resolve

    return Source(load=partial(WAMPolicy.load, path, device=device, **options), stamp=partial(resolve, path))


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
    """Let a policy move the tabletop's robot in real time: the world does not wait for it.

    Args:
        policy: a checkpoint or run folder, or a server's address (ws://HOST:PORT).
        simulator: the world.
        executor: how chunks are executed while the next one is computed.
        execute_steps: control steps after which the next chunk is asked for.
        trial: number of the in-distribution trial to play.
        seconds: how long, at most.
        latency: seconds that an answer takes, in simulated time; by default real time and what it really takes.
        max_age: seconds after its observation at which an action is not executed any more.
        stop_after: seconds of holding after which to give up.
        max_step: largest change of an action's number from one control step to the next.
        dry_run: decide, but command nothing.
        record: write what happened as a LeRobot dataset here.
        device: where the policy runs.
    """
    import math
    from contextlib import nullcontext

    from agra.serving.control import ActionLimits, Watchdog
    from agra.serving.control import control as run
    from agra.serving.executors import DelayedInference, ThreadedInference, make_executor
    from agra.serving.recorder import DatasetRecorder
    from agra.serving.robots import SimulatedRobot
    from agra.simulators.registry import make

    world = make(simulator)
    try:
        trials = world.trials("in_distribution")
        if not 0 <= trial < len(trials):
            raise ValueError(f"--trial {trial}: expected 0 to {len(trials) - 1}")
        acting = load_policy(policy, world, None, device)
        delayed = None if latency is None else math.ceil(latency * world.fps)
        inference = ThreadedInference(acting) if delayed is None else DelayedInference(acting, delayed)
        robot = SimulatedRobot(world, trials[trial])
        robot.connect()
        with DatasetRecorder(record, robot, fps=world.fps) if record is not None else nullcontext() as recorder:
            report = run(
                robot,
                make_executor(executor, inference, execute_steps=execute_steps),
                fps=world.fps,
                steps=max(1, round(seconds * world.fps)),
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
        world.close()
    answers = f"{len(report.delays)} answers after {max(report.delays, default=0)} control steps at most"
    print(
        f"{'success' if robot.succeeded else report.stopped or 'no success'} after {report.steps / world.fps:.1f} s: "
        f"{answers}; held {report.held}, clipped {report.clipped}, lost {report.errors}, late {report.overruns} "
        f"of {report.steps} steps"
    )


def use_threads(threads: int | None) -> None:
    """Have torch compute in so many threads; None leaves it and its import alone."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def load_policy(policy: str, world: "Simulator", name: str | None, device: str, *, timeout: float = 10.0) -> "Policy":
    """`expert`, a server's address (its answers take `timeout` seconds at most), or a checkpoint or run folder."""
    if policy == "expert":
        from agra.simulators.registry import expert

        return expert(world)
    if "://" in policy:
        from agra.serving.client import PolicyClient

        return PolicyClient(policy, api_key=os.environ.get("AGRA_API_KEY"), timeout=timeout)
    from agra.policy import WAMPolicy

    return WAMPolicy.load(policy, name=name, device=device)
