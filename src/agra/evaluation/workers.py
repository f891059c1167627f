"""Items played in parallel processes, each of which keeps its own player (policy and simulator) throughout.

Processes are spawned, because an OpenGL context does not survive a fork. One worker runs in the calling process. An
item whose process dies, or whose simulator raises `SimulatorFailed`, is played again from its start by a fresh player.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

from agra.types import SimulatorFailed

Item = TypeVar("Item")
Result = TypeVar("Result")

ATTEMPTS = 3

_player: Any = None


def imap_unordered(
    play: Callable[[Any, Item], Result],
    items: Sequence[Item],
    *,
    make_player: Callable[[], Any],
    workers: int,
    attempts: int = ATTEMPTS,
    name: Callable[[Item], str] = str,
    on_failure: Callable[[Item, str], None] = lambda item, reason: None,
) -> Iterator[Result]:
    """Yield play(player, item) for every item, in the order in which they finish.

    With `workers` > 1, `play`, `make_player`, items and results must be picklable. `on_failure` receives every failed
    attempt: a process that died, or `SimulatorFailed`. An item that failed `attempts` times is abandoned. Once all
    other items have been yielded, `SimulatorFailed` lists the abandoned ones by `name`. Any other exception is raised
    at once.
    """
    if workers < 1 or attempts < 1:
        raise ValueError(f"workers and attempts: expected at least 1, got {workers} and {attempts}")
    workers = min(workers, len(items))
    waiting = deque(enumerate(items))
    failures: Counter[int] = Counter()
    abandoned: list[str] = []

    def failed(number: int, item: Item, reason: str) -> None:
        failures[number] += 1
        on_failure(item, reason)
        if failures[number] < attempts:
            waiting.appendleft((number, item))
        else:
            abandoned.append(f"{name(item)} ({reason})")

    results = _in_this_process if workers <= 1 else _in_processes
    yield from results(play, waiting, make_player, workers, failed)
    if abandoned:
        raise SimulatorFailed(
            f"the simulator failed {attempts} times in each of {len(abandoned)} of {len(items)} episodes: "
            f"{', '.join(abandoned)}; run the same command again to retry them"
        )


def _in_this_process(
    play: Callable[[Any, Item], Result],
    waiting: deque[tuple[int, Item]],
    make_player: Callable[[], Any],
    workers: int,
    failed: Callable[[int, Item, str], None],
) -> Iterator[Result]:
    player = None
    while waiting:
        number, item = waiting.popleft()
        player = make_player() if player is None else player
        try:
            result = play(player, item)
        except SimulatorFailed as error:
            player = None
            failed(number, item, str(error))
        else:
            yield result


def _in_processes(
    play: Callable[[Any, Item], Result],
    waiting: deque[tuple[int, Item]],
    make_player: Callable[[], Any],
    workers: int,
    failed: Callable[[int, Item, str], None],
) -> Iterator[Result]:
    """One executor per process: a process that dies loses only its own item."""
    idle = [_process() for _ in range(workers)]
    running: dict[Future[Result], tuple[ProcessPoolExecutor, int, Item]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                number, item = waiting.popleft()
                process = idle.pop()
                running[process.submit(_play, play, make_player, item)] = process, number, item
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                process, number, item = running.pop(future)
                try:
                    result = future.result()
                except (BrokenExecutor, SimulatorFailed) as error:
                    process.shutdown(wait=False)
                    idle.append(_process())
                    died = isinstance(error, BrokenExecutor)
                    failed(number, item, "its process died" if died else str(error))
                else:
                    idle.append(process)
                    yield result
    finally:
        for process in [*idle, *(process for process, _, _ in running.values())]:
            process.shutdown(cancel_futures=True)


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_watch_parent)


def _watch_parent() -> None:
    # A killed parent cannot stop its workers, and the workers of a spawned pool would wait forever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _play(play: Callable[[Any, Item], Result], make_player: Callable[[], Any], item: Item) -> Result:
    global _player
    if _player is None:
        _player = make_player()
    return play(_player, item)
