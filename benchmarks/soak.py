"""Thirty minutes of mixed load: clients of both protocols, reloads, hostile bytes, and clients that are killed.

    python -m benchmarks.soak [CHECKPOINT] [--minutes 30] [--quick]

The server is `agra serve --reload-interval` in a process of its own. Four clients use openpi's protocol and four GR00T's, with at
most ten requests per second each, for observations whose correct chunks are computed beforehand. Every minute the run folder gets a
newer checkpoint. Every third one is damaged and must change nothing. Meanwhile a hostile client sends malformed, oversized and
never-ending messages over both protocols, and another client is killed during its requests. A wrong or lost answer, a server that
dies, or growing memory ends with exit code 1. Latency is compared with that of the same eight clients alone, measured first.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import websockets.exceptions
import zmq
from websockets.sync.client import connect

from agra import files
from agra.serving.client import PolicyClient
from agra.serving.protocol.messages import InferRequest, WireKeys, encode_request
from agra.serving.protocol.wire import pack_groot, unpack_groot
from agra.serving.protocol.zmtp import COMMAND, GREETING, LONG, MORE
from agra.types import Observation, PolicySpec
from benchmarks.hostile import HostileFrames
from benchmarks.serving import RunningServer, is_correct, make_pool, serving

CLIENTS = 4  # of each protocol
PERIOD = 0.1  # seconds between a client's requests, at least
TIMEOUT = 60.0  # seconds; a later answer is lost
KEY = "soak"
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server as its clients know it, and observations with seeds and correct chunks."""

    address: str
    groot_address: str
    spec: PolicySpec
    pool: list[tuple[Observation, int, np.ndarray]]

    @property
    def ports(self) -> tuple[int, int]:
        """Ports of both protocols."""
        return urlsplit(self.address).port or 0, urlsplit(self.groot_address).port or 0

    @property
    def valid_request(self) -> dict[str, Any]:
        """A valid request of the websocket protocol."""
        return encode_request(InferRequest(observation=self.pool[0][0], seed=1), WireKeys(), self.spec)


# --- clients -----------------------------------------------------------------------------------------------------------


class GrootClient:
    """A client of GR00T's protocol as its simulators use it: a REQ socket and one environment."""

    def __init__(self, address: str, spec: PolicySpec) -> None:
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(1000 * TIMEOUT))
        self.socket.connect(address)
        self.parts = next(iter(spec.embodiments.values())).state

    def call(self, endpoint: str, data: dict[str, Any]) -> Any:
        """Return the server's response. Raises ValueError for its error message and TimeoutError without a response."""
        self.socket.send(pack_groot({"endpoint": endpoint, "data": data, "api_token": KEY}))
        try:
            response = unpack_groot(self.socket.recv())
        except zmq.Again as error:
            raise TimeoutError(f"no answer within {TIMEOUT:g} s") from error
        if isinstance(response, dict) and "error" in response:
            raise ValueError(response["error"])
        return response

    def act(self, observation: Observation, seed: int) -> np.ndarray:
        """Return the first chunk of a new episode."""
        self.call("reset", {"options": {"seed": seed}})
        data: dict[str, Any] = {f"state.{part}": observation.state[None, a:b] for part, (a, b) in self.parts.items()}
        data["video.ego_view"] = observation.frame[None]
        data["annotation.human.action.task_description"] = [observation.instruction]
        return np.concatenate([*self.call("get_action", data).values()], axis=-1)


def run_client(wire: str, target: Target, number: int, stop: Any, results: Any) -> None:
    """Send valid requests until the event `stop`. Puts the outcomes and the round trips in seconds into `results`."""
    rng, outcomes, trips = np.random.default_rng(number), Counter(), []
    chunks = np.stack([chunk for *_, chunk in target.pool])
    client = PolicyClient(target.address, timeout=TIMEOUT, api_key=KEY)
    groot = GrootClient(target.groot_address, target.spec)
    while not stop.is_set():
        index = int(rng.integers(len(target.pool)))
        observation, seed, _ = target.pool[index]
        sent = time.perf_counter()
        try:
            if wire == "openpi":
                client.reset(seed)
                actions = client.act(observation).actions
            else:
                actions = groot.act(observation, seed)
        except (ConnectionError, TimeoutError) as error:
            outcomes["lost"] += 1
            print(f"{wire} client {number}: {error}", flush=True)
        except ValueError as error:
            outcomes["refused"] += 1
            print(f"{wire} client {number}: {error}", flush=True)
        else:
            trips.append(time.perf_counter() - sent)
            outcomes["correct" if is_correct(actions, index, chunks) else "wrong"] += 1
        time.sleep(max(0.0, PERIOD - (time.perf_counter() - sent)))
    results.put((wire, dict(outcomes), trips))


def kill_a_client(processes: Any, target: Target) -> None:
    """Start a client of either protocol and kill it after 3 to 6 seconds, during its requests."""
    wire = random.choice(("openpi", "groot"))
    arguments = (wire, target, 99, processes.Event(), processes.Queue())
    client = processes.Process(target=run_client, args=arguments, daemon=True)
    client.start()
    threading.Timer(random.uniform(3.0, 6.0), client.kill).start()
    client.join()


