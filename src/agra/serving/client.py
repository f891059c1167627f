"""Client of the policy server, for robots and simulators. Needs numpy, msgpack and websockets. Imports no torch."""

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from agra.serving.protocol.messages import InferRequest, WireKeys, encode_request, read_description
from agra.serving.protocol.wire import WireError, pack, unpack
from agra.types import ActionChunk, Continuation, Observation, PolicySpec

MAX_RESPONSE = 2**24  # bytes


class ServerLost(ConnectionError):
    """The server is unreachable, closed the connection or did not answer in time. The next call connects again."""


class ServerRefused(ValueError):
    """An error message of the server about a request."""


@contextmanager
def closing_on_error(close: Callable[[], object]) -> Iterator[None]:
    """Call `close` where the block between a request and its answer raises anything, also if the user interrupts it.

    Otherwise the next request would get the answer that was not read.
    """
    with ExitStack() as resources:
        resources.callback(close)
        yield
        resources.pop_all()


class PolicyClient:
    """An `agra.types.Policy` on a server, such as ws://127.0.0.1:8000. Connects at the first call, and again after a loss.

    A response later than `timeout` seconds counts as lost. Its connection is closed, so it cannot be taken for the
    response to a later request. Raises ServerLost (a ConnectionError) and ServerRefused (a ValueError). Not thread-safe.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 10.0) -> None:
        if not address.startswith(("ws://", "wss://")):
            raise ValueError(f"server address: expected ws://HOST:PORT or wss://HOST:PORT, got {address!r}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout}")
        self.address, self.timeout = address, timeout
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._connection: ClientConnection | None = None
        self._resources = ExitStack()  # closes the connection
        self._spec: PolicySpec | None = None
        self._keys = WireKeys()
        self._seed, self._in_episode = 0, False
        self._request_id = 0

    @property
    def spec(self) -> PolicySpec:
        """Inputs and outputs of the server's policy."""
        if self._spec is None:
            self._connect()
        assert self._spec is not None
        return self._spec

    @property
    def past(self) -> tuple[int, ...]:
        """Control steps before the present one whose observations the policy reads."""
        return self.spec.past

    def reset(self, seed: int) -> None:
        """Begin an episode with the next observation."""
        self._seed, self._in_episode = seed, False

    def act(self, observation: Observation, *, continuation: Continuation | None = None) -> ActionChunk:
        """Request a chunk. Its `timings` are the server's stages and `round_trip`, in seconds."""
        return self._infer(observation, continuation=continuation)

    def act_and_imagine(self, observation: Observation) -> ActionChunk:
        """Request the same chunk with the predicted video, which the server returns under `agra serve --imagine`."""
        return self._infer(observation, imagine=self.spec.imagines)

    def _infer(
        self, observation: Observation, *, continuation: Continuation | None = None, imagine: bool = False
    ) -> ActionChunk:
        connection = self._connection or self._connect()
        self._request_id += 1
        request = InferRequest(
            observation=observation,
            seed=None if self._in_episode else self._seed,
            continuation=continuation,
            imagine=imagine,
            request_id=self._request_id,
        )
        start = time.perf_counter()
        message = pack(encode_request(request, self._keys, self.spec))
        with closing_on_error(self.close):
            response = self._exchange(connection, message)
        if isinstance(response, str):
            raise ServerRefused(f"{self.address}: {response}")
        self._in_episode = True
        timing = response.get("server_timing", {})
        timings = {k.removesuffix("_ms"): v / 1000 for k, v in timing.items() if k.endswith("_ms")}
        return ActionChunk(
            actions=response["actions"],
            timings={**timings, "round_trip": time.perf_counter() - start},
            imagined=response.get("imagined"),
        )

    def _exchange(self, connection: ClientConnection, request: bytes) -> Mapping[str, Any] | str:
        """Send a request. Returns the decoded response, or the text of the server's error message."""
        try:
            connection.send(request)
            data = connection.recv(timeout=self.timeout)
        except TimeoutError as error:
            raise ServerLost(f"{self.address}: no answer within {self.timeout:g} s") from error
        except (ConnectionClosed, OSError) as error:
            raise ServerLost(f"{self.address}: the connection was lost ({error})") from error
        return data if isinstance(data, str) else self._decode_response(data)

    def _decode_response(self, data: bytes) -> Mapping[str, Any]:
        message = unpack(data)
        actions = message.get("actions") if isinstance(message, dict) else None
        valid = isinstance(actions, np.ndarray) and actions.ndim == 2 and message.get("request_id") == self._request_id
        if not valid:
            raise ServerLost(f"{self.address}: the message is not a response to request {self._request_id}")
        return message

    def close(self) -> None:
        """Close the connection, without waiting for the server's closing handshake."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        self._resources.close()

    def _connect(self) -> ClientConnection:
        self.close()  # the remains of an earlier attempt
        try:
            connection = self._resources.enter_context(
                connect(
                    self.address,
                    additional_headers=self._headers,
                    compression=None,
                    max_size=MAX_RESPONSE,
                    open_timeout=self.timeout,
                    close_timeout=1,
                    proxy=None,
                )
            )
            self._spec, self._keys = read_description(unpack(_binary(connection.recv(timeout=self.timeout))))
        except InvalidURI as error:
            raise ValueError(f"server address {self.address!r}: {error}") from error
        except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
            raise ServerLost(f"{self.address}: cannot reach a policy server ({error})") from error
        self._connection, self._in_episode = connection, False  # the server begins an episode with each connection
        return connection


def _binary(data: bytes | str) -> bytes:
    if isinstance(data, str):
        raise WireError(f"expected the description of a policy, got the text {data[:80]!r}")
    return data
