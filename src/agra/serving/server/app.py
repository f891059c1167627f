"""`agra serve` from start to stop: the wires, signals, and new checkpoints while it runs."""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any

from agra.serving.server.groot import GrootServer
from agra.serving.server.websocket import WebsocketServer
from agra.serving.server.service import PolicyService
from agra.types import BatchPolicy

log = logging.getLogger("agra.serving")


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """Where policies come from: `load` makes one, `stamp` changes when there is a newer one."""

    load: Callable[[], BatchPolicy]
    stamp: Callable[[], Hashable]


def keep_what_is_loaded() -> None:
    """Hide what lives now from the garbage collector: to look through torch and a policy stops everybody for 0.3 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def reload(service: PolicyService, server: WebsocketServer, source: PolicySource) -> bool:
    """Load the source's policy beside the one that serves, try it out, then swap. A policy that fails changes nothing."""
    async with service.reloading:
        try:
            policy = await asyncio.to_thread(source.load)
            await service.check(policy)
            incompatible = await service.swap(policy)
        except Exception:  # of whatever kind: the service outlives a candidate that fails
            log.exception("kept the policy that serves; the new one does not load or does not answer")
            return False
    keep_what_is_loaded()
    if incompatible:
        await server.dismiss("another policy, with other states or actions")
    return True


async def watch(service: PolicyService, server: WebsocketServer, source: PolicySource, *, every: float) -> None:
    """Reload whenever the source has something newer; looks every so many seconds, whatever fails."""
    known = _stamp(source)
    while True:
        await asyncio.sleep(every)
        found = _stamp(source)
        if found is not None and found != known:
            known = found
            await reload(service, server, source)


def _stamp(source: PolicySource) -> Hashable | None:
    try:
        return source.stamp()
    except Exception:  # of whatever kind: the watch goes on
        log.exception("cannot look for a newer checkpoint")
        return None


def _report(task: asyncio.Task) -> None:
    """Log what ended a task that nobody awaits."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a background task of the server ended", exc_info=error)


async def run(
    service: PolicyService,
    server: WebsocketServer,
    source: PolicySource,
    *,
    groot: GrootServer | None = None,
    reload_interval: float | None = None,
    grace: float = 10.0,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was read, in at most `grace` seconds. SIGHUP loads anew.

    The port opens at once; clients get in when the policy has been tried out and warmed up. Raises ValueError where it does
    not answer.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    tasks: set[asyncio.Task] = set()

    def begin(work: Coroutine[Any, Any, object]) -> None:
        task = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_report)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    await service.start()
    keep_what_is_loaded()
    if groot is not None:
        await groot.start()
    loop.add_signal_handler(signal.SIGHUP, lambda: begin(reload(service, server, source)))
    if reload_interval is not None:
        begin(watch(service, server, source, every=reload_interval))
    started()
    await stop.wait()
    log.info("stopping")
    for task in tasks:
        task.cancel()
    await server.stop(grace)
    if groot is not None:
        await groot.stop()
    await service.close()
