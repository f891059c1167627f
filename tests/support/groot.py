"""GR00T's protocol in tests: a client and a server of N1.6 after its published protocol, a server of both protocols, and raw ZMTP bytes."""

import io
import socket
import struct
import threading

import msgpack
import numpy as np
import zmq

from agra.serving.protocol.zmtp import COMMAND, GREETING, LONG
from agra.serving.server.config import GrootWire
from agra.serving.server.groot import GrootServer
from tests.support.echo import observation, running

READY = b"\x05READY\x0bSocket-Type\x00\x00\x00"


class GrootClient:
    """Sends what GR00T's BaseInferenceClient sends: REQ socket, msgpack, arrays as .npy bytes."""

    def __init__(self, port, token=None, timeout=10_000):
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, timeout)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.token = token

    def call(self, endpoint, data=None):
        request = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        return self.send(msgpack.packb(request | ({"api_token": self.token} if self.token else {}), default=_encode))

    def send(self, data):
        self.socket.send(data)
        return msgpack.unpackb(self.socket.recv(), object_hook=_decode)


def _encode(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def _decode(entries):
    if "__ndarray_class__" in entries:
        return np.load(io.BytesIO(entries["as_npy"]), allow_pickle=False)
    return entries


class N16Server:
    """Answers as the policy server of GR00T-N1.6 does: calls an endpoint with the keys of `data`, and checks as strictly.

    `act` maps a checked observation {video, state, language} to actions by key, (B, K, d) float32 each.
    """

    def __init__(self, act, *, video, state, language, token=None):
        self.act, self.keys, self.token = act, {"video": video, "state": state, "language": [language]}, token
        self.requests = []
        self.socket = zmq.Context.instance().socket(zmq.REP)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *raised):
        client = GrootClient(self.port, self.token)
        client.call("kill")
        client.socket.close()
        self.thread.join(10)
        self.socket.close()

    def run(self):
        running = True
        while running:
            request = msgpack.unpackb(self.socket.recv(), object_hook=_decode)
            endpoints = {"get_action": self.get_action, "reset": lambda options=None: {}, "ping": dict}
            self.requests.append(request["endpoint"])
            running = request["endpoint"] != "kill"
            try:
                if self.token is not None and request.get("api_token") != self.token:
                    answer = {"error": "Unauthorized: Invalid API token"}
                else:
                    answer = endpoints[request["endpoint"]](**request["data"]) if running else None
            except (AssertionError, TypeError) as error:
                answer = {"error": str(error)}
            self.socket.send(msgpack.packb(answer, default=_encode))

    def get_action(self, observation, options=None):
        for modality, keys in self.keys.items():
            assert isinstance(observation[modality], dict), modality
            assert set(observation[modality]) >= set(keys), f"expected {keys}, got {list(observation[modality])}"
        for frames in observation["video"].values():
            assert frames.dtype == np.uint8, frames.dtype
            assert frames.ndim == 5, frames.shape
            assert (frames.shape[1], frames.shape[4]) == (1, 3), frames.shape
        for values in observation["state"].values():
            assert values.dtype == np.float32, values.dtype
            assert values.ndim == 3, values.shape
            assert values.shape[1] == 1, values.shape
        for texts in observation["language"].values():
            assert all(isinstance(text, list) and len(text) == 1 and isinstance(text[0], str) for text in texts), texts
        return [self.act(observation), {}]


class Both:
    """A running service of both protocols."""

    def __init__(self, policy, limits=None, *, api_key=None, **config):
        self.policy, self.limits, self.api_key, self.config = policy, limits, api_key, GrootWire(**config)

    def __enter__(self):
        self.context = running(self.policy, self.limits)
        self.server = self.context.__enter__()

        async def start():
            self.groot = GrootServer(self.server.service, port=0, config=self.config, api_key=self.api_key)
            await self.groot.start()

        self.server.call(start())
        return self

    def __exit__(self, *raised):
        self.server.call(self.groot.stop())
        self.context.__exit__(*raised)


def flat_observation(*seeds, batched=False):
    """Observations as N1.5 sends them. The state parts of the echo policy are arm (3) and hand (1)."""
    observations = [observation(seed) for seed in seeds]
    frames, states = (np.stack([getattr(o, name) for o in observations]) for name in ("frame", "state"))
    if batched:
        frames, states = frames[:, None], states[:, None]
    return {
        "video.ego_view": frames,
        "state.arm": states[..., :3],
        "state.hand": states[..., 3:],
        "annotation.human.action.task_description": ["go"] * len(seeds) if batched else ["go"],
    }


def zmtp_header(flags, size):
    return bytes([flags | LONG]) + struct.pack(">Q", size)


def zmtp_frame(flags, contents):
    return zmtp_header(flags, len(contents)) + contents


def handshake(both, kind=b"DEALER"):
    """A raw connection after the handshake of a socket of that kind."""
    raw = socket.create_connection(("127.0.0.1", both.groot.port), timeout=10)
    raw.sendall(GREETING + zmtp_frame(COMMAND, READY + bytes([len(kind)]) + kind))
    return raw
