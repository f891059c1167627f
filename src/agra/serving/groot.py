"""GR00T's ZMQ wire (N1.5 and N1.6), so that its simulator clients can evaluate our policies.            fact 9

A request is a msgpack map {endpoint, data, api_token}; endpoints are ping, get_action, reset and get_modality_config. An
observation names its parts: `video.<camera>` (T, H, W, 3) uint8, `state.<part>` (T, d), and a text `annotation.<...>`.
N1.6 sends {observation, options} and wants [action, info] back; its observation may also nest the parts, {"video": {...},
"state": {...}, "language": {...}}, and then the answer's keys lack `action.`. Everything may have a batch axis in front.
Only the newest of T is looked at. The answer has `action.<part>` (K, d). `kill` is refused: whoever can reach the port
must not be able to end the server.
"""

import asyncio
import hmac
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zmq
import zmq.asyncio

from agra.serving.messages import MAX_INSTRUCTION, Question, RequestError, frame, numbers, text
from agra.serving.service import Episode, PolicyService, failure
from agra.serving.wire import pack_groot, unpack_groot
from agra.types import EmbodimentSpec, Observation, PolicySpec

log = logging.getLogger("agra.serving")
WIRE = "groot"
MAX_BATCH = 64  # environments in one request
MAX_EPISODES = 1024  # clients whose episodes are remembered


@dataclass(frozen=True, kw_only=True)
class GrootNames:
    """How GR00T's clients name what the policy takes, and whose form `get_modality_config` answers in."""

    camera: str = "ego_view"
    annotation: str = "human.action.task_description"
    version: Literal["n1.5", "n1.6"] = "n1.6"
    """N1.5 reads a JSON text with full keys; N1.6 and later a map with the bare names of their parts. The request is the
    same, and neither client reads the other's answer."""


class GrootServer:
    """Serves a `PolicyService` to GR00T's clients. One request of a client at a time, any number of clients."""

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
        self._key = None if api_key is None else api_key.encode()
        self._episodes: OrderedDict[bytes, list[Episode]] = OrderedDict()
        self._running: dict[bytes, asyncio.Task] = {}
        self._computing = 0  # of those; the others were wrong and wait to be told
        self._context: zmq.asyncio.Context | None = None
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        """Listen; `port` is then the real one, where 0 was asked for. Raises OSError where the port is taken."""
        limits = self.service.limits
        self._context = zmq.asyncio.Context()
        # A ROUTER answers each client by its own name, so that a slow one holds up nobody; a REP would serve in turn.
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, limits.max_message)
        self._socket.setsockopt(zmq.RCVHWM, 2)
        self._socket.setsockopt(zmq.SNDHWM, 2)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * limits.handshake_timeout))
        try:
            self._socket.bind(f"tcp://{self.host}:{self.port}" if self.port else f"tcp://{self.host}:*")
        except zmq.ZMQError as error:
            raise OSError(f"tcp://{self.host}:{self.port}: {error}") from error
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def stop(self) -> None:
        """Answer what is running, then close."""
        if self._task is None or self._context is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task, *self._running.values()], timeout=self.service.limits.send_timeout)
        self._socket.close()
        self._context.term()

    async def _listen(self) -> None:
        while True:
            client, *rest = await self._socket.recv_multipart()
            # A REQ socket sends an empty frame and then the message. What does otherwise gets nothing.
            if len(rest) != 2 or rest[0] or client in self._running:
                continue
            if self._computing >= self.service.limits.max_connections or len(self._running) >= MAX_EPISODES:
                await self._reply(client, {"error": "agra: busy: too many requests at a time"})
                continue
            self._computing += 1
            task = asyncio.get_running_loop().create_task(self._serve(client, rest[1]))
            self._running[client] = task
            task.add_done_callback(lambda _, client=client: self._running.pop(client, None))

    async def _serve(self, client: bytes, data: bytes) -> None:
        try:
            outcome, reply = "answered", await self._answer(client, unpack_groot(data))
        except Exception as error:  # the policy's, of whatever kind: the other clients must not suffer from it
            outcome, told = failure(error)
            reply = {"error": told}
        finally:
            self._computing -= 1
        await self.service.settle(WIRE, outcome)
        await self._reply(client, reply)

    async def _reply(self, client: bytes, reply: Any) -> None:
        try:
            await self._socket.send_multipart([client, b"", pack_groot(reply)], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:  # it went away, or does not read
            log.info("an answer on GR00T's wire was dropped: %s", error)

    async def _answer(self, client: bytes, message: Any) -> Any:
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
            self._remember(client, [Episode(seed)])
            return {}
        if endpoint != "get_action":
            known = "ping, get_action, reset and get_modality_config"
            raise RequestError(f"endpoint: expected one of {known}, got {str(endpoint)[:40]!r}")
        wrapped = isinstance(data.get("observation"), dict)
        observation = data["observation"] if wrapped else data
        nested = isinstance(observation.get("video"), dict)
        actions = await self._act(client, flatten(observation), nested=nested)
        return [actions, {}] if wrapped else actions

    async def _act(self, client: bytes, observation: Mapping[str, Any], *, nested: bool) -> dict[str, Any]:
        robot = self.service.spec.embodiments[self.embodiment]
        seen, batched = read_observation(observation, robot, self.embodiment, self.names)
        episodes = self._episodes.get(client) or [Episode(0)]
        while len(episodes) < len(seen):  # each environment of a batch has random numbers of its own
            episodes.append(Episode(episodes[0].seed + len(episodes)))
        self._remember(client, episodes)
        chunks = await asyncio.gather(
            *(
                self.service.answer(Question(observation=one), episode)
                for one, episode in zip(seen, episodes, strict=False)
            )
        )
        actions = np.stack([chunk.actions for chunk, _ in chunks])
        actions = actions if batched else actions[0]
        return {f"{'' if nested else 'action.'}{part}": actions[..., a:b] for part, (a, b) in robot.action.items()}

    def _remember(self, client: bytes, episodes: list[Episode]) -> None:
        self._episodes[client] = episodes
        self._episodes.move_to_end(client)
        while len(self._episodes) > MAX_EPISODES:
            self._episodes.popitem(last=False)


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
