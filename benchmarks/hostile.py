"""A server among strangers: malformed, cut, oversized, wrongly typed and hostile frames, and a client that behaves.

    python -m benchmarks.hostile CHECKPOINT [--frames 100000] [--quick]

The server is `agra serve` in a process of its own. Each frame has to be answered or its connection closed; the server's
resident memory is read every second, and the round trips of a well-behaved client are compared: alone and beside them,
in turns, because machines change their pace.
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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
import websockets
from websockets.asyncio.client import connect

from agra.serving.client import PolicyClient
from agra.serving.protocol.messages import InferRequest, RequestError, WireKeys, encode_request, parse_request
from agra.serving.protocol.wire import WireError, pack, unpack
from agra.types import Observation, PolicySpec
from benchmarks.serving import serving
from benchmarks.side_by_side import finish

ROUNDS = 10
PATIENCE = 60.0  # seconds; a frame without answer or close after that is lost


class Strangers:
    """Makes frames, a kind at a time in turn, from a seed. None of them is a request that `spec`'s policy could answer."""

    def __init__(self, valid: dict, spec: PolicySpec, seed: int) -> None:
        self.random, self.valid, self.whole, self.spec = random.Random(seed), valid, pack(valid), spec
        self.kinds = [getattr(self, name) for name in sorted(vars(Strangers)) if name.startswith("_kind")]

    def frame(self, number: int) -> bytes | str:
        """Frame `number`; what happens to be right after all, such as one with other pixels, is made anew."""
        make = self.kinds[number % len(self.kinds)]
        while self._is_right(frame := make()):
            pass
        return frame

    def _is_right(self, frame: bytes | str) -> bool:
        if isinstance(frame, str):
            return False
        try:
            parse_request(unpack(frame), self.spec, WireKeys())
        except (WireError, RequestError):
            return False
        return True

    def _kind_noise(self) -> bytes:
        return self.random.randbytes(self.random.randrange(2000))

    def _kind_cut(self) -> bytes:
        return self.whole[: self.random.randrange(len(self.whole))]

    def _kind_flipped(self) -> bytes:
        data = bytearray(self.whole)
        for _ in range(self.random.randint(1, 20)):
            data[self.random.randrange(min(400, len(data)))] = self.random.randrange(256)
        return bytes(data)

    def _kind_too_large(self) -> bytes:
        # Rarely as large as it gets: what is refused by its announced size costs nobody anything.
        return bytes(9 * 2**20) if self.random.random() < 0.01 else bytes(2**12)

    def _kind_wrongly_typed(self) -> bytes:
        values = (None, True, -1, 2**63, 1e308, "x" * 8000, [], {}, [[[]]], b"x", np.zeros(3), np.full(10, np.nan))
        return pack({**self.valid, self.random.choice(list(self.valid)): self.random.choice(values)})

    def _kind_wrong_array(self) -> bytes:
        shape = self.random.choice(([2**31, 2**31], [-1], [10**9], ["a"], [1] * 300, [[1]], None))
        dtype = self.random.choice(("|O", "|V9", "f4,f4", "S999999999", "<f4", "<M8[s]", 3, ""))
        array = {b"__ndarray__": True, b"data": bytes(40), b"dtype": dtype, b"shape": shape}
        return msgpack.packb({**dict.fromkeys(self.valid, 0), "observation/state": array})

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

    def _kind_missing(self) -> bytes:
        kept = self.random.sample(list(self.valid), self.random.randrange(len(self.valid)))
        return pack({key: self.valid[key] for key in kept})

    def _kind_many_keys(self) -> bytes:
        return pack({**self.valid, **{str(i): i for i in range(self.random.choice((5, 200, 400)))}, "prompt": 3})

    def _kind_long_prompt(self) -> bytes:
        return pack({**self.valid, "prompt": "word " * self.random.choice((30, 190, 300))})


async def attack(address: str, strangers: Strangers, first: int, count: int, step: int, found: Counter) -> None:
    """Frames first, first + step, ... over one connection after another."""
    connection = None
    for number in range(first, count, step):
        if number % 997 == 0:
            await asyncio.to_thread(knock, address)
        data, outcome = strangers.frame(number), None
        while outcome is None:
            fresh = connection is None
            if connection is None:
                connection = await connect(
                    address, compression=None, max_size=None, open_timeout=PATIENCE, close_timeout=1
                )
                await connection.recv()
            try:
                await connection.send(data)
                async with asyncio.timeout(PATIENCE):
                    outcome = "told" if isinstance(await connection.recv(), str) else "served"
            except websockets.ConnectionClosed:
                # One that was closed because of an earlier frame says nothing of this one, which goes to the next.
                outcome, connection = "closed" if fresh else None, None
            except TimeoutError:
                outcome, connection = "lost", None
        found[outcome] += 1
    if connection is not None:
        await connection.close()


