"""32 clients of one server: is every answer for its own observation, and what does batching bring?

    python -m benchmarks.serving CHECKPOINT [--clients 32] [--seconds 600] [--quick]

The server is `agra serve` in a process of its own, first with batches, then without, for half of the time each. Every
client asks about observations of a common pool in an order of its own, each with a seed of its own, so that the right
answer is known beforehand: it was computed in this process, one at a time. An answer counts as right where it agrees
with its own to 1e-3 of the actions' spread and is nearer to it than to that of any other observation of the pool.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from agra.policies.load import load_policy
from agra.serving.client import PolicyClient
from agra.types import Observation
from benchmarks.side_by_side import finish

INSTRUCTIONS = ("put the apple on the plate", "put the banana in the bowl", "open the steamer")


@contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[str, subprocess.Popen]]:
    """`agra serve` with these arguments: its address and its process; stopped by SIGTERM at the end."""
    command = [sys.executable, "-m", "agra.cli", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        found = re.search(r"ws://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError(f"{' '.join(command)}: did not start")
        yield found[0], process
    finally:
        process.terminate()
        process.wait(30)


def make_pool(policy: MethodPolicy, size: int) -> list[tuple[Observation, int, np.ndarray]]:
    """(observation, seed, the chunk that belongs to them)."""
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


def load(address: str, pool: list, *, clients: int, seconds: float) -> tuple[Counter, float, list[float]]:
    """Let the clients ask for so long: outcomes, answers a second, and the round trips."""
    outcomes: Counter = Counter()
    trips: list[float] = []
    lock, chunks = threading.Lock(), np.stack([chunk for *_, chunk in pool])
    close = 1e-3 * chunks.std()
    start = time.perf_counter()

    def ask(number: int) -> None:
        client, order = PolicyClient(address, timeout=120), np.random.default_rng(number)
        own: Counter = Counter()
        own_trips = []
        while time.perf_counter() - start < seconds:
            index = int(order.integers(len(pool)))
            observation, seed, _ = pool[index]
            client.reset(seed)
            sent = time.perf_counter()
            answer = client.act(observation).actions
            own_trips.append(time.perf_counter() - sent)
            away = np.abs(chunks - answer).max((1, 2))
            own["right" if away[index] < close and away.argmin() == index else "wrong"] += 1
        client.close()
        with lock:
            outcomes.update(own)
            trips.extend(own_trips)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, sum(outcomes.values()) / (time.perf_counter() - start), trips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600, help="for both servers together")
    parser.add_argument("--pool", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server")
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    options = parser.parse_args()
    seconds = 20 if options.quick else options.seconds
    pool = make_pool(load_policy(options.checkpoint), options.pool)
    found = {}
    for name, size in (("batched", options.clients), ("one by one", 1)):
        sizes = ["--max-batch", str(size), "--max-connections", str(2 * options.clients)]
        with serving([options.checkpoint, *sizes, "--threads", str(options.threads)]) as (address, _):
            outcomes, rate, trips = load(address, pool, clients=options.clients, seconds=seconds / 2)
        p50, p95 = np.percentile(trips, [50, 95]) * 1000
        print(
            f"{name}: {dict(outcomes)}, {rate:.1f} answers/s, round trip p50 {p50:.0f} ms, p95 {p95:.0f} ms", flush=True
        )
        found[name] = (outcomes, rate)
    wrong = sum(outcomes["wrong"] for outcomes, _ in found.values())
    finish(
        {
            "name": "serving",
            "ratio": round(found["batched"][1] / found["one by one"][1], 3),
            "ours": round(found["batched"][1], 2),
            "alternative": round(found["one by one"][1], 2),
            "unit": f"answers a second, {options.clients} clients, batched against one by one",
            "spread": [round(rate, 2) for _, rate in found.values()],
            "answers": sum(sum(outcomes.values()) for outcomes, _ in found.values()),
            "wrong": wrong,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} torch threads",
        }
    )
    if wrong:
        raise SystemExit(f"{wrong} answers were not for their own observation")


if __name__ == "__main__":
    main()