# --- hostile traffic ---------------------------------------------------------------------------------------------------


def attack(target: Target, stop: Any, results: Any) -> None:
    """Send hostile bytes over both protocols until the event `stop`, each kind in turn."""
    frames, counts, rng = HostileFrames(target.valid_request, target.spec, 0), Counter(), random.Random(0)
    kinds = (_frames, _many_parts, _never_ending, _large, _handshakes, _noise)
    number = 0
    while not stop.is_set():
        kind = kinds[number % len(kinds)]
        number += 1
        try:
            counts[kind.__name__.strip("_")] += kind(target, frames, rng, number)
        except (OSError, websockets.exceptions.WebSocketException):
            counts["closed"] += 1
        time.sleep(0.02)
    results.put(("hostile", dict(counts), []))


def _send_and_wait(target: Target, data: bytes | str) -> None:
    headers = {"Authorization": f"Api-Key {KEY}"}
    with connect(target.address, compression=None, additional_headers=headers) as connection:
        connection.recv(timeout=TIMEOUT)
        with suppress(websockets.exceptions.ConnectionClosed):
            connection.send(data)
            connection.recv(timeout=TIMEOUT)


def _frames(target: Target, frames: HostileFrames, rng: random.Random, number: int) -> int:
    """Malformed, truncated and wrongly typed frames of openpi's protocol."""
    for index in range(15):
        _send_and_wait(target, frames.frame(100 * number + index))
    return 15


def _large(target: Target, frames: HostileFrames, rng: random.Random, number: int) -> int:
    """An invalid frame of almost 8 MiB, and a larger one."""
    for size in (8 * 2**20 - 100, 9 * 2**20):
        _send_and_wait(target, bytes(size))
    return 2


def _many_parts(target: Target, frames: HostileFrames, rng: random.Random, number: int) -> int:
    """A ZeroMQ message of many large parts, without a key."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(target.groot_address)
    dealer.send_multipart([bytes(2**20)] * 50, copy=False)
    dealer.poll(200)
    dealer.close()
    return 1


def _after_handshake(port: int) -> socket.socket:
    """Open a raw connection of GR00T's protocol, after its handshake."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(GREETING + bytes([COMMAND | LONG]) + struct.pack(">Q", len(READY)) + READY)
    return connection


def _never_ending(target: Target, frames: HostileFrames, rng: random.Random, number: int) -> int:
    """A request of 8 MiB that stops halfway."""
    with _after_handshake(target.ports[1]) as connection:
        connection.sendall(bytes([MORE, 0, LONG]) + struct.pack(">Q", 8 * 2**20) + bytes(rng.randrange(2 * 2**20)))
    return 1


def _noise(target: Target, frames: HostileFrames, rng: random.Random, number: int) -> int:
    """Noise after the handshake of GR00T's protocol."""
    with _after_handshake(target.ports[1]) as connection:
        connection.sendall(rng.randbytes(rng.randrange(5000)))
        while connection.recv(2**16):
            pass
    return 1


def _handshakes(target: Target, frames: HostileFrames, rng: random.Random, number: int) -> int:
    """Half-open connections."""
    connections = []
    for port in target.ports * 5:
        connections.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        connections[-1].sendall(b"GET / HTTP/1.1\r\n" + bytes(rng.randrange(200)))
    for connection in connections:
        connection.close()
    return len(connections)


# --- the run -----------------------------------------------------------------------------------------------------------


class Checkpoints:
    """A run folder that gets newer checkpoints. Every third one is damaged."""

    def __init__(self, source: Path, run: Path) -> None:
        self.source, self.run, self.step = source, run, 0
        self.add()

    def add(self) -> str:
        """Add the next checkpoint with a rename. Returns "good" or "damaged"."""
        self.step += 1
        kind = ("good", "good", "damaged")[self.step % 3] if self.step > 1 else "good"
        folder = self.run / f".step_{self.step:06d}.copying"
        shutil.copytree(self.source, folder)
        if kind == "damaged":
            name, content = (("norm_stats.json", b"{}"), ("config.json", b"[]"))[self.step % 2]
            (folder / name).write_bytes(content)
            digests = json.loads((folder / "manifest.json").read_text())
            digests[name] = files.sha256(folder / name)
            files.write_text(folder / "manifest.json", json.dumps(digests))
        folder.rename(self.run / f"step_{self.step:06d}")
        for old in range(self.step - 3):
            shutil.rmtree(self.run / f"step_{old:06d}", ignore_errors=True)
        return kind


@dataclass(kw_only=True)
class Phase:
    """Figures of a part of the run. `trips` are round trips by protocol, seconds. `memory` is in MiB, once per second."""

    outcomes: Counter
    trips: dict[str, list[float]]
    memory: list[float]
    reloads: Counter
    clients_killed: int
    hostile: dict[str, int]

    def medians(self) -> list[float]:
        """Median round trip of each protocol, ms."""
        return [1000 * float(np.median(trips)) for trips in self.trips.values()]

    def percentiles(self) -> dict[str, list[float]]:
        """p50, p95 and maximum of the round trips of each protocol, ms."""
        return {
            wire: [round(1000 * float(value), 1) for value in np.percentile(trips, [50, 95, 100])]
            for wire, trips in self.trips.items()
        }


