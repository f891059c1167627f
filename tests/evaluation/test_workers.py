import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from agra.evaluation.workers import imap_unordered
from agra.types import SimulatorFailed

ROOT = str(Path(__file__).parents[2])


def player() -> list[int]:
    return [os.getpid()]


def play(state: list[int], item: int) -> tuple[int, int, int]:
    state.append(item)
    if item == 13:
        raise ValueError("unlucky item")
    if item == 99:
        os._exit(3)
    return item, state[0], len(state)


def dies_once(state: list[int], marker: Path) -> int:
    """Kill the process at the first attempt, raise the simulator's failure at the second."""
    attempts = len(marker.read_text()) if marker.exists() else 0
    marker.write_text("x" * (attempts + 1))
    if marker.name == "unlucky" and attempts == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if marker.name == "unlucky" and attempts == 1:
        raise SimulatorFailed("not a number in the physics")
    return attempts


def wait(state: list[int], item: int) -> int:
    os.write(1, f"{os.getpid()}\n".encode())  # in a single call, so that lines of two processes do not mix
    time.sleep(60)
    return item


def test_one_worker_is_this_process():
    results = list(imap_unordered(play, range(4), make_player=player, workers=1))
    assert results == [(item, os.getpid(), item + 2) for item in range(4)]
    assert list(imap_unordered(play, [], make_player=player, workers=4)) == []


@pytest.mark.parametrize("workers", [2])
def test_each_process_keeps_its_player(workers):
    results = list(imap_unordered(play, range(8), make_player=player, workers=workers))
    assert sorted(item for item, _, _ in results) == list(range(8))
    processes = {process for _, process, _ in results}
    assert os.getpid() not in processes
    assert len(processes) <= workers
    assert sum(max(n for _, p, n in results if p == process) - 1 for process in processes) == 8


def test_errors_are_raised():
    with pytest.raises(ValueError, match="unlucky item"):
        list(imap_unordered(play, [1, 13], make_player=player, workers=2))
    with pytest.raises(ValueError, match="workers and attempts: expected at least 1"):
        list(imap_unordered(play, [1], make_player=player, workers=0))


def test_a_dead_process_loses_nothing(tmp_path):
    """SIGKILL in one of two processes, then a failure of the simulator: both items arrive, both failures are reported."""
    items = [tmp_path / "lucky", tmp_path / "unlucky"]
    failures = []
    results = imap_unordered(
        dies_once,
        items,
        make_player=player,
        workers=2,
        on_failure=lambda item, reason: failures.append((item.name, reason)),
    )
    assert sorted(results) == [0, 2]
    assert failures == [("unlucky", "its process died"), ("unlucky", "not a number in the physics")]


def fails(state: list[int], item: int) -> int:
    state.append(item)
    if item == 2:
        raise SimulatorFailed("broken")
    return len(state)


def test_failed_items_are_listed_after_all_others():
    failures = []
    results = imap_unordered(
        fails,
        [1, 2, 3, 2],
        make_player=player,
        workers=1,
        attempts=2,
        name=lambda item: f"trial {item}",
        on_failure=lambda *failure: failures.append(failure),
    )
    assert [next(results), next(results)] == [2, 2]  # a fresh player after the failure
    message = r"failed 2 times in each of 2 of 4 episodes: trial 2 \(broken\), trial 2 \(broken\); run the same command"
    with pytest.raises(SimulatorFailed, match=message):
        next(results)
    assert failures == [(2, "broken")] * 4


def test_workers_end_with_a_killed_parent():
    script = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {ROOT!r})
        from tests.evaluation import test_workers
        from agra.evaluation.workers import imap_unordered
        if __name__ == "__main__":
            list(imap_unordered(test_workers.wait, [1, 2], make_player=test_workers.player, workers=2))
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(200):
        if not any(Path(f"/proc/{worker}").exists() for worker in workers):
            return
        time.sleep(0.05)
    pytest.fail("workers outlive their parent")
