"""The policy server: openpi's websocket wire, with health, metrics, limits and a door.                   fact 9

On connecting a client gets one map that describes the policy; then each binary frame is a request and each binary frame
back its answer. What is wrong with a request comes back as a text, on which openpi's client raises; the connection stays
open, unless the bytes were no message or the bad requests do not end. `GET /healthz`, `/readyz` and `/metrics` answer
plain HTTP on the same port.
"""

import asyncio
import hmac
import http
import logging
import ssl
import time

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from agra.serving.messages import WireKeys, answer, describe, parse
from agra.serving.service import Episode, PolicyService, failure
from agra.serving.wire import WireError, pack, unpack

WIRE = "openpi"


MAX_FRAGMENTS = 1024
"""Of one message: empty fragments would otherwise pass every limit on sizes."""
MAX_UNSENT = 2**20
"""Bytes that wait for a client that does not read: pings are answered at once, whether or not the answers leave."""


class _Connection(ServerConnection):
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            self.transport.abort()


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
        if api_key is not None and not api_key.strip():
            raise ValueError("API key: expected some characters, got none; unset it to serve without")
        self.service, self.host, self.port = service, host, port
        self.keys = keys or WireKeys()
        self._key = None if api_key is None else api_key.encode()
        self._tls = tls
        self._server: Server | None = None
        self._open: set[ServerConnection] = set()

    async def start(self) -> None:
        """Listen; `port` is then the real one, where 0 was asked for. Raises OSError where the port is taken."""
        limits = self.service.limits
        self._server = await serve(
            self._handle,
            self.host,
            self.port,
            ssl=self._tls,
            process_request=self._door,
            create_connection=_Connection,
            origins=[None],
            compression=None,
            max_size=limits.max_message,
            max_queue=2,
            open_timeout=limits.handshake_timeout,
            close_timeout=limits.send_timeout,
            ping_interval=20,
            ping_timeout=20,
            server_header=None,
            logger=logging.getLogger("agra.serving.websockets"),
        )
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self, timeout: float = 10.0) -> None:
        """Refuse new work, finish what is running, say goodbye (1001)."""
        await self.service.drain(timeout)
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def dismiss(self, reason: str) -> None:
        """Close every connection so that clients come back and read the description anew."""
        await asyncio.gather(*(one.close(CloseCode.SERVICE_RESTART, reason) for one in list(self._open)))

    # --- HTTP --------------------------------------------------------------------------------------------------------

    def _door(self, connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._knows(request.headers):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key KEY\n")
        if path == "/readyz":
            status = http.HTTPStatus.OK if self.service.ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "ready\n" if self.service.ready else "not ready\n")
        if path == "/metrics":
            headers = Headers({"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
            body = self.service.metrics()
            headers["Content-Length"] = str(len(body))
            headers["Connection"] = "close"
            return Response(200, "OK", headers, body)
        if self.service.draining or len(self._open) >= self.service.limits.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "no room for another client\n")
        return None

    def _knows(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        return scheme in ("Api-Key", "Bearer") and hmac.compare_digest(given.strip().encode(), self._key)

    # --- one client --------------------------------------------------------------------------------------------------

    async def _handle(self, connection: ServerConnection) -> None:
        self._open.add(connection)
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
            self._open.discard(connection)
            self.service.connections.dec()

    async def _serve(self, connection: ServerConnection) -> None:
        limits, episode = self.service.limits, Episode()
        await self._send(connection, pack(describe(self.service.spec, self.keys)))
        bad, previous, next_turn = 0, 0.0, 0.0
        while True:
            async with asyncio.timeout(limits.idle_timeout):
                data = await self._receive(connection)
            start = time.perf_counter()
            if (early := next_turn - start) > 0:
                await asyncio.sleep(early)
                start = time.perf_counter()
            next_turn = max(next_turn, start) + 1 / limits.request_rate
            outcome, reply = await self._answer(data, episode, previous)
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

    async def _answer(self, data: bytes | str, episode: Episode, previous: float) -> tuple[str, bytes | str]:
        """What became of a request, and what to send back."""
        start = time.perf_counter()
        try:
            if isinstance(data, str):
                raise WireError("expected a binary frame with a msgpack map, got a text frame")
            question = parse(unpack(data), self.service.spec, self.keys)
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
