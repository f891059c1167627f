"""Evaluation in two environments: the policy is served from this one, and the simulator runs in its own, without
torch.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agra.types import SimulatorFailed

_POLL_SECONDS = 0.05


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
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
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
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "agra.cli", "serve", policy, "--port", "0", "--max-batch", "1"]
        server = subprocess.Popen([*command, "--ready-file", str(ready), *arguments])
        try:
            while not ready.is_file():
                if server.poll() is not None:
                    raise ValueError(f"{policy}: its server did not start; the reason is above")
                time.sleep(_POLL_SECONDS)
            yield json.loads(ready.read_text())["address"]
        finally:
            server.terminate()
            server.wait()
