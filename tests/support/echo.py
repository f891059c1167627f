"""A policy whose answers prove which observation they are for, and a server around it in a thread of its own."""

import asyncio
import hashlib
import threading
import time
from contextlib import contextmanager

import numpy as np

from agra.serving.server.websocket import WebsocketServer
from agra.serving.server.service import Limits, PolicyService
from agra.types import ActionChunk, EmbodimentSpec, Observation, PolicySpec

STATE, ACTION, HORIZON = 4, 3, 5


def spec(name="echo", *, state=STATE, action=ACTION, horizon=HORIZON):
    robot = EmbodimentSpec(state={"arm": (0, state - 1), "hand": (state - 1, state)}, action={"arm": (0, action)})
    return PolicySpec(name=name, horizon=horizon, frame_size=(32, 48), embodiments={"robot": robot})


def observation(seed=0, instruction="go", size=(32, 48)):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return Observation(
        frame=frame,
        state=rng.normal(size=STATE).astype(np.float32),
        instruction=instruction,
        embodiment="robot",
    )


def expected(observation):
    """(HORIZON, ACTION) that only this observation gets."""
    content = observation.frame.tobytes() + observation.state.tobytes() + observation.instruction.encode()
    digest = hashlib.sha256(content).digest()
    return np.frombuffer(digest, np.uint8)[: HORIZON * ACTION].reshape(HORIZON, ACTION).astype(np.float32)


class Echo:
    """Answers `expected`; notes batches, seeds and continuations. `seconds` is what a forward takes."""

    def __init__(self, given=None, *, seconds=0.0, offset=0.0):
        self.spec, self.seconds, self.offset = given or spec(), seconds, offset
        self.batches, self.seeds, self.continuations = [], [], []

    def episode(self, seed):
        self.seeds.append(seed)
        return seed

    def act_batch(self, requests):
        if any("impossible" in request.observation.instruction for request in requests):
            raise ValueError("instruction: nobody can do this")
        if any("crash" in request.observation.instruction for request in requests):
            raise RuntimeError("secret path /srv/weights")
        self.batches.append(len(requests))
        self.continuations += [request.continuation for request in requests]
        time.sleep(self.seconds)
        return [
            ActionChunk(
                actions=expected(r.observation) + np.float32(self.offset),
                timings={"action": self.seconds},
                imagined=np.full((3, 32, 48, 3), 9, np.uint8) if r.imagine else None,
            )
            for r in requests
        ]


class Running:
    """A server in a thread; `call` runs a coroutine in its loop."""

    def __init__(self, policy, limits=None, **options):
        self.policy, self.limits, self.options = policy, limits or Limits(), options
        self.loop = asyncio.new_event_loop()
        self.service = self.server = None

    @property
    def address(self):
        return f"ws://127.0.0.1:{self.server.port}"

    def call(self, coroutine, timeout=20):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    async def start(self):
        self.service = PolicyService(self.policy, self.limits)
        self.server = WebsocketServer(self.service, **{"port": 0, **self.options})
        await self.server.start()

    async def stop(self):
        await self.server.stop(2)
        await self.service.close()


@contextmanager
def running(policy, limits=None, **options):
    """A `Running` server, stopped at the end."""
    one = Running(policy, limits, **options)
    thread = threading.Thread(target=one.loop.run_forever, daemon=True)
    thread.start()
    try:
        one.call(one.start())
        yield one
        one.call(one.stop())
    finally:
        one.loop.call_soon_threadsafe(one.loop.stop)
        thread.join(10)
        one.loop.close()


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)
