"""A policy with a different chunk for every observation, a server around it in a thread, and plain clients of it."""

import asyncio
import hashlib
import http.client
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import websockets.sync.client

from agra.serving.server.config import Limits
from agra.serving.server.service import PolicyService
from agra.serving.server.websocket import WebsocketServer
from agra.types import ActionChunk, EmbodimentSpec, Observation, PolicySpec

STATE, ACTION, HORIZON = 4, 3, 5


def spec(name="echo", *, state=STATE, action=ACTION, horizon=HORIZON):
    robot = EmbodimentSpec(state={"arm": (0, state - 1), "hand": (state - 1, state)}, action={"arm": (0, action)})
    return PolicySpec(name=name, horizon=horizon, frame_size=(32, 48), embodiments={"robot": robot})


def several_cameras(policy_spec=None, views=("wrist",)):
    """The description of a policy that also reads further cameras."""
    policy_spec = policy_spec or spec()
    robots = {name: replace(robot, views=views) for name, robot in policy_spec.embodiments.items()}
    return replace(policy_spec, embodiments=robots)


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
    """The chunk (HORIZON, ACTION) of an observation, a hash of its contents."""
    content = observation.frame.tobytes() + observation.state.tobytes() + observation.instruction.encode()
    digest = hashlib.sha256(content).digest()
    return np.frombuffer(digest, np.uint8)[: HORIZON * ACTION].reshape(HORIZON, ACTION).astype(np.float32)


class Echo:
    """Answers `expected` after `seconds`. Records batches, seeds and continuations."""

    def __init__(self, policy_spec=None, *, seconds=0.0, offset=0.0):
        self.spec, self.seconds, self.offset = policy_spec or spec(), seconds, offset
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
    """A server in a thread. `call` runs a coroutine in its event loop."""

    def __init__(self, policy, limits=None, **options):
        self.policy, self.limits, self.options = policy, limits or Limits(), options
        self.loop = asyncio.new_event_loop()
        self.service = self.server = None

    @property
    def address(self):
        return self.server.address

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
    server = Running(policy, limits, **options)
    thread = threading.Thread(target=server.loop.run_forever, daemon=True)
    thread.start()
    try:
        server.call(server.start())
        yield server
        server.call(server.stop())
    finally:
        server.loop.call_soon_threadsafe(server.loop.stop)
        thread.join(10)
        server.loop.close()


def connect(server, **options):
    """A websocket client of a `Running` server."""
    return websockets.sync.client.connect(server.address, compression=None, max_size=None, **options)


def get(server, path, headers=None):
    """Status and body of an HTTP request to a `Running` server."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=10)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    return response.status, response.read().decode()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)
