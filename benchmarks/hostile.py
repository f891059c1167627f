"""The server under invalid traffic: malformed, truncated, oversized, wrongly typed and hostile frames beside a valid client.

    python -m benchmarks.hostile [CHECKPOINT] [--frames 100000] [--quick]

The server is `agra serve` in a process of its own. Each frame must get an error reply or its connection must be closed. The
server's resident memory is read every second. The round trips of a valid client are compared with and without hostile traffic, in
alternation, because machines change their pace.
"""

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import socket
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
import websockets
from websockets.asyncio.client import connect

from agra.serving.client import PolicyClient
from agra.serving.protocol.messages import InferRequest, WireKeys, encode_request
from agra.serving.protocol.validation import RequestError, parse_request
from agra.serving.protocol.wire import WireError, pack, unpack
from agra.types import Observation, PolicySpec
from benchmarks.serving import RunningServer, serving

TIMEOUT = 60.0  # seconds; a frame without reply or close after that is lost


class HostileFrames:
    """Generates invalid frames from a seed, each kind in turn. None of them is a valid request of the policy `spec`."""

    def __init__(self, valid: dict, spec: PolicySpec, seed: int) -> None:
        self.random, self.valid, self.encoded, self.spec = random.Random(seed), valid, pack(valid), spec
        self.kinds = [getattr(self, name) for name in sorted(vars(HostileFrames)) if name.startswith("_kind")]

    def frame(self, number: int) -> bytes | str:
        """Generate frame `number`. Drops valid frames, such as one with changed pixels."""
        make = self.kinds[number % len(self.kinds)]
        while self._is_valid(frame := make()):
            pass
        return frame

    def _is_valid(self, frame: bytes | str) -> bool:
        if isinstance(frame, str):
            return False
        try:
            parse_request(unpack(frame), self.spec, WireKeys())
        except (WireError, RequestError):
            return False
        return True

    def _kind_noise(self) -> bytes:
        return self.random.randbytes(self.random.randrange(2000))

    def _kind_truncated(self) -> bytes:
        return self.encoded[: self.random.randrange(len(self.encoded))]

    def _kind_flipped(self) -> bytes:
        data = bytearray(self.encoded)
        for _ in range(self.random.randint(1, 20)):
            data[self.random.randrange(min(400, len(data)))] = self.random.randrange(256)
        return bytes(data)

    def _kind_too_large(self) -> bytes:
        # Rarely the full size: a message refused by its announced size is cheap for the server.
        return bytes(9 * 2**20) if self.random.random() < 0.01 else bytes(2**12)

    def _kind_wrongly_typed(self) -> bytes:
        values = (None, True, -1, 2**63, 1e308, "x" * 8000, [], {}, [[[]]], b"x", np.zeros(3), np.full(10, np.nan))
        return pack({**self.valid, self.random.choice(list(self.valid)): self.random.choice(values)})

    def _kind_wrong_array(self) -> bytes:
        shape = self.random.choice(([2**31, 2**31], [-1], [10**9], ["a"], [1] * 300, [[1]], None))
        dtype = self.random.choice(("|O", "|V9", "f4,f4", "S999999999", "<f4", "<M8[s]", 3, ""))
        array = {b"__ndarray__": True, b"data": bytes(40), b"dtype": dtype, b"shape": shape}
        frame = msgpack.packb({**dict.fromkeys(self.valid, 0), "observation/state": array})
        assert frame is not None
        return frame

    def _kind_bomb(self) -> bytes:
        return self.random.choice(
            (
                b"\x91" * 100_000,
                b"\xdd\xff\xff\xff\xff",
                b"\xdf\xff\xff\xff\xff",
                b"\xc6\xff\xff\xff\xff",
                (b"\xdc\x00\xff" + b"\x90" * 255) * 400,
                b"\xdc\x01\x00" + b"\x80" * 256,
            )
        )

    def _kind_pickle(self) -> bytes:
        return b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."

    def _kind_text(self) -> str:
        return self.random.choice(("", "{}", '{"prompt": "go"}', "\x00" * 100, "ä" * 3000))

    def _kind_missing_keys(self) -> bytes:
        keys = self.random.sample(list(self.valid), self.random.randrange(len(self.valid)))
        return pack({key: self.valid[key] for key in keys})

    def _kind_many_keys(self) -> bytes:
        return pack({**self.valid, **{str(i): i for i in range(self.random.choice((5, 200, 400)))}, "prompt": 3})

    def _kind_long_prompt(self) -> bytes:
        return pack({**self.valid, "prompt": "word " * self.random.choice((30, 190, 300))})


async def attack(address: str, frames: HostileFrames, numbers: range, outcomes: Counter) -> None:
    """Send the frames of these numbers, over a new connection after each close."""
    connection = None
    for number in numbers:
        if number % 997 == 0:
            await asyncio.to_thread(connect_badly, address)
        data, outcome = frames.frame(number), None
        while outcome is None:
            fresh = connection is None
            if connection is None:
                connection = await connect(
                    address, compression=None, max_size=None, open_timeout=TIMEOUT, close_timeout=1
                )
                await connection.recv()
            try:
                await connection.send(data)
                async with asyncio.timeout(TIMEOUT):
                    outcome = "error_reply" if isinstance(await connection.recv(), str) else "answered"
            except websockets.ConnectionClosed:
                # A connection that was closed by an earlier frame says nothing about this one, which is sent again.
                outcome, connection = "closed" if fresh else None, None
            except TimeoutError:
                outcome, connection = "lost", None
        outcomes[outcome] += 1
    if connection is not None:
        await connection.close()


