"""Evaluation in two environments: the policy is served from this one, the simulator runs in its own, where no torch is."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def evaluate_apart(policy: str, python: str | Path, arguments: Sequence[str], *, serve: Sequence[str] = ()) -> int:
    """Serve `policy` and have the interpreter `python` evaluate it with `arguments` of `agra evaluate`; its exit code.

    `serve` are further arguments of `agra serve`. Raises FileNotFoundError where there is no such interpreter, ValueError
    where the server does not start.
    """
    if not Path(python).is_file():
        raise FileNotFoundError(f"{python}: no such interpreter; simulators' environments are made by make env-NAME")
    # Hashes of names decide scenes of RoboCasa GR1; the same in every process, they give the same episodes.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with served(policy, serve) as address:
        command = [str(python), "-m", "agra.cli", "evaluate", address, *arguments]
        return subprocess.run(command, check=False, env=environment).returncode


@contextmanager
def served(policy: str, arguments: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server of `policy` in a process of its own, ended afterwards.

    It takes one request at a time: what shares a batch could change an answer's last bits with the number of clients.
    """
    command = [sys.executable, "-m", "agra.cli", "serve", policy, "--port", "0", "--max-batch", "1", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()  # blocks until the policy is loaded
        found = re.search(r"\bwss?://\S+", said)
        if found is None:
            raise ValueError(f"{policy}: its server did not start; the reason is above")
        yield found[0]
    finally:
        server.terminate()
        server.wait()
