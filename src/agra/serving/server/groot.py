"""GR00T's ZMQ wire (N1.5 and N1.6), so that its simulator clients can evaluate our policies.            fact 9

A request is a msgpack map {endpoint, data, api_token}; endpoints are ping, get_action, reset and get_modality_config. An
observation names its parts: `video.<camera>` (T, H, W, 3) uint8, `state.<part>` (T, d), and a text `annotation.<...>`.
N1.6 sends {observation, options} and wants [action, info] back; its observation may also nest the parts, {"video": {...},
"state": {...}, "language": {...}}, and then the answer's keys lack `action.`. Everything may have a batch axis in front.
Only the newest of T is looked at. The answer has `action.<part>` (K, d). `kill` is refused: whoever can reach the port
must not be able to end the server. Each connection is served one request at a time; what it sends meanwhile waits unread.
"""

import asyncio
import hmac
import json
import logging
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agra.serving.protocol.messages import MAX_INSTRUCTION, Question, RequestError, frame, numbers, text
from agra.serving.server.service import Busy, Episode, PolicyService, check_key, failure
from agra.serving.protocol.wire import pack_groot, unpack_groot
from agra.serving.protocol.zmtp import Peer, ProtocolError
from agra.types import EmbodimentSpec, Observation, PolicySpec

log = logging.getLogger("agra.serving")
WIRE = "groot"
MAX_BATCH = 64  # environments in one request
MAX_HANDSHAKES = 128  # connections beyond the clients' that may be open
LAST_WORDS = 0.5  # seconds in which clients of a stopping server are told
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds, and probes: the place of a client whose machine died is free after a minute."""


@dataclass(frozen=True, kw_only=True)
class GrootNames:
    """How GR00T's clients name what the policy takes, and whose form `get_modality_config` answers in."""

    camera: str = "ego_view"
    annotation: str = "human.action.task_description"
    version: Literal["n1.5", "n1.6"] = "n1.6"
    """N1.5 reads a JSON text with full keys; N1.6 and later a map with the bare names of their parts. The request is the
    same, and neither client reads the other's answer."""


