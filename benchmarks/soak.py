"""Half an hour of everything at once: clients of both wires, reloads, hostile bytes, a client that dies again and again.

    python -m benchmarks.soak [CHECKPOINT] [--minutes 30] [--quick]

The server is `agra serve --reload-interval` in a process of its own. Four clients ask on openpi's wire and four on GR00T's, ten times
a second at most, each about observations whose right answers were computed beforehand. Every minute the run folder gets a
newer checkpoint, every third of which is damaged and must change nothing. Beside them a hostile client sends malformed,
oversized and never-ending messages on both wires, and another client is killed in the middle of its requests. A wrong answer,
a lost one, a server that dies or one whose memory grows ends with exit code 1. The latency is compared with that of the same
eight clients alone, before.
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
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import websockets.exceptions
import zmq
from websockets.sync.client import connect

from agra import files
from agra.serving.client import PolicyClient
from agra.serving.protocol.messages import InferRequest, WireKeys, encode_request
from agra.serving.protocol.wire import pack_groot, unpack_groot
from agra.serving.protocol.zmtp import COMMAND, GREETING, LONG, MORE
from agra.types import Observation

CLIENTS = 4  # of each wire
PAUSE = 0.1  # seconds between a client's requests, at least
PATIENCE = 60.0  # seconds; an answer that takes longer is lost
KEY = "soak"
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


class GrootClient:
    """GR00T's wire as its simulator clients speak it: a REQ socket, one environment."""

    def __init__(self, port: int, camera: str, parts: list[str], annotation: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE))
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.camera, self.parts, self.annotation = camera, parts, annotation

    def call(self, endpoint: str, data: dict[str, Any]) -> Any:
        """The server's answer. Raises ValueError for its complaint, TimeoutError where none comes."""
        self.socket.send(pack_groot({"endpoint": endpoint, "data": data, "api_token": KEY}))
        try:
            answer = unpack_groot(self.socket.recv())
        except zmq.Again as error:
            raise TimeoutError(f"no answer within {PATIENCE:g} s") from error
        if isinstance(answer, dict) and "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def act(self, seen: Observation, seed: int, spans: dict[str, tuple[int, int]]) -> np.ndarray:
        """A new episode's first chunk."""
        self.call("reset", {"options": {"seed": seed}})
        state = {f"state.{part}": seen.state[None, a:b] for part, (a, b) in spans.items()}
        data = {f"video.{self.camera}": seen.frame[None], self.annotation: [seen.instruction], **state}
        return np.concatenate([*self.call("get_action", data).values()], axis=-1)


def behave(wire: str, ports: tuple[int, int], pool: list, spans: dict, number: int, stop: Any, results: Any) -> None:
    """One good client until the event `stop`: what became of its requests, and the round trips of each second."""
    order, outcomes, trips = np.random.default_rng(number), Counter(), []
    chunks = np.stack([chunk for *_, chunk in pool])
    close = 1e-3 * chunks.std()
    ws = PolicyClient(f"ws://127.0.0.1:{ports[0]}", timeout=PATIENCE, api_key=KEY)
    groot = GrootClient(ports[1], "ego_view", [*spans], "annotation.human.action.task_description")
    while not stop.is_set():
        index = int(order.integers(len(pool)))
        seen, seed, _ = pool[index]
        sent = time.perf_counter()
        try:
            if wire == "openpi":
                ws.reset(seed)
                answer = ws.act(seen).actions
            else:
                answer = groot.act(seen, seed, spans)
        except (ConnectionError, TimeoutError) as error:
            outcomes["lost"] += 1
            print(f"{wire} client {number}: {error}", flush=True)
        except ValueError as error:
            outcomes["refused"] += 1
            print(f"{wire} client {number}: {error}", flush=True)
        else:
            trips.append(time.perf_counter() - sent)
            away = np.abs(chunks - answer).max((1, 2))
            outcomes["right" if away[index] < close and away.argmin() == index else "wrong"] += 1
        time.sleep(max(0.0, PAUSE - (time.perf_counter() - sent)))
    results.put((wire, dict(outcomes), trips))


def harm(ports: tuple[int, int], valid: dict, spec: Any, stop: Any, results: Any) -> None:
    """Hostile bytes on both wires, in turn, without end."""
    from benchmarks.hostile import Strangers

    strangers, made, rng = Strangers(valid, spec, 0), Counter(), random.Random(0)
    kinds = (_frames, _many_parts, _never_ending, _large, _handshakes, _noise)
    number = 0
    while not stop.is_set():
        kind = kinds[number % len(kinds)]
        number += 1
        try:
            made[kind.__name__.strip("_")] += kind(ports, strangers, rng, number)
        except (OSError, websockets.exceptions.WebSocketException):
            made["closed"] += 1
        time.sleep(0.02)
    results.put(("hostile", dict(made), []))


