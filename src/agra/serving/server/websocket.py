"""The policy server: openpi's websocket wire, with health, metrics, limits and authentication.

On connecting a client gets one map that describes the policy. Then each binary frame is a request and each binary frame
back its answer. An invalid request is answered by a text, on which openpi's client raises. The connection stays open unless
the bytes were no message or invalid requests do not end. `GET /healthz`, `/readyz` and `/metrics` answer plain HTTP on the
same port.
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

from agra.serving.protocol.messages import WireKeys, answer, describe, parse
from agra.serving.server.service import Episode, PolicyService, check_key, failure
from agra.serving.protocol.wire import WireError, pack, unpack

WIRE = "openpi"
LOOPBACK = ("127.0.0.1", "::1", "localhost")

MAX_FRAGMENTS = 1024
"""Of one message: empty fragments would otherwise pass every limit on sizes."""
MAX_UNSENT = 2**20
"""Bytes that wait for a client that does not read: pings are answered at once, whether or not the answers leave."""
MAX_HANDSHAKES = 128
"""Connections beyond the clients' that may be open for a handshake or plain HTTP; further ones are closed at once."""
SLACK = 2**18
"""Bytes of headers, and of the next message, that may come with a message: asyncio reads so many at a time."""


class _Connection(ServerConnection):
    """Reads one request at a time: nothing is read while one is answered, and a large one waits for room.

    `unread` counts the bytes since the last request. Where they exceed the connection's share, reading stops until the
    service has room for one more large request.
    """

    def __init__(self, owner: "WebsocketServer", *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.owner, self.limits = owner, owner.service.limits
        self.unread = 0
        self._room: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.owner.sockets.add(self)
        if len(self.owner.sockets) > self.limits.max_connections + MAX_HANDSHAKES:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.owner.sockets.discard(self)
        self.owner.clients.discard(self)
        self.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.unread += len(data)
        super().data_received(data)
        full = self.unread > self.limits.max_message + SLACK
        if full or self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.transport.abort()
        elif self.unread > self.limits.share and self._room is None and self.state is State.OPEN:
            self.transport.pause_reading()
            self._room = asyncio.create_task(self._enter())

    def process_event(self, event: Event) -> None:
        """Queue a frame, and leave an empty one with the library's parser, which keeps its last one until the next."""
        if isinstance(event, Frame):
            super().process_event(replace(event))
            event.data = b""
        else:
            super().process_event(event)

    async def _enter(self) -> None:
        await self.owner.service.room.__aenter__()
        self._deadline = asyncio.get_running_loop().call_later(self.limits.receive_timeout, self.transport.abort)
        self.transport.resume_reading()

    def begin(self) -> None:
        """Read the next request."""
        self.unread = 0
        self.transport.resume_reading()

    async def pause(self) -> None:
        """Read no further: a whole request is there. Returns when there is room for it."""
        if self._room is not None:
            await self._room
        self.transport.pause_reading()
        self._stop_clock()

    def leave(self) -> None:
        """Give the room back, if there was any: the request is answered."""
        self._stop_clock()
        room, self._room = self._room, None
        if room is not None and not room.cancel() and not room.cancelled():
            self.owner.service.room.leave()

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, which needs the client's own to be read."""
        self.begin()
        await super().close(code, reason)


class _Dismissed(Exception):
    """A client whose connection is to be closed."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class WebsocketServer:
    """Serves a `PolicyService` to any number of clients; none of them can hold up another.

    With `api_key` only requests with the header `Authorization: Api-Key KEY` (or `Bearer KEY`) get anything but
    /healthz. Browsers are refused: a web page must not reach a robot's server on the same machine.
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
        self.sockets: set[_Connection] = set()
        self.clients: set[_Connection] = set()
        self._key = check_key(api_key)
        self._tls = tls
        self._server: Server | None = None

    async def start(self) -> None:
        """Listen; `port` is then the real one, where 0 was asked for. Raises OSError where the port is taken."""
        limits = self.service.limits
        self._server = await serve(
            self._handle,
            self.host,
            self.port,
            ssl=self._tls,
            process_request=self._door,
            create_connection=partial(_Connection, self),  # type: ignore[arg-type]
            origins=[None],
            compression=None,
            max_size=limits.max_message,
            max_queue=None,  # _Connection says when to read
            open_timeout=limits.handshake_timeout,
            close_timeout=limits.send_timeout,
            ping_interval=20,
            ping_timeout=20 + limits.request_timeout + limits.send_timeout,  # pongs are not read while one is answered
            server_header=None,
            logger=logging.getLogger("agra.serving.websockets"),
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self, timeout: float = 10.0) -> None:
        """Refuse new work, answer what was read, say goodbye (1001); in at most `timeout` seconds and one for goodbyes."""
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

    async def dismiss(self, reason: str) -> None:
        """Close every connection so that clients come back and read the description anew."""
        await asyncio.gather(*(one.close(CloseCode.SERVICE_RESTART, reason) for one in list(self.clients)))

    # --- HTTP --------------------------------------------------------------------------------------------------------

    def _door(self, connection: ServerConnection, request: Request) -> Response | None:
        assert isinstance(connection, _Connection)
        if (refusal := self._foreign(request.headers)) is not None:
            return connection.respond(http.HTTPStatus.FORBIDDEN, refusal)
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._knows(request.headers):
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
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "no room for another client, or not ready\n")
        self.clients.add(connection)  # here: the next handshake must see that the place is taken
        return None

    def _foreign(self, headers: Headers) -> str | None:
        """Why a request is a web page's: it has an Origin or, on a loopback server, another host's name (DNS rebinding)."""
        if headers.get_all("Origin"):
            return "requests of web pages are refused: expected no header Origin\n"
        if self.host in LOOPBACK and not all(map(_is_this_machine, headers.get_all("Host"))):
            return "this server listens on its own machine only: expected the Host localhost or an address\n"
        return None

    def _knows(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        given = headers.get_all("Authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        return scheme in ("Api-Key", "Bearer") and hmac.compare_digest(key.strip().encode(), self._key)

    # --- one client --------------------------------------------------------------------------------------------------

    async def _handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, _Connection)
        self.service.connections.inc()
        try:
            await self._serve(connection)
        except ConnectionClosed:
            pass
        except _Dismissed as end:
            await self._close(connection, end)
        except TimeoutError:
            await self._close(connection, _Dismissed(CloseCode.POLICY_VIOLATION, "idle, or not reading its answers"))
        finally:
            connection.leave()
            self.service.connections.dec()

    async def _serve(self, connection: _Connection) -> None:
        limits, episode = self.service.limits, Episode()
        await self._send(connection, pack(describe(self.service.spec, self.keys)))
        bad, previous, next_turn = 0, 0.0, 0.0
        while True:
            connection.begin()
            async with asyncio.timeout(limits.idle_timeout):
                data = [await self._receive(connection)]
                await connection.pause()
            if self.service.draining:
                raise _Dismissed(CloseCode.GOING_AWAY, "stopping")
            with self.service.working():
                start = time.perf_counter()
                if (early := next_turn - start) > 0:
                    await asyncio.sleep(early)
                    start = time.perf_counter()
                next_turn = max(next_turn, start) + 1 / limits.request_rate
                outcome, reply = await self._answer(data, episode, previous)
                connection.leave()
                await self.service.settle(WIRE, outcome)
                await self._send(connection, reply)
            previous = time.perf_counter() - start
            bad = 0 if outcome == "answered" else bad + 1
            code = {"garbage": CloseCode.INVALID_DATA, "failed": CloseCode.INTERNAL_ERROR}.get(outcome)
            if code is None and bad >= limits.max_bad_requests:
                code = CloseCode.POLICY_VIOLATION
            if code is not None:
                raise _Dismissed(code, outcome)

    async def _receive(self, connection: ServerConnection) -> bytes | str:
        parts: list[bytes | str] = []
        async for part in connection.recv_streaming():
            parts.append(part)
            if len(parts) > MAX_FRAGMENTS:
                raise _Dismissed(CloseCode.POLICY_VIOLATION, f"a message of more than {MAX_FRAGMENTS} fragments")
        first = parts[0]
        if isinstance(first, bytes):
            return first if len(parts) == 1 else b"".join(part for part in parts if isinstance(part, bytes))
        return "".join(part for part in parts if isinstance(part, str))

    async def _answer(self, request: list[bytes | str], episode: Episode, previous: float) -> tuple[str, bytes | str]:
        """What became of a request, and what to send back. Takes the bytes out of `request`: they are not kept."""
        start = time.perf_counter()
        try:
            data = request.pop()
            if isinstance(data, str):
                raise WireError("expected a binary frame with a msgpack map, got a text frame")
            question = parse(unpack(data), self.service.spec, self.keys)
            del data
            decode = time.perf_counter() - start
            chunk, timing = await self.service.answer(question, episode, decode=decode)
        except Exception as error:  # the policy's, of whatever kind: the other clients must not suffer from it
            return failure(error)
        timing["prev_total_ms"] = 1000 * previous
        return "answered", pack(answer(chunk, question, timing))

    async def _send(self, connection: ServerConnection, data: bytes | str) -> None:
        async with asyncio.timeout(self.service.limits.send_timeout):
            await connection.send(data)

    async def _close(self, connection: ServerConnection, end: _Dismissed) -> None:
        try:
            async with asyncio.timeout(self.service.limits.send_timeout):
                await connection.close(end.code, end.reason)
        except TimeoutError:
            connection.transport.abort()


def _is_this_machine(host: str) -> bool:
    """Whether a Host header is localhost or an address: a web page that rebinds a name sends that name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
