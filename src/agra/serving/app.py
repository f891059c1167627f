"""`agra serve` from start to stop: the wires, signals, and new checkpoints while it runs."""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from agra.serving.groot import GrootServer
from agra.serving.server import WebsocketServer
from agra.serving.service import PolicyService
from agra.types import BatchPolicy

log = logging.getLogger("agra.serving")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where policies come from: `load` makes one, `stamp` changes when there is a newer one."""

    load: Callable[[], BatchPolicy]
    stamp: Callable[[], Hashable]


def keep_what_is_loaded() -> None:
    """Hide what lives now from the garbage collector: to look through torch and a policy stops everybody for 0.3 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def reload(service: PolicyService, server: WebsocketServer, source: Source) -> bool:
    """Load the source's policy beside the one that serves, then swap. A policy that does not load changes nothing."""
    try:
        policy = await asyncio.to_thread(source.load)
    except (ValueError, OSError) as error:
        log.error("kept the policy that serves; the new one does not load: %s", error)
        return False
    incompatible = await service.swap(policy)
    keep_what_is_loaded()
    if incompatible:
        await server.dismiss("another policy, with other states or actions")
    return True


async def watch(service: PolicyService, server: WebsocketServer, source: Source, *, every: float) -> None:
    """Reload whenever the source has something newer; looks every so many seconds."""
    known = source.stamp()
    while True:
        await asyncio.sleep(every)
        try:
            found = source.stamp()
        except OSError as error:
            log.warning("cannot look for a newer checkpoint: %s", error)
            continue
        if found != known:
            known = found
            await reload(service, server, source)


async def run(
    service: PolicyService,
    server: WebsocketServer,
    source: Source,
    *,
    groot: GrootServer | None = None,
    watch_every: float | None = None,
    grace: float = 10.0,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is running, at most `grace` seconds. SIGHUP loads anew."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    tasks: set[asyncio.Task] = set()

    def hang_up() -> None:
        task = loop.create_task(reload(service, server, source))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    keep_what_is_loaded()
    await server.start()
    if groot is not None:
        await groot.start()
    if watch_every is not None:
        tasks.add(loop.create_task(watch(service, server, source, every=watch_every)))
    started()
    await stop.wait()
    log.info("stopping")
    for task in tasks:
        task.cancel()
    await server.stop(grace)
    if groot is not None:
        await groot.stop()
    await service.close()
