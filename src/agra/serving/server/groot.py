"""GR00T's ZeroMQ protocol (N1.5 and N1.6), so that its simulator clients can evaluate our policies.

A request is a msgpack map {endpoint, data, api_token}. The endpoints are ping, get_action, reset and
get_modality_config. An observation names its parts: `video.<camera>` (T, H, W, 3) uint8, `state.<part>` (T, d), and a
text `annotation.<...>`. The response has `action.<part>` (K, d). N1.6 sends {observation, options} and expects
[action, info]. Its observation may also nest the parts, {"video": {...}, "state": {...}, "language": {...}}, and then
the response's keys have no prefix `action.`. Every array may have a leading batch axis. T are the steps that
get_modality_config lists: the past ones that the policy reads, and the present one. Of any other T the newest is used.
`kill` is refused, because no client may stop the server. Each connection is served one request at a time. Further ones
wait unread.
"""

import asyncio
import hmac
import logging
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from agra.serving.protocol.messages import SEEDS, InferRequest
from agra.serving.protocol.validation import RequestError
from agra.serving.protocol.wire import pack_groot, unpack_groot
from agra.serving.protocol.zmtp import Peer, ProtocolError
from agra.serving.server.config import GrootWire, check_key
from agra.serving.server.groot_messages import flatten, modality_config, parse_observations
from agra.serving.server.service import Busy, Episode, PolicyService, error_reply