def connect_badly(address: str) -> None:
    """Send bytes that are not HTTP, too many headers, and a handshake that stops halfway."""
    parts = urlsplit(address)
    for data in (b"\x00" * 5000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500, b"GET "):
        with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT) as connection:
            try:
                connection.sendall(data)
            except OSError:
                continue


def run_valid_client(address: str, observation: Observation, stop: Any, seconds: float | None) -> list[float]:
    """Send ten valid requests per second for `seconds`, or until `stop` is set. Returns the round trips in ms."""
    client, trips, start = PolicyClient(address, timeout=TIMEOUT), [], time.perf_counter()
    while not stop.is_set() and (seconds is None or time.perf_counter() - start < seconds):
        sent = time.perf_counter()
        client.act(observation)
        trips.append(1000 * (time.perf_counter() - sent))
        time.sleep(max(0.0, 0.1 - (time.perf_counter() - sent)))
    client.close()
    return trips


async def measure(server: RunningServer, *, frames: int, connections: int, rounds: int, alone_seconds: float) -> dict:
    """Alternate between the valid client alone and beside the hostile frames. Returns the figures."""
    client = PolicyClient(server.address)
    embodiment, robot = next(iter(client.spec.embodiments.items()))
    client.close()
    observation = Observation(
        frame=np.zeros((64, 112, 3), np.uint8),
        state=np.zeros(robot.state_dim, np.float32),
        instruction="put the apple on the plate",
        embodiment=embodiment,
    )
    valid = encode_request(InferRequest(observation=observation, seed=1), WireKeys(), client.spec)
    outcomes, memory = Counter(), []
    # The valid client has a process of its own, so that the work of the attackers here does not delay it.
    processes = multiprocessing.get_context("spawn")
    pool, stop = ProcessPoolExecutor(1, mp_context=processes), processes.Manager().Event()
    attackers = [HostileFrames(valid, client.spec, seed) for seed in range(connections)]
    trips: dict[str, list[list[float]]] = {"alone": [], "beside": []}
    seconds = 0.0

    def run_client(duration: float | None) -> "asyncio.Future[list[float]]":
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(pool, run_valid_client, server.address, observation, stop, duration)

    async def watch_memory() -> None:
        while True:
            memory.append((outcomes.total(), server.memory()))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch_memory())
    await run_client(min(5.0, alone_seconds))  # warm-up
    for part in range(rounds):
        stop.clear()
        trips["alone"].append(await run_client(alone_seconds))
        beside, start = run_client(None), time.perf_counter()
        first, last = part * frames // rounds, (part + 1) * frames // rounds
        attacks = (
            attack(server.address, attacker, range(first + index, last, connections), outcomes)
            for index, attacker in enumerate(attackers)
        )
        await asyncio.gather(*attacks)
        seconds += time.perf_counter() - start
        stop.set()
        trips["beside"].append(await beside)
    watching.cancel()
    pool.shutdown()
    warm = [mib for sent, mib in memory if sent >= 0.2 * frames] or [mib for _, mib in memory]
    trend = float(np.polyfit(range(len(warm)), warm, 1)[0]) * len(warm) if len(warm) > 2 else 0.0
    medians = {name: [float(np.median(times)) for times in parts] for name, parts in trips.items()}
    return {
        "frames": dict(outcomes),
        "seconds": round(seconds, 1),
        "memory_mib": {"first": round(warm[0], 1), "last": round(warm[-1], 1), "most": round(max(warm), 1)},
        "memory_trend_mib": round(trend, 2),
        "latency_ms": {
            name: [round(float(value), 1) for value in np.percentile(np.concatenate(parts), [50, 95])]
            for name, parts in trips.items()
        },
        "ratios": [round(alone / beside, 3) for alone, beside in zip(*medians.values(), strict=True)],
    }


def main() -> None:
    from benchmarks.side_by_side import finish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="tabletop-agra")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="600 frames in 2 rounds")
    options = parser.parse_args()
    frames, rounds, alone_seconds = (600, 2, 2.0) if options.quick else (options.frames, 10, 20.0)
    with serving([options.checkpoint, "--threads", "1"]) as server:
        figures = asyncio.run(
            measure(server, frames=frames, connections=options.connections, rounds=rounds, alone_seconds=alone_seconds)
        )
        alive = server.process.poll() is None
    print(figures)
    finish(
        {
            "name": "hostile",
            "ratio": float(np.median(figures["ratios"])),
            "ours": figures["latency_ms"]["beside"][0],
            "alternative": figures["latency_ms"]["alone"][0],
            "unit": "ms, median round trip of a valid client beside hostile frames, and alone",
            "spread": [min(figures["ratios"]), max(figures["ratios"])],
            "alive": alive,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **figures,
        }
    )
    if not alive or figures["frames"].get("lost"):
        raise SystemExit("the server died, or left frames without a reply")


if __name__ == "__main__":
    main()