def knock(address: str) -> None:
    """Bytes that are no HTTP, and a connection that is left half open."""
    parts = urlsplit(address)
    for data in (b"\x00" * 5000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500, b"GET "):
        with socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE) as stranger:
            try:
                stranger.sendall(data)
            except OSError:
                continue


def behave(address: str, observation: Observation, stop: Any, seconds: float | None) -> list[float]:
    """Ask ten times a second until the event `stop` is set, or for so long; the round trips in ms."""
    client, trips, start = PolicyClient(address, timeout=PATIENCE), [], time.perf_counter()
    while not stop.is_set() and (seconds is None or time.perf_counter() - start < seconds):
        sent = time.perf_counter()
        client.act(observation)
        trips.append(1000 * (time.perf_counter() - sent))
        time.sleep(max(0.0, 0.1 - (time.perf_counter() - sent)))
    client.close()
    return trips


def resident(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


async def run(address: str, pid: int, *, frames: int, connections: int, pause: float) -> dict:
    client = PolicyClient(address)
    embodiment, robot = next(iter(client.spec.embodiments.items()))
    client.close()
    observation = Observation(
        frame=np.zeros((64, 112, 3), np.uint8),
        state=np.zeros(robot.state_dim, np.float32),
        instruction="put the apple on the plate",
        embodiment=embodiment,
    )
    valid = encode_request(InferRequest(observation=observation, seed=1), WireKeys(), client.spec)
    found, memory = Counter(), []
    # The one that behaves lives in a process of its own: what the strangers do here must not slow it down.
    processes = multiprocessing.get_context("spawn")
    pool, stop = ProcessPoolExecutor(1, mp_context=processes), processes.Manager().Event()
    strangers = [Strangers(valid, client.spec, seed) for seed in range(connections)]
    trips: dict[str, list[list[float]]] = {"alone": [], "beside": []}
    seconds = 0.0

    def ask_well(lasting: float | None) -> "asyncio.Future[list[float]]":
        return asyncio.get_running_loop().run_in_executor(pool, behave, address, observation, stop, lasting)

    async def watch() -> None:
        while True:
            memory.append((sum(found.values()), resident(pid)))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await ask_well(5.0)  # the server's first answers are its slowest
    for part in range(ROUNDS):
        stop.clear()
        trips["alone"].append(await ask_well(pause))
        beside, start = ask_well(None), time.perf_counter()
        first, last = part * frames // ROUNDS, (part + 1) * frames // ROUNDS
        attacks = (attack(address, one, first + index, last, connections, found) for index, one in enumerate(strangers))
        await asyncio.gather(*attacks)
        seconds += time.perf_counter() - start
        stop.set()
        trips["beside"].append(await beside)
    watching.cancel()
    pool.shutdown()
    warm = [mib for done, mib in memory if done >= 0.2 * frames] or [mib for _, mib in memory]
    growth = float(np.polyfit(range(len(warm)), warm, 1)[0]) * len(warm) if len(warm) > 2 else 0.0
    medians = {name: [float(np.median(one)) for one in rounds] for name, rounds in trips.items()}
    return {
        "frames": dict(found),
        "seconds": round(seconds, 1),
        "memory_mib": {"first": round(warm[0], 1), "last": round(warm[-1], 1), "most": round(max(warm), 1)},
        "memory_trend_mib": round(growth, 2),
        "latency_ms": {
            name: [round(float(value), 1) for value in np.percentile(np.concatenate(rounds), [50, 95])]
            for name, rounds in trips.items()
        },
        "ratios": [round(alone / beside, 3) for alone, beside in zip(*medians.values(), strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="2,000 frames")
    options = parser.parse_args()
    frames, pause = (2000, 4.0) if options.quick else (options.frames, 20.0)
    with serving([options.checkpoint, "--threads", "1"]) as (address, process):
        found = asyncio.run(run(address, process.pid, frames=frames, connections=options.connections, pause=pause))
        alive = process.poll() is None
    print(found)
    alone, beside = found["latency_ms"]["alone"][0], found["latency_ms"]["beside"][0]
    finish(
        {
            "name": "hostile",
            "ratio": float(np.median(found["ratios"])),
            "ours": beside,
            "alternative": alone,
            "unit": "ms, median round trip of a well-behaved client beside the strangers, and alone",
            "spread": [min(found["ratios"]), max(found["ratios"])],
            "alive": alive,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **found,
        }
    )
    if not alive or found["frames"].get("lost"):
        raise SystemExit("the server left frames without an answer, or died")


if __name__ == "__main__":
    main()
