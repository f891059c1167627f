"""ZMTP 3, the protocol of ZeroMQ, for a server of REQ and DEALER sockets. Bounds a message before reading it.

libzmq limits the size of each part of a message, but not the number of parts, so a client without a key could fill a
server's memory. Here a request is an empty part and one part of at most `max_message` bytes. Anything else closes the
connection. Source: rfc.zeromq.org/spec/23 and /37, NULL mechanism.
"""

import asyncio
import struct

MORE, LONG, COMMAND = 1, 2, 4
MAX_COMMAND = 1024
GREETING = b"\xff" + bytes(8) + b"\x7f" + bytes([3, 1]) + b"NULL".ljust(20, b"\0") + bytes(32)
SOCKETS = (b"REQ", b"DEALER")


class ProtocolError(Exception):
    """A violation of the protocol by the client."""


class Peer:
    """A connection. Call `handshake` once, then `header`, `body` and `send` for each request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, max_message: int) -> None:
        self.reader, self.writer, self.max_message = reader, writer, max_message

    async def handshake(self) -> None:
        """Exchange greetings with a REQ or DEALER socket. Raises ProtocolError for any other client."""
        self.writer.write(GREETING)
        if (signature := await self.reader.readexactly(10))[0] != 0xFF or signature[9] != 0x7F:
            raise ProtocolError("expected the signature of ZMTP 3")
        rest = await self.reader.readexactly(54)
        if rest[0] < 3 or rest[2:22].rstrip(b"\0") != b"NULL":
            raise ProtocolError("expected ZMTP 3 with the NULL mechanism")
        name, body = _command(await self._command_frame())
        if name != b"READY" or _properties(body).get(b"socket-type") not in SOCKETS:
            reason = b"expected a REQ or DEALER socket"
            self._write(COMMAND, b"\x05ERROR" + bytes([len(reason)]) + reason)
            raise ProtocolError(reason.decode())
        self._write(COMMAND, b"\x05READY" + _property(b"Socket-Type", b"ROUTER") + _property(b"Identity", b""))
        await self.writer.drain()

    async def header(self) -> int:
        """Wait for the next request and return its size, before `body` reads it.

        Raises ProtocolError for a message of other parts, or one that is too large.
        """
        flags, size = await self._next_part()
        if flags != MORE or size:
            raise ProtocolError("expected an empty part before the request, as REQ sockets send it")
        flags, size = await self._next_part()
        if flags or size > self.max_message:
            raise ProtocolError(f"expected one part of at most {self.max_message} bytes")
        return size

    async def body(self, size: int) -> bytes:
        """Read the request that `header` announced."""
        return await self.reader.readexactly(size)

    async def send(self, message: bytes) -> None:
        """Send a response. Returns once the client reads it."""
        self._write(MORE, b"")
        self._write(0, message)
        await self.writer.drain()

    async def _next_part(self) -> tuple[int, int]:
        """Return flags (MORE or none) and size of the next part. Replies to pings in between."""
        while True:
            flags, size = await self._frame()
            if not flags & COMMAND:
                return flags & MORE, size
            name, body = _command(await self._contents(size))
            if name == b"PING":
                self._write(COMMAND, b"\x04PONG" + body[2:18])
                await self.writer.drain()
            elif name not in (b"PONG", b"SUBSCRIBE", b"CANCEL"):
                raise ProtocolError(f"unexpected command {name[:20]!r}")

    async def _command_frame(self) -> bytes:
        flags, size = await self._frame()
        if not flags & COMMAND:
            raise ProtocolError("expected a command")
        return await self._contents(size)

    async def _contents(self, size: int) -> bytes:
        if size > MAX_COMMAND:
            raise ProtocolError(f"expected a command of at most {MAX_COMMAND} bytes, got {size}")
        return await self.reader.readexactly(size)

    async def _frame(self) -> tuple[int, int]:
        flags = (await self.reader.readexactly(1))[0]
        if flags & ~(MORE | LONG | COMMAND) or (flags & COMMAND and flags & MORE):
            raise ProtocolError(f"invalid frame flags {flags:#x}")
        size = await self.reader.readexactly(8 if flags & LONG else 1)
        return flags & ~LONG, int.from_bytes(size, "big")

    def _write(self, flags: int, contents: bytes) -> None:
        long = len(contents) > 255
        size = struct.pack(">Q" if long else ">B", len(contents))
        self.writer.write(bytes([flags | (LONG if long else 0)]) + size)
        self.writer.write(contents)


def _command(frame: bytes) -> tuple[bytes, bytes]:
    if not frame or len(frame) <= frame[0]:
        raise ProtocolError("command: missing name")
    return frame[1 : 1 + frame[0]], frame[1 + frame[0] :]


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def _properties(data: bytes) -> dict[bytes, bytes]:
    """Parse the metadata of READY, with names in lower case."""
    properties: dict[bytes, bytes] = {}
    while data:
        end = 1 + data[0]
        name, size, rest = data[1:end], int.from_bytes(data[end : end + 4], "big"), data[end + 4 :]
        if len(name) != end - 1 or len(data) < end + 4 or len(rest) < size:
            raise ProtocolError("metadata: truncated")
        properties[name.lower()], data = rest[:size], rest[size:]
    return properties
