"""Policy server over openpi's websocket protocol, with health checks, metrics, limits and authentication.

A client first gets one map that describes the policy. Then each binary frame is a request, and each binary frame back
its response. Errors are sent as text frames, which openpi's client raises on. The connection closes on undecodable
frames or after 20 consecutive invalid requests. `GET /healthz`, `/readyz` and `/metrics` answer plain HTTP on the same
port.
"""

import asyncio
import hmac
import http
import ipaddress
import logging
import ssl
import time
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request, Response
from websockets.protocol import Event, State

from agra.serving.protocol.messages import WireKeys, describe, encode_response
from agra.serving.protocol.validation import parse_request
from agra.serving.protocol.wire import WireError, pack, unpack
from agra.serving.server.config import LOOPBACK, check_key
from agra.serving.server.service import Episode, PolicyService, error_reply

WIRE = "openpi"

MAX_FRAGMENTS = 1024
"""Fragments of a message. Empty ones would otherwise pass every limit on sizes."""
MAX_UNSENT = 2**20
"""Bytes that may wait for a client to read. Pings are answered at once, even if the client reads no answers."""
MAX_HANDSHAKES = 128
"""Connections beyond `max_connections` that may be open for a handshake or plain HTTP. Further ones are closed at
once."""
MAX_DISCARDED = 2**26
"""Bytes that a client may send after it was refused, such as the rest of a frame of 4096 x 4096. Aborted earlier, it would
not receive the close code."""
SLACK = 2**18
"""Bytes of headers, and of the next message, that may arrive with a message. asyncio reads this many at a time."""