log = logging.getLogger("agra.serving")
WIRE = "groot"
ENDPOINTS = ("ping", "get_action", "reset", "get_modality_config")
MAX_HANDSHAKES = 128  # connections beyond `max_connections` that may be open
STOP_SECONDS = 0.5
"""Time for clients of a stopping server to send another request and get its error message."""
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds and number of probes. The connection of a machine that died is freed after a minute."""


class GrootServer:
    """Serves a `PolicyService` to GR00T's clients. Each connection has its own queue and episodes."""

    def __init__(
        self,
        service: PolicyService,
        *,
        host: str = "127.0.0.1",
        port: int = 5555,
        config: GrootWire | None = None,
        api_key: str | None = None,
    ) -> None:
        self.service, self.host, self.port = service, host, port
        self.config = config or GrootWire()
        embodiments = service.spec.embodiments
        if self.config.embodiment is None and len(embodiments) > 1:
            raise ValueError(
                f"GR00T's requests do not name an embodiment; choose --embodiment from {', '.join(embodiments)}"
            )
        self.embodiment = self.config.embodiment or next(iter(embodiments))
        if self.embodiment not in embodiments:
            raise ValueError(f"embodiment: expected one of {', '.join(embodiments)}, got {self.embodiment!r}")
        if self.config.camera in (views := embodiments[self.embodiment].views):
            raise ValueError(
                f"--groot-camera {self.config.camera}: expected the name of the first camera, because the policy also"
                f" reads {', '.join(views)}"
            )
        self._key = check_key(api_key)
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.clients = 0
        """Connections after their handshake."""

    @property
    def address(self) -> str:
        """Address for clients on this machine, such as tcp://127.0.0.1:5555."""
        return f"tcp://{self.host}:{self.port}"

    async def start(self) -> None:
        """Listen, and set `port` to the actual port if it was 0. Raises OSError for a port in use."""
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close all connections. Call `PolicyService.drain` first, which waits for the responses.

        Clients that send another request get an error message first. Without it their sockets would wait forever.
        """
        if self._server is None:
            return
        self._server.close()
        if self._open:
            await asyncio.wait([*self._open], timeout=STOP_SECONDS)
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait([*self._open], timeout=1.0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        task.add_done_callback(self._open.pop)
        limits, counted = self.service.limits, False
        try:
            # Refused before the handshake, libzmq keeps the client's request and tries again. Afterwards it would be
            # lost.
            full = self.clients >= limits.max_connections or len(self._open) > limits.max_connections + MAX_HANDSHAKES
            if full or self.service.draining:
                return
            _keep_alive(writer.get_extra_info("socket"))
            peer = Peer(reader, writer, max_message=limits.max_message)
            async with asyncio.timeout(limits.handshake_timeout):
                await peer.handshake()
            if self.clients >= limits.max_connections:
                return
            counted = True
            self.clients += 1
            self.service.connections.inc()
            await self._serve(peer)
        except (ProtocolError, EOFError, ConnectionError, TimeoutError) as error:
            log.debug("closed a connection of GR00T's protocol: %s", error)
        finally:
            if counted:
                self.clients -= 1
                self.service.connections.dec()
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _serve(self, peer: Peer) -> None:
        limits, episodes, invalid = self.service.limits, [Episode(0)], 0
        while invalid < limits.max_bad_requests:
            async with asyncio.timeout(limits.idle_timeout):
                size = await peer.header()
            stopping = self.service.draining
            async with self.service.large_slots if size > limits.share else nullcontext():
                answered = await self._serve_request(peer, size, episodes, stopping=stopping)
            if stopping:
                return
            invalid = 0 if answered else invalid + 1

    async def _serve_request(self, peer: Peer, size: int, episodes: list[Episode], *, stopping: bool) -> bool:
        """Read a request and respond. Returns whether it was answered with actions. `stopping` refuses it."""
        async with asyncio.timeout(self.service.limits.receive_timeout):
            data = [await peer.body(size)]
        with self.service.working():
            try:
                if stopping:
                    raise Busy("busy: the server is stopping")
                outcome, response = "answered", await self._respond(unpack_groot(data.pop()), episodes)
            except Exception as error:  # any error of the policy: it must not affect other clients
                outcome, message = error_reply(error)
                response = {"error": message}
            await self.service.record_outcome(WIRE, outcome)
            async with asyncio.timeout(self.service.limits.send_timeout):
                await peer.send(pack_groot(response))
        return outcome == "answered"

    async def _respond(self, message: Any, episodes: list[Episode]) -> Any:
        if not isinstance(message, dict):
            raise RequestError("request: expected a map with 'endpoint' and 'data'")
        if self._key is not None:
            token = message.get("api_token")
            if not isinstance(token, str) or not hmac.compare_digest(token.encode(), self._key):
                raise RequestError("api_token: missing or wrong")
        endpoint, data = message.get("endpoint", "get_action"), message.get("data") or {}
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "get_modality_config":
            return modality_config(self.service.spec, self.embodiment, self.config)
        if not isinstance(data, dict):
            raise RequestError("data: expected a map")
        if endpoint == "reset":
            options = data.get("options")
            seed = options.get("seed", 0) if isinstance(options, dict) else 0
            if type(seed) is not int or not 0 <= seed < SEEDS:
                raise RequestError(f"options.seed: expected an integer from 0 to {SEEDS - 1}")
            episodes[:] = [Episode(seed, episodes[0].warnings)]
            return {}
        if endpoint != "get_action":
            raise RequestError(f"endpoint: expected one of {', '.join(ENDPOINTS)}, got {str(endpoint)[:40]!r}")
        wrapped = isinstance(data.get("observation"), dict)
        observation = data["observation"] if wrapped else data
        nested = isinstance(observation.get("video"), dict)
        actions = await self._act(flatten(observation), episodes, nested=nested)
        return [actions, {}] if wrapped else actions

    async def _act(self, message: Mapping[str, Any], episodes: list[Episode], *, nested: bool) -> dict[str, Any]:
        spec, robot = self.service.spec, self.service.spec.embodiments[self.embodiment]
        observations, batched = parse_observations(message, robot, self.embodiment, self.config, past=len(spec.past))
        while len(episodes) < len(observations):  # each environment of a batch has random numbers of its own
            episodes.append(Episode(episodes[0].seed + len(episodes), episodes[0].warnings))
        results = await asyncio.gather(
            *(
                self.service.infer(InferRequest(observation=observation), episode)
                for observation, episode in zip(observations, episodes, strict=False)
            )
        )
        actions = np.stack([chunk.actions for chunk, _ in results])
        actions = actions if batched else actions[0]
        return {f"{'' if nested else 'action.'}{part}": actions[..., a:b] for part, (a, b) in robot.action.items()}


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # depends on the system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