def run_phase(seconds: float, server: RunningServer, target: Target, checkpoints: Checkpoints | None) -> Phase:
    """Run eight clients for `seconds`. With `checkpoints`, everything else runs beside them."""
    processes = multiprocessing.get_context("spawn")
    stop, results = processes.Event(), processes.Queue()
    workers = [
        processes.Process(target=run_client, args=(wire, target, number, stop, results), daemon=True)
        for number, wire in enumerate(("openpi", "groot") * CLIENTS)
    ]
    if checkpoints is not None:
        workers.append(processes.Process(target=attack, args=(target, stop, results), daemon=True))
    for worker in workers:
        worker.start()
    phase = Phase(
        outcomes=Counter(),
        trips={"openpi": [], "groot": []},
        memory=[],
        reloads=Counter(),
        clients_killed=0,
        hostile={},
    )
    begun, next_reload = time.monotonic(), 60.0
    while (passed := time.monotonic() - begun) < seconds and server.process.poll() is None:
        if checkpoints is not None:
            kill_a_client(processes, target)
            phase.clients_killed += 1
            if passed > next_reload or (seconds < 120 and not phase.reloads):
                next_reload += 60
                phase.reloads[checkpoints.add()] += 1
        phase.memory.append(server.memory())
        time.sleep(1)
    stop.set()
    for _ in workers:
        wire, counts, trips = results.get(timeout=2 * TIMEOUT)
        if wire == "hostile":
            phase.hostile = counts
        else:
            phase.outcomes.update(counts)
            phase.trips[wire] += trips
    for worker in workers:
        worker.join(10)
    return phase


def main() -> None:
    # Here, because the processes of the clients import this module and need no torch.
    from agra.checkpoints.folder import resolve
    from agra.policies.load import load_policy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="tabletop-agra")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="12 seconds, one reload")
    options = parser.parse_args()
    alone_seconds, soak_seconds = (4.0, 12.0) if options.quick else (60.0, 60 * options.minutes)
    policy = load_policy(options.checkpoint)
    pool = make_pool(policy, 16)
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        checkpoints = Checkpoints(resolve(options.checkpoint), run)
        arguments = [str(run), "--groot-port", "0", "--reload-interval", "2", "--threads", "1"]
        with serving(arguments, api_key=KEY, log=log) as server:
            target = Target(address=server.address, groot_address=server.groot_address, spec=policy.spec, pool=pool)
            alone = run_phase(alone_seconds, server, target, None)
            soak = run_phase(soak_seconds, server, target, checkpoints)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(60)
            stopping = time.monotonic() - begun
        text = log.read_text()
    report(alone, soak, code, stopping, text, soak_seconds)


def report(alone: Phase, soak: Phase, code: int, stopping: float, log: str, seconds: float) -> None:
    """Print the figures and the JSON line. Exits with code 1 if a promise was broken."""
    from benchmarks.side_by_side import finish

    ratios = [a / s for a, s in zip(alone.medians(), soak.medians(), strict=True)]
    memory = soak.memory[len(soak.memory) // 5 :]
    trend = float(np.polyfit(range(len(memory)), memory, 1)[0]) * len(memory) if len(memory) > 2 else 0.0
    swapped, kept = log.count("replaced policy"), log.count("kept the present policy")
    figures = {
        "answers": dict(soak.outcomes),
        "latency_ms_p50_p95_max": {"alone": alone.percentiles(), "soak": soak.percentiles()},
        "memory_mib": {
            "alone": round(alone.memory[-1], 1), "first": round(memory[0], 1), "last": round(memory[-1], 1),
            "most": round(max(soak.memory), 1), "trend": round(trend, 1),
        },
        "reloads": {**soak.reloads, "swapped": swapped, "kept": kept},
        "clients_killed": soak.clients_killed,
        "hostile": soak.hostile,
        "seconds": round(seconds),
        "stopping_s": round(stopping, 1),
        "exit_code": code,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    finish(
        {
            "name": "soak",
            "ratio": round(float(np.mean(ratios)), 3),
            "ours": round(float(np.mean(soak.medians())), 1),
            "alternative": round(float(np.mean(alone.medians())), 1),
            "unit": "ms, median round trip of eight valid clients in the soak, and alone",
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **figures,
        }
    )
    failed = {name: count for name, count in soak.outcomes.items() if name != "correct"}
    broken = {
        f"answers {failed}": bool(failed),
        f"exit code {code}": bool(code),
        f"memory trend {trend:.0f} MiB": trend > 100,
        f"{kept} damaged checkpoints refused": kept < soak.reloads["damaged"],
        f"{swapped} checkpoints swapped in": swapped < soak.reloads["good"] - 1,
    }
    if any(broken.values()):
        raise SystemExit(f"broken promises: {', '.join(text for text, is_broken in broken.items() if is_broken)}")


if __name__ == "__main__":
    main()