def _frames(ports: tuple[int, int], strangers: Any, rng: random.Random, number: int) -> int:
    """Malformed, cut and wrongly typed frames on openpi's wire."""
    headers = {"Authorization": f"Api-Key {KEY}"}
    for index in range(15):
        with connect(f"ws://127.0.0.1:{ports[0]}", compression=None, additional_headers=headers) as connection:
            connection.recv(timeout=PATIENCE)
            with suppress(websockets.exceptions.ConnectionClosed):
                connection.send(strangers.frame(100 * number + index))
                connection.recv(timeout=PATIENCE)
    return 15


def _many_parts(ports: tuple[int, int], strangers: Any, rng: random.Random, number: int) -> int:
    """One ZeroMQ message of many large parts, without a key."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(f"tcp://127.0.0.1:{ports[1]}")
    dealer.send_multipart([bytes(2**20)] * 50, copy=False)
    dealer.poll(200)
    dealer.close()
    return 1


def _groot_stranger(port: int) -> socket.socket:
    stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
    stranger.sendall(GREETING + bytes([COMMAND | LONG]) + struct.pack(">Q", len(READY)) + READY)
    return stranger


def _never_ending(ports: tuple[int, int], strangers: Any, rng: random.Random, number: int) -> int:
    """A request of 8 MiB that stops after a part of it."""
    with _groot_stranger(ports[1]) as stranger:
        stranger.sendall(bytes([MORE, 0, LONG]) + struct.pack(">Q", 8 * 2**20) + bytes(rng.randrange(2 * 2**20)))
    return 1


def _large(ports: tuple[int, int], strangers: Any, rng: random.Random, number: int) -> int:
    """A frame of almost 8 MiB that is no request, and one that is larger than that."""
    headers = {"Authorization": f"Api-Key {KEY}"}
    for size in (8 * 2**20 - 100, 9 * 2**20):
        with connect(f"ws://127.0.0.1:{ports[0]}", compression=None, additional_headers=headers) as connection:
            connection.recv(timeout=PATIENCE)
            with suppress(websockets.exceptions.ConnectionClosed):
                connection.send(bytes(size))
                connection.recv(timeout=PATIENCE)
    return 2


def _handshakes(ports: tuple[int, int], strangers: Any, rng: random.Random, number: int) -> int:
    """Connections that are left half open."""
    left = []
    for port in ports * 5:
        left.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        left[-1].sendall(b"GET / HTTP/1.1\r\n" + bytes(rng.randrange(200)))
    for one in left:
        one.close()
    return len(left)


def _noise(ports: tuple[int, int], strangers: Any, rng: random.Random, number: int) -> int:
    """Noise after the handshake of GR00T's wire."""
    with _groot_stranger(ports[1]) as stranger:
        stranger.sendall(rng.randbytes(rng.randrange(5000)))
        while stranger.recv(2**16):
            pass
    return 1