class GrootServer:
    """Serves a `PolicyService` to GR00T's clients, each on a connection of its own with its own queue and episodes."""

    def __init__(
        self,
        service: PolicyService,
        *,
        host: str = "127.0.0.1",
        port: int = 5555,
        embodiment: str | None = None,
        names: GrootNames | None = None,
        api_key: str | None = None,
    ) -> None:
        known = service.spec.embodiments
        if embodiment is None and len(known) > 1:
            raise ValueError(f"GR00T's wire names no embodiment: choose one of {', '.join(known)}")
        self.embodiment = embodiment or next(iter(known))
        if self.embodiment not in known:
            raise ValueError(f"embodiment: expected one of {', '.join(known)}, got {self.embodiment!r}")
        self.service, self.host, self.port = service, host, port
        self.names = names or GrootNames()
        self._key = check_key(api_key)
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._clients = 0

    async def start(self) -> None:
        """Listen; `port` is then the real one, where 0 was asked for. Raises OSError where the port is taken."""
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close all connections; `PolicyService.drain` before it waits for the answers.

        Clients that ask on are told first: their sockets would wait for ever for an answer of a server that went away.
        """
        if self._server is None:
            return
        self._server.close()
        if self._open:
            await asyncio.wait([*self._open], timeout=LAST_WORDS)
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait([*self._open], timeout=1.0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        task.add_done_callback(self._open.pop)
        limits, seated = self.service.limits, False
        try:
            # Without a handshake libzmq keeps a client's request and tries again; after one it would be lost.
            full = self._clients >= limits.max_connections or len(self._open) > limits.max_connections + MAX_HANDSHAKES
            if full or self.service.draining:
                return
            _keep_alive(writer.get_extra_info("socket"))
            peer = Peer(reader, writer, max_message=limits.max_message)
            async with asyncio.timeout(limits.handshake_timeout):
                await peer.shake_hands()
            if self._clients >= limits.max_connections:
                return
            seated = True
            self._clients += 1
            self.service.connections.inc()
            await self._serve(peer)
        except (ProtocolError, EOFError, ConnectionError, TimeoutError) as error:
            log.debug("a connection on GR00T's wire ended: %s", error)
        finally:
            if seated:
                self._clients -= 1
                self.service.connections.dec()
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _serve(self, peer: Peer) -> None:
        limits, episodes, bad = self.service.limits, [Episode(0)], 0
        while bad < limits.max_bad_requests:
            async with asyncio.timeout(limits.idle_timeout):
                size = await peer.header()
            late = self.service.draining
            async with self.service.room if size > limits.share else nullcontext():
                answered = await self._serve_one(peer, size, episodes, late=late)
            if late:
                return
            bad = 0 if answered else bad + 1

    async def _serve_one(self, peer: Peer, size: int, episodes: list[Episode], *, late: bool) -> bool:
        """Read one request and answer it; whether it was answered well. One that came `late` is told so."""
        async with asyncio.timeout(self.service.limits.receive_timeout):
            data = [await peer.body(size)]
        with self.service.working():
            try:
                if late:
                    raise Busy("busy: the server is stopping")
                outcome, reply = "answered", await self._answer(unpack_groot(data.pop()), episodes)
            except Exception as error:  # the policy's, of whatever kind: the other clients must not suffer from it
                outcome, told = failure(error)
                reply = {"error": told}
            await self.service.settle(WIRE, outcome)
            async with asyncio.timeout(self.service.limits.send_timeout):
                await peer.send(pack_groot(reply))
        return outcome == "answered"

    async def _answer(self, message: Any, episodes: list[Episode]) -> Any:
        if not isinstance(message, dict):
            raise RequestError("request: expected a map with 'endpoint' and 'data'")
        if self._key is not None:
            given = message.get("api_token")
            if not isinstance(given, str) or not hmac.compare_digest(given.encode(), self._key):
                raise RequestError("api_token: missing or wrong")
        endpoint, data = message.get("endpoint", "get_action"), message.get("data") or {}
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "get_modality_config":
            return modality_config(self.service.spec, self.embodiment, self.names)
        if not isinstance(data, dict):
            raise RequestError("data: expected a map")
        if endpoint == "reset":
            options = data.get("options")
            seed = options.get("seed", 0) if isinstance(options, dict) else 0
            if type(seed) is not int or not 0 <= seed < 2**63:
                raise RequestError("options.seed: expected a whole number from 0")
            episodes[:] = [Episode(seed)]
            return {}
        if endpoint != "get_action":
            known = "ping, get_action, reset and get_modality_config"
            raise RequestError(f"endpoint: expected one of {known}, got {str(endpoint)[:40]!r}")
        wrapped = isinstance(data.get("observation"), dict)
        observation = data["observation"] if wrapped else data
        nested = isinstance(observation.get("video"), dict)
        actions = await self._act(flatten(observation), episodes, nested=nested)
        return [actions, {}] if wrapped else actions

    async def _act(self, observation: Mapping[str, Any], episodes: list[Episode], *, nested: bool) -> dict[str, Any]:
        robot = self.service.spec.embodiments[self.embodiment]
        seen, batched = read_observation(observation, robot, self.embodiment, self.names)
        while len(episodes) < len(seen):  # each environment of a batch has random numbers of its own
            episodes.append(Episode(episodes[0].seed + len(episodes)))
        chunks = await asyncio.gather(
            *(
                self.service.answer(Question(observation=one), episode)
                for one, episode in zip(seen, episodes, strict=False)
            )
        )
        actions = np.stack([chunk.actions for chunk, _ in chunks])
        actions = actions if batched else actions[0]
        return {f"{'' if nested else 'action.'}{part}": actions[..., a:b] for part, (a, b) in robot.action.items()}


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def flatten(observation: Mapping[str, Any]) -> dict[str, Any]:
    """N1.6's nested observation under N1.5's names; texts of N1.6 are lists of lists."""
    found: dict[str, Any] = {}
    for key, value in observation.items():
        if key in ("video", "state") and isinstance(value, dict):
            found |= {f"{key}.{name}": part for name, part in value.items()}
        elif key == "language" and isinstance(value, dict):
            for name, part in value.items():
                texts = (
                    [one[-1] if isinstance(one, list) and one else one for one in part]
                    if isinstance(part, list)
                    else part
                )
                found[str(name) if str(name).startswith("annotation.") else f"annotation.{name}"] = texts
        else:
            found[str(key)] = value
    return found


def read_observation(
    given: Mapping[str, Any], robot: EmbodimentSpec, embodiment: str, names: GrootNames
) -> tuple[list[Observation], bool]:
    """One observation an environment, and whether there was a batch axis. Raises RequestError naming the key."""
    video, annotation = f"video.{names.camera}", _annotation(given, names)
    needed = [video, *(f"state.{part}" for part in robot.state), annotation]
    if missing := [key for key in needed if key not in given]:
        raise RequestError(f"{missing[0]}: missing; expected the keys {', '.join(needed)}")
    pictures = given[video]
    if not isinstance(pictures, np.ndarray) or pictures.ndim not in (4, 5) or 0 in pictures.shape:
        raise RequestError(f"{video}: expected (T, H, W, 3) or (B, T, H, W, 3) uint8, got {_kind(pictures)}")
    batched = pictures.ndim == 5
    newest = pictures[:, -1] if batched else pictures[-1:]
    count = len(newest)
    if count > MAX_BATCH:
        raise RequestError(f"{video}: expected at most {MAX_BATCH} environments, got {count}")
    state = np.zeros((count, robot.state_dim), np.float32)
    for part, (start, end) in robot.state.items():
        values = numbers(
            f"state.{part}", given[f"state.{part}"], (count, "T", end - start) if batched else ("T", end - start)
        )
        state[:, start:end] = values[:, -1] if batched else values[-1]
    texts = given[annotation]
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or len(texts) not in (1, count):
        raise RequestError(f"{annotation}: expected a list of 1 or {count} texts, got {_kind(texts)}")
    texts = [text(annotation, one, MAX_INSTRUCTION) for one in texts] * (count if len(texts) == 1 else 1)
    seen = [
        Observation(frame=frame(video, picture), state=row, instruction=instruction, embodiment=embodiment)
        for picture, row, instruction in zip(newest, state, texts, strict=True)
    ]
    return seen, batched


def _annotation(given: Mapping[str, Any], names: GrootNames) -> str:
    """The key of the instruction: the one by our name, or the only one there is; clients differ."""
    ours = f"annotation.{names.annotation}"
    others = [key for key in given if key.startswith("annotation.") or key == "task"]
    return others[0] if ours not in given and len(others) == 1 else ours


def modality_config(spec: PolicySpec, embodiment: str, names: GrootNames) -> dict[str, Any]:
    """What GR00T's clients ask for, with its own marks: which keys, and at which steps relative to now."""
    robot = spec.embodiments[embodiment]
    n15 = names.version == "n1.5"
    keys = {
        "video": ([names.camera], [0]),
        "state": (list(robot.state), [0]),
        "action": (list(robot.action), list(range(spec.horizon))),
    }
    found = {
        name: {"delta_indices": indices, "modality_keys": [f"{name}.{key}" for key in parts] if n15 else parts}
        for name, (parts, indices) in keys.items()
    }
    found["language"] = {"delta_indices": [0], "modality_keys": [f"annotation.{names.annotation}"]}
    return {
        name: {"__ModalityConfig_class__": True, "as_json": json.dumps(one) if n15 else one}
        for name, one in found.items()
    }


def _kind(value: Any) -> str:
    return f"{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
