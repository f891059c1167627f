"""Runs a policy server from start to stop: both protocols, signals, and new checkpoints."""

import asyncio
import gc
import json
import logging
import signal
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any

from agra.files import write_text
from agra.serving.server.config import ServeConfig, check_key
from agra.serving.server.groot import GrootServer
from agra.serving.server.service import PolicyService
from agra.serving.server.websocket import WebsocketServer
from agra.types import BatchPolicy

log = logging.getLogger("agra.serving")


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """A source of policies: `load` loads the newest one, and `stamp` changes when there is a newer one."""

    load: Callable[[], BatchPolicy]
    stamp: Callable[[], Hashable]


def freeze_live_objects() -> None:
    """`gc.freeze` live objects: a full collection over torch and the policy stalls the server for 0.3 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def reload(service: PolicyService, server: WebsocketServer, source: PolicySource) -> bool:
    """Load the source's policy, check it and swap it in.

    Returns False, with nothing changed, for a policy that fails.
    """
    async with service.reloading:
        try:
            policy = await asyncio.to_thread(source.load)
            await service.check(policy)
            incompatible = await service.swap(policy)
        except Exception:  # any error: a candidate that fails must not stop the service
            log.exception("kept the present policy; the new one does not load or does not answer")
            return False
    freeze_live_objects()
    if incompatible:
        await server.disconnect_clients("the new policy has other states or actions")
    return True


async def watch(
    service: PolicyService, server: WebsocketServer, source: PolicySource, *, loaded: Hashable | None, interval: float
) -> None:
    """Check the source every `interval` seconds and reload when it has a newer policy. Errors are logged.

    `loaded` is the source's stamp before the present policy was loaded, so that no policy saved since then is missed.
    """
    while True:
        await asyncio.sleep(interval)
        stamp = _stamp(source)
        if stamp is not None and stamp != loaded:
            loaded = stamp
            await reload(service, server, source)


def _stamp(source: PolicySource) -> Hashable | None:
    try:
        return source.stamp()
    except Exception:  # any error: the watch continues
        log.exception("cannot check for a newer checkpoint")
        return None


def _log_error(task: asyncio.Task) -> None:
    """Log the error of a background task, which nothing awaits."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a background task of the server failed", exc_info=error)


async def run(
    service: PolicyService,
    server: WebsocketServer,
    source: PolicySource,
    *,
    groot: GrootServer | None = None,
    reload_interval: float | None = None,
    loaded: Hashable | None = None,
    grace: float = 10.0,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests that were read, in at most `grace` seconds.

    SIGHUP loads the newest policy. The port opens at once. Clients are accepted when the policy has been checked and
    warmed up. With a `reload_interval` newer policies are loaded, see `watch`. Raises ValueError for a policy that does
    not answer.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    tasks: set[asyncio.Task] = set()

    def start(work: Coroutine[Any, Any, object]) -> None:
        task = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_log_error)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    await service.start()
    freeze_live_objects()
    if groot is not None:
        await groot.start()
    loop.add_signal_handler(signal.SIGHUP, lambda: start(reload(service, server, source)))
    if reload_interval is not None:
        start(watch(service, server, source, loaded=loaded, interval=reload_interval))
    started()
    await stop.wait()
    log.info("stopping")
    for task in tasks:
        task.cancel()
    await server.stop(grace)
    if groot is not None:
        await groot.stop()
    await service.close()


async def serve(config: ServeConfig, source: PolicySource, *, api_key: str | None = None) -> None:
    """Serve the source's policy as configured, until SIGTERM or SIGINT. Prints the addresses once it accepts clients.

    Raises ValueError for a network address without a key, and for a policy that does not answer.
    """
    config.check_access(api_key)
    check_key(api_key)
    tls = config.tls.context()
    loaded = None if config.reload_interval is None else _stamp(source)
    service = PolicyService(source.load(), config.limits)
    server = WebsocketServer(service, host=config.host, port=config.port, keys=config.keys, api_key=api_key, tls=tls)
    groot = None
    if config.groot.port is not None:
        groot = GrootServer(service, host=config.host, port=config.groot.port, config=config.groot, api_key=api_key)

    def started() -> None:
        addresses = {"address": server.address, "groot_address": "" if groot is None else groot.address}
        print(f"serving {service.spec.name} on {' and '.join(filter(None, addresses.values()))}", flush=True)
        if config.ready_file is not None:
            write_text(config.ready_file, json.dumps(addresses) + "\n")

    await run(
        service,
        server,
        source,
        groot=groot,
        reload_interval=config.reload_interval,
        loaded=loaded,
        started=started,
    )