class _Connection(ServerConnection):
    """A connection that reads one request at a time. It reads nothing while a request is answered.

    `unread` counts the bytes since the last request. When they exceed the connection's share, reading stops until the
    service has a free slot for a large request.
    """

    def __init__(self, owner: "WebsocketServer", *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.owner, self.limits = owner, owner.service.limits
        self.unread = 0
        self._slot: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.owner.sockets.add(self)
        if len(self.owner.sockets) > self.limits.max_connections + MAX_HANDSHAKES:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.sockets.discard(self)
        self.owner.clients.discard(self)
        self.release_slot()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.unread += len(data)
        super().data_received(data)
        largest = MAX_DISCARDED if self.state is State.CLOSING else self.limits.max_message + SLACK
        too_large = self.unread > largest
        if too_large or self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.transport.abort()
        elif self.unread > self.limits.share and self._slot is None and self.state is State.OPEN:
            self.transport.pause_reading()
            self._slot = asyncio.create_task(self._acquire_slot())

    def process_event(self, event: Event) -> None:
        """Queue a frame, and leave an empty one with the library's parser, which keeps its last frame until the
        next.
        """
        if isinstance(event, Frame):
            super().process_event(replace(event))
            event.data = b""
        else:
            super().process_event(event)

    async def _acquire_slot(self) -> None:
        await self.owner.service.large_slots.acquire()
        self._deadline = asyncio.get_running_loop().call_later(self.limits.receive_timeout, self.transport.abort)
        self.transport.resume_reading()

    def read_request(self) -> None:
        """Start to read the next request."""
        self.unread = 0
        self.transport.resume_reading()

    async def pause(self) -> None:
        """Stop reading after a complete request. Returns once it has a slot, if it needs one."""
        if self._slot is not None:
            await self._slot
        self.transport.pause_reading()
        self._cancel_deadline()

    def release_slot(self) -> None:
        """Release the slot of an answered request, if it had one."""
        self._cancel_deadline()
        slot, self._slot = self._slot, None
        if slot is not None and not slot.cancel() and not slot.cancelled():
            self.owner.service.large_slots.release()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close with a handshake, for which the client's reply must be read."""
        self.read_request()
        await super().close(code, reason)


class _CloseClient(Exception):
    """Raised to close a client's connection."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class WebsocketServer:
    """Serves a `PolicyService` to any number of clients, none of which can block another.

    With `api_key`, everything but /healthz needs the header `Authorization: Api-Key KEY` (or `Bearer KEY`). Browsers
    are refused, because a web page must not reach a robot's server on the same machine.
    """

    def __init__(
        self,
        service: PolicyService,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        keys: WireKeys | None = None,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.service, self.host, self.port = service, host, port
        self.keys = keys or WireKeys()
        for robot in service.spec.embodiments.values():
            self.keys.views(robot.views)  # raises ValueError for a key with two meanings
        self.sockets: set[_Connection] = set()
        self.clients: set[_Connection] = set()
        self._key = check_key(api_key)
        self._tls = tls
        self._server: Server | None = None

    @property
    def address(self) -> str:
        """Address for clients on this machine, such as ws://127.0.0.1:8000."""
        return f"{'ws' if self._tls is None else 'wss'}://{self.host}:{self.port}"

    async def start(self) -> None:
        """Listen, and set `port` to the actual port if it was 0. Raises OSError for a port in use."""
        limits = self.service.limits
        self._server = await serve(
            self._handle,
            self.host,
            self.port,
            ssl=self._tls,
            process_request=self._respond_http,
            create_connection=partial(_Connection, self),  # type: ignore[arg-type]
            origins=[None],
            compression=None,
            max_size=limits.max_message,
            max_queue=None,  # _Connection decides when to read
            open_timeout=limits.handshake_timeout,
            close_timeout=limits.send_timeout,
            ping_interval=20,
            ping_timeout=20 + limits.request_timeout + limits.send_timeout,  # pongs wait while a request is answered
            server_header=None,
            logger=logging.getLogger("agra.serving.websockets"),
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self, timeout: float = 10.0) -> None:
        """Refuse new requests, answer those that were read and close the connections (1001).

        Takes at most `timeout` seconds, and one more for the closing handshakes.
        """
        await self.service.drain(timeout)
        if self._server is None:
            return
        self._server.close()
        try:
            async with asyncio.timeout(1.0):
                await self._server.wait_closed()
        except TimeoutError:
            for connection in list(self.sockets):
                connection.transport.abort()

    async def disconnect_clients(self, reason: str) -> None:
        """Close every connection (1012), so that clients connect again and read the new description."""
        await asyncio.gather(*(client.close(CloseCode.SERVICE_RESTART, reason) for client in list(self.clients)))

    # --- HTTP --------------------------------------------------------------------------------------------------------

    def _respond_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a plain HTTP request, or refuse a handshake. None lets the handshake continue."""
        assert isinstance(connection, _Connection)
        if (refusal := self._refuse_browser(request.headers)) is not None:
            return connection.respond(http.HTTPStatus.FORBIDDEN, refusal)
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._authorized(request.headers):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key KEY\n")
        ready = self.service.ready
        if path == "/readyz":
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "ready\n" if ready else "not ready\n")
        if path == "/metrics":
            headers = Headers({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
            body = self.service.metrics()
            headers["Content-Length"] = str(len(body))
            headers["Connection"] = "close"
            return Response(200, "OK", headers, body)
        if self.service.draining or not self.service.warm or len(self.clients) >= self.service.limits.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients, or not ready\n")
        self.clients.add(connection)  # before the handshake ends, so that the next one counts it
        return None

    def _refuse_browser(self, headers: Headers) -> str | None:
        """Refuse web pages: requests with an Origin and, on a loopback server, with another Host (DNS rebinding)."""
        if headers.get_all("Origin"):
            return "requests of web pages are refused: expected no header Origin\n"
        if self.host in LOOPBACK and not all(map(_is_this_machine, headers.get_all("Host"))):
            return "this server listens on its own machine only: expected localhost or an address as Host\n"
        return None

    def _authorized(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        values = headers.get_all("Authorization")
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        return scheme in ("Api-Key", "Bearer") and hmac.compare_digest(key.strip().encode(), self._key)

    # --- a client ----------------------------------------------------------------------------------------------------

    async def _handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, _Connection)
        self.service.connections.inc()
        try:
            await self._serve(connection)
        except ConnectionClosed:
            pass
        except _CloseClient as closing:
            await self._close(connection, closing)
        except TimeoutError:
            await self._close(connection, _CloseClient(CloseCode.POLICY_VIOLATION, "idle, or not reading responses"))
        finally:
            connection.release_slot()
            self.service.connections.dec()

    async def _serve(self, connection: _Connection) -> None:
        limits, episode = self.service.limits, Episode()
        await self._send(connection, pack(describe(self.service.spec, self.keys)))
        invalid, previous, next_start = 0, 0.0, 0.0
        while True:
            connection.read_request()
            async with asyncio.timeout(limits.idle_timeout):
                data = [await self._receive(connection)]
                await connection.pause()
            if self.service.draining:
                raise _CloseClient(CloseCode.GOING_AWAY, "stopping")
            with self.service.working():
                start = time.perf_counter()
                if (early := next_start - start) > 0:
                    await asyncio.sleep(early)
                    start = time.perf_counter()
                next_start = max(next_start, start) + 1 / limits.request_rate
                outcome, response = await self._infer(data, episode, previous)
                connection.release_slot()
                await self.service.record_outcome(WIRE, outcome)
                await self._send(connection, response)
            previous = time.perf_counter() - start
            invalid = 0 if outcome == "answered" else invalid + 1
            code = {"garbage": CloseCode.INVALID_DATA, "failed": CloseCode.INTERNAL_ERROR}.get(outcome)
            if code is None and invalid >= limits.max_bad_requests:
                code = CloseCode.POLICY_VIOLATION
            if code is not None:
                raise _CloseClient(code, outcome)

    async def _receive(self, connection: ServerConnection) -> bytes | str:
        fragments: list[bytes | str] = []
        async for fragment in connection.recv_streaming():
            fragments.append(fragment)
            if len(fragments) > MAX_FRAGMENTS:
                reason = f"a message of more than {MAX_FRAGMENTS} fragments"
                raise _CloseClient(CloseCode.POLICY_VIOLATION, reason)
        first = fragments[0]
        if isinstance(first, bytes):
            return first if len(fragments) == 1 else b"".join(part for part in fragments if isinstance(part, bytes))
        return "".join(part for part in fragments if isinstance(part, str))

    async def _infer(self, data: list[bytes | str], episode: Episode, previous: float) -> tuple[str, bytes | str]:
        """Return the outcome of a request and its response.

        Takes the bytes out of `data`, so that they are freed early.
        """
        start = time.perf_counter()
        try:
            message = data.pop()
            if isinstance(message, str):
                raise WireError("expected a binary frame with a msgpack map, got a text frame")
            request = parse_request(unpack(message), self.service.spec, self.keys)
            del message
            decode_seconds = time.perf_counter() - start
            chunk, timing = await self.service.infer(request, episode, decode_seconds=decode_seconds)
        except Exception as error:  # any error of the policy: it must not affect other clients
            return error_reply(error)
        timing["prev_total_ms"] = 1000 * previous
        return "answered", pack(encode_response(chunk, request, timing))

    async def _send(self, connection: ServerConnection, data: bytes | str) -> None:
        async with asyncio.timeout(self.service.limits.send_timeout):
            await connection.send(data)

    async def _close(self, connection: ServerConnection, closing: _CloseClient) -> None:
        try:
            async with asyncio.timeout(self.service.limits.send_timeout):
                await connection.close(closing.code, closing.reason)
        except TimeoutError:
            connection.transport.abort()


def _is_this_machine(host: str) -> bool:
    """Whether a Host header is localhost or an address. A web page that rebinds a name sends that name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