def resident(pid: int) -> float:
    """Resident memory of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


class Checkpoints:
    """A run folder that gets a newer checkpoint whenever asked; every third one is damaged."""

    def __init__(self, source: Path, run: Path) -> None:
        self.source, self.run, self.step = source, run, 0
        self.add()

    def add(self) -> str:
        """Add the next one in one rename; what it is."""
        self.step += 1
        kind = ("good", "good", "damaged")[self.step % 3] if self.step > 1 else "good"
        folder = self.run / f".step_{self.step:06d}.copying"
        shutil.copytree(self.source, folder)
        if kind == "damaged":
            name, content = (("norm_stats.json", b"{}"), ("config.json", b"[]"))[self.step % 2]
            (folder / name).write_bytes(content)
            listed = json.loads((folder / "manifest.json").read_text())
            listed[name] = files.sha256(folder / name)
            files.write_text(folder / "manifest.json", json.dumps(listed))
        folder.rename(self.run / f"step_{self.step:06d}")
        for old in range(self.step - 3):
            shutil.rmtree(self.run / f"step_{old:06d}", ignore_errors=True)
        return kind


def phase(
    seconds: float,
    ports: tuple[int, int],
    server: subprocess.Popen,
    pool: list,
    spans: dict,
    hostile: Any,
    checkpoints: Any,
) -> dict[str, Any]:
    """Eight good clients for so long; with `hostile` (a valid request and the spec) everything else beside them."""
    processes = multiprocessing.get_context("spawn")
    stop, results = processes.Event(), processes.Queue()
    good = [
        processes.Process(target=behave, args=(wire, ports, pool, spans, number, stop, results), daemon=True)
        for number, wire in enumerate(("openpi", "groot") * CLIENTS)
    ]
    others = (
        [] if hostile is None else [processes.Process(target=harm, args=(ports, *hostile, stop, results), daemon=True)]
    )
    for process in (*good, *others):
        process.start()
    memory, reloads, kills = [], Counter(), 0
    begun, next_reload = time.monotonic(), 60.0
    while (passed := time.monotonic() - begun) < seconds and server.poll() is None:
        if hostile is not None:
            kills += _die(processes, ports, pool, spans)
            if passed > next_reload or (seconds < 120 and not reloads):
                next_reload += 60
                reloads[checkpoints.add()] += 1
        memory.append(resident(server.pid))
        time.sleep(1)
    stop.set()
    outcomes, trips, made = Counter(), {"openpi": [], "groot": []}, {}
    for _ in (*good, *others):
        wire, found, own = results.get(timeout=2 * PATIENCE)
        if wire == "hostile":
            made = found
        else:
            outcomes.update(found)
            trips[wire] += own
    for process in (*good, *others):
        process.join(10)
    return {
        "outcomes": dict(outcomes),
        "trips": trips,
        "memory": memory,
        "reloads": reloads,
        "kills": kills,
        "hostile": made,
    }


def _die(processes: Any, ports: tuple[int, int], pool: list, spans: dict) -> int:
    """A client of each wire, killed at some moment of its first second, with a request under way."""
    stop, results = processes.Event(), processes.Queue()
    wire = random.choice(("openpi", "groot"))
    client = processes.Process(target=behave, args=(wire, ports, pool, spans, 99, stop, results), daemon=True)
    client.start()
    threading.Timer(random.uniform(3.0, 6.0), client.kill).start()
    client.join()
    return 1


def start(run: Path, log: Path) -> tuple[subprocess.Popen, tuple[int, int]]:
    """The server and its two ports. Raises RuntimeError with its log where it does not start."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "agra.cli",
        "serve",
        str(run),
        "--port",
        str(ports[0]),
        "--groot-port",
        str(ports[1]),
    ]
    command += ["--reload-interval", "2", "--threads", "1"]
    server = subprocess.Popen(
        command, stdout=log.open("w"), stderr=subprocess.STDOUT, env={**os.environ, "AGRA_API_KEY": KEY}
    )
    while "serving" not in log.read_text():
        if server.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.5)
    return server, (ports[0], ports[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="tabletop-agra")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="twenty seconds, one reload")
    options = parser.parse_args()
    # Here, because the clients' processes import this module too and need no torch.
    from agra.policies.load import load_policy
    from agra.training import checkpoint
    from benchmarks.serving import make_pool

    alone_for, soak_for = (8.0, 20.0) if options.quick else (60.0, 60 * options.minutes)
    policy = load_policy(options.checkpoint)
    pool = make_pool(policy, 16)
    spans = dict(next(iter(policy.spec.embodiments.values())).state)
    valid = encode_request(InferRequest(observation=pool[0][0], seed=1), WireKeys(), policy.spec)
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        checkpoints = Checkpoints(checkpoint.resolve(options.checkpoint), run)
        server, ports = start(run, log)
        try:
            alone = phase(alone_for, ports, server, pool, spans, None, None)
            soak = phase(soak_for, ports, server, pool, spans, (valid, policy.spec), checkpoints)
            begun = time.monotonic()
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
            stopping = time.monotonic() - begun
        finally:
            server.kill()
        text = log.read_text()
    report(alone, soak, code, stopping, text, soak_for)


def report(alone: dict, soak: dict, code: int, stopping: float, log: str, seconds: float) -> None:
    """Print the figures and the JSON line; exit code 1 where something that is promised did not hold."""
    from benchmarks.side_by_side import finish

    latency = {
        name: {
            wire: [round(1000 * float(v), 1) for v in np.percentile(t, [50, 95, 100])]
            for wire, t in one["trips"].items()
        }
        for name, one in (("alone", alone), ("soak", soak))
    }
    medians = {
        name: [1000 * float(np.median(t)) for t in one["trips"].values()] for name, one in (("a", alone), ("s", soak))
    }
    ratios = [a / s for a, s in zip(medians["a"], medians["s"], strict=True)]
    memory = soak["memory"][len(soak["memory"]) // 5 :]
    growth = float(np.polyfit(range(len(memory)), memory, 1)[0]) * len(memory) if len(memory) > 2 else 0.0
    swaps, kept = log.count("gave way to"), log.count("kept the policy that serves")
    figures = {
        "answers": soak["outcomes"],
        "latency_ms_p50_p95_max": latency,
        "memory_mib": {
            "alone": round(alone["memory"][-1], 1), "first": round(memory[0], 1), "last": round(memory[-1], 1),
            "most": round(max(soak["memory"]), 1), "trend": round(growth, 1),
        },
        "reloads": {**soak["reloads"], "swapped": swaps, "kept": kept},
        "clients_killed": soak["kills"],
        "hostile": soak["hostile"],
        "seconds": round(seconds),
        "stopping_s": round(stopping, 1),
        "exit_code": code,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    finish(
        {
            "name": "soak",
            "ratio": round(float(np.mean(ratios)), 3),
            "ours": round(float(np.mean(medians["s"])), 1),
            "alternative": round(float(np.mean(medians["a"])), 1),
            "unit": "ms, median round trip of eight good clients in the soak, and alone",
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **figures,
        }
    )
    bad = {name: count for name, count in soak["outcomes"].items() if name != "right"}
    expected = soak["reloads"]["damaged"]
    if bad or code or growth > 100 or kept < expected or swaps < soak["reloads"]["good"] - 1:
        raise SystemExit(
            f"not as promised: answers {bad}, exit code {code}, memory trend {growth:.0f} MiB, {kept} kept"
        )


if __name__ == "__main__":
    main()
