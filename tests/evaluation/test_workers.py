import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path


import pytest

from agra.types import SimulatorFailed
from agra.evaluation.workers import as_finished

TESTS = str(Path(__file__).parent)


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
    """Kills its process at the first attempt, tells its simulator's failure at the second."""
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
    found = list(as_finished(play, range(4), make_player=player, workers=1))
    assert found == [(item, os.getpid(), item + 2) for item in range(4)]
    assert list(as_finished(play, [], make_player=player, workers=4)) == []


@pytest.mark.parametrize("workers", [2])
def test_each_process_keeps_its_player(workers):
    import test_workers

    found = list(as_finished(test_workers.play, range(8), make_player=test_workers.player, workers=workers))
    assert sorted(item for item, _, _ in found) == list(range(8))
    processes = {process for _, process, _ in found}
    assert os.getpid() not in processes
    assert len(processes) <= workers
    assert sum(max(n for _, p, n in found if p == process) - 1 for process in processes) == 8


def test_errors_arrive():
    import test_workers

    with pytest.raises(ValueError, match="unlucky item"):
        list(as_finished(test_workers.play, [1, 13], make_player=test_workers.player, workers=2))
    with pytest.raises(ValueError, match="workers and attempts: expected at least 1"):
        list(as_finished(play, [1], make_player=player, workers=0))


def test_a_dead_process_loses_nothing(tmp_path):
    """SIGKILL in one of two processes, then a failure that the simulator tells: both items arrive, both are reported."""
    import test_workers

    items = [tmp_path / "lucky", tmp_path / "unlucky"]
    heard = []
    found = as_finished(
        test_workers.dies_once,
        items,
        make_player=test_workers.player,
        workers=2,
        on_failure=lambda item, reason: heard.append((item.name, reason)),
    )
    assert sorted(found) == [0, 2]
    assert heard == [("unlucky", "its process died"), ("unlucky", "not a number in the physics")]


def fails(state: list[int], item: int) -> int:
    state.append(item)
    if item == 2:
        raise SimulatorFailed("broken")
    return len(state)


def test_what_cannot_be_played_is_said_after_all_else():
    heard = []
    found = as_finished(
        fails, [1, 2, 3], make_player=player, workers=1, attempts=2, on_failure=lambda *failure: heard.append(failure)
    )
    assert [next(found), next(found)] == [2, 2]  # a fresh player after the failure
    with pytest.raises(
        SimulatorFailed, match="1 of 3 could not be played in 2 attempts each, the first being 2: broken"
    ):
        next(found)
    assert heard == [(2, "broken")] * 2


def test_workers_end_with_a_killed_parent():
    script = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {TESTS!r})
        import test_workers
        from agra.evaluation.workers import as_finished
        if __name__ == "__main__":
            list(as_finished(test_workers.wait, [1, 2], make_player=test_workers.player, workers=2))
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
