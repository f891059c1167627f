"""Work spread over processes, for simulators: each process keeps its own player from first to last item.

Processes are spawned, because a renderer's context does not survive a fork. One worker means this process.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_player: Any = None


def as_finished(
    play: Callable[[Any, Item], Result], items: Sequence[Item], *, make_player: Callable[[], Any], workers: int
) -> Iterator[Result]:
    """Yield play(player, item) for every item in the order in which they finish.

    `play`, `make_player`, items and results must be picklable where `workers` > 1. An exception in a worker is raised
    here, and a worker that dies raises `concurrent.futures.BrokenExecutor`.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    workers = min(workers, len(items))
    if workers <= 1:
        player = make_player() if items else None
        yield from (play(player, item) for item in items)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_set_up, initargs=(make_player,))
    try:
        for future in as_completed([pool.submit(_play, play, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _set_up(make_player: Callable[[], Any]) -> None:
    global _player
    # A killed parent cannot tell its workers to stop, and a spawned pool's workers would wait for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _player = make_player()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _play(play: Callable[[Any, Item], Result], item: Item) -> Result:
    return play(_player, item)
