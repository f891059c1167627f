"""Throughput of the server for 32 clients with and without batching, and whether each answer belongs to its observation.

    python -m benchmarks.serving [CHECKPOINT] [--clients 32] [--seconds 600] [--quick]

The server is `agra serve` in a process of its own, first with batches, then without, for half of the time each. Each client
sends observations of a common pool in a random order, each with its own seed. The correct chunks are computed beforehand in this
process, one at a time. An answer is correct if it agrees with its chunk to 1e-3 of the actions' standard deviation and is nearer
to it than to the chunk of any other observation of the pool.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agra.serving.client import PolicyClient
from agra.types import Observation

if TYPE_CHECKING:  # clients of the server import this module without torch
    from agra.policies.policy import MethodPolicy

INSTRUCTIONS = ("put the apple on the plate", "put the banana in the bowl", "open the steamer")


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """`agra serve` in a process of its own."""

    process: subprocess.Popen
    address: str
    groot_address: str

    def memory(self) -> float:
        """Resident memory, MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


@contextmanager
def serving(arguments: list[str], *, api_key: str | None = None, log: Path | None = None) -> Iterator[RunningServer]:
    """Run `agra serve` with these arguments on a free port, stopped by SIGTERM at the end. Logs to the file `log`."""
    with tempfile.TemporaryDirectory() as folder:
        ready, log = Path(folder) / "ready.json", log or Path(folder) / "log"
        command = [sys.executable, "-m", "agra.cli", "serve", *arguments, "--port", "0", "--ready-file", str(ready)]
        environment = os.environ | ({} if api_key is None else {"AGRA_API_KEY": api_key})
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while not ready.is_file():
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)}: the server did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield RunningServer(process=process, **json.loads(ready.read_text()))
        finally:
            process.terminate()
            process.wait(30)


def make_pool(policy: "MethodPolicy", size: int) -> list[tuple[Observation, int, np.ndarray]]:
    """Return `size` random observations, each with a seed and the policy's chunk."""
    rng = np.random.default_rng(0)
    embodiment, robot = next(iter(policy.spec.embodiments.items()))
    low, high = (np.asarray(policy.stats[embodiment].state[name]) for name in ("min", "max"))
    pool = []
    for index in range(size):
        observation = Observation(
            frame=rng.integers(0, 256, (64, 112, 3), dtype=np.uint8),
            state=rng.uniform(low, high, robot.state_dim).astype(np.float32),
            instruction=INSTRUCTIONS[index % len(INSTRUCTIONS)],
            embodiment=embodiment,
        )
        policy.reset(index)
        pool.append((observation, index, policy.act(observation).actions))
    return pool


def is_correct(actions: np.ndarray, index: int, chunks: np.ndarray) -> bool:
    """Whether an answer agrees with chunk `index` and with no other of `chunks` (N, K, D)."""
    distances = np.abs(chunks - actions).max((1, 2))
    return bool(distances[index] < 1e-3 * chunks.std() and distances.argmin() == index)


def run_clients(address: str, pool: list, *, clients: int, seconds: float) -> tuple[Counter, float, list[float]]:
    """Run the clients for `seconds`. Returns their outcomes, answers per second and round trips in seconds."""
    outcomes: Counter = Counter()
    trips: list[float] = []
    lock, chunks = threading.Lock(), np.stack([chunk for *_, chunk in pool])
    start = time.perf_counter()

    def run_client(number: int) -> None:
        client, rng = PolicyClient(address, timeout=120), np.random.default_rng(number)
        client_outcomes: Counter = Counter()
        client_trips = []
        while time.perf_counter() - start < seconds:
            index = int(rng.integers(len(pool)))
            observation, seed, _ = pool[index]
            client.reset(seed)
            sent = time.perf_counter()
            actions = client.act(observation).actions
            client_trips.append(time.perf_counter() - sent)
            client_outcomes["correct" if is_correct(actions, index, chunks) else "wrong"] += 1
        client.close()
        with lock:
            outcomes.update(client_outcomes)
            trips.extend(client_trips)

    threads = [threading.Thread(target=run_client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, sum(outcomes.values()) / (time.perf_counter() - start), trips


def main() -> None:
    from agra.policies.load import load_policy
    from benchmarks.side_by_side import finish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="tabletop-agra")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600, help="for both servers together")
    parser.add_argument("--pool", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server")
    parser.add_argument("--quick", action="store_true", help="8 seconds, a pool of 8")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.pool = 8, 8
    pool = make_pool(load_policy(options.checkpoint), options.pool)
    outcomes, rates = Counter(), {}
    for name, size in (("batched", options.clients), ("one by one", 1)):
        sizes = ["--max-batch", str(size), "--max-connections", str(2 * options.clients)]
        with serving([options.checkpoint, *sizes, "--threads", str(options.threads)]) as server:
            counts, rates[name], trips = run_clients(
                server.address, pool, clients=options.clients, seconds=options.seconds / 2
            )
        outcomes.update(counts)
        p50, p95 = np.percentile(trips, [50, 95]) * 1000
        print(f"{name}: {dict(counts)}, {rates[name]:.1f} answers/s, round trip p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    finish(
        {
            "name": "serving",
            "ratio": round(rates["batched"] / rates["one by one"], 3),
            "ours": round(rates["batched"], 2),
            "alternative": round(rates["one by one"], 2),
            "unit": f"answers per second, {options.clients} clients, batched against one by one",
            "spread": [round(rate, 2) for rate in rates.values()],
            "answers": outcomes.total(),
            "wrong": outcomes["wrong"],
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} torch threads",
        }
    )
    if outcomes["wrong"]:
        raise SystemExit(f"{outcomes['wrong']} answers do not belong to their observation")


if __name__ == "__main__":
    main()
