"""Evaluation in two environments: the policy is served from this one, and the simulator runs in its own, without
torch.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from agra.types import SimulatorFailed

_POLL_SECONDS = 0.05
_END_WITH_PARENT = "AGRA_END_WITH_PARENT"


def evaluate_in_subprocess(
    policy: str, python: str | Path, arguments: Sequence[str], *, serve: Sequence[str] = ()
) -> int:
    """Serve `policy`, and run `agra evaluate` with `arguments` in the interpreter `python`. Returns its exit code.

    `serve` holds further arguments of `agra serve`. Raises FileNotFoundError if the interpreter does not exist,
    ValueError if the server does not start, and SimulatorFailed if a signal ended the simulator's process.
    """
    _check_interpreter(python)
    with served(policy, serve) as address:
        return run_in_environment(python, ["-m", "agra.cli", "evaluate", address, *arguments])


def run_in_environment(python: str | Path, arguments: Sequence[str]) -> int:
    """Run a simulator's own interpreter with `arguments`. Returns its exit code.

    Raises FileNotFoundError if the interpreter does not exist, and SimulatorFailed if a signal ended its process.
    """
    _check_interpreter(python)
    # Hashes of names decide scenes of RoboCasa GR1. The same seed in every process gives the same episodes.
    environment = {**os.environ, _END_WITH_PARENT: "1", "PYTHONHASHSEED": "0"}
    with _exit_on_sigterm():
        code = subprocess.run([str(python), *arguments], check=False, env=environment).returncode
    if code < 0:
        raise SimulatorFailed(
            f"{python}: the simulator's process was ended by {signal.Signals(-code).name}; run the same command again, "
            "an evaluation continues after its finished trials"
        )
    return code


def _check_interpreter(python: str | Path) -> None:
    if not Path(python).is_file():
        raise FileNotFoundError(f"{python}: no such interpreter; make env-NAME installs a simulator's environment")


@contextmanager
def served(policy: str, arguments: Sequence[str] = ()) -> Iterator[str]:
    """Yield the address of a server of `policy` in a process of its own, which ends with the context.

    The server computes one request at a time: in a batch, the last bits of an answer could depend on the number of
    clients.
    """
    with tempfile.TemporaryDirectory() as folder, _exit_on_sigterm():
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "agra.cli", "serve", policy, "--port", "0", "--max-batch", "1"]
        environment = {**os.environ, _END_WITH_PARENT: "1"}
        server = subprocess.Popen([*command, "--ready-file", str(ready), *arguments], env=environment)
        try:
            while not ready.is_file():
                if server.poll() is not None:
                    raise ValueError(f"{policy}: its server did not start; the reason is above")
                time.sleep(_POLL_SECONDS)
            yield json.loads(ready.read_text())["address"]
        finally:
            server.terminate()
            server.wait()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM inside the block, so that it ends the processes that it started.

    Does nothing outside the main thread, where signals are not handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def watch_parent() -> None:
    """Send this process SIGTERM when its parent has ended, even by SIGKILL, if this module of the parent started it."""
    if os.environ.pop(_END_WITH_PARENT, None):
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
