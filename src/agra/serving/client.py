"""A policy behind a server, as a robot or a simulator sees it: numpy and a websocket, no torch.             fact 9"""

import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from agra.serving.protocol.messages import Question, WireKeys, ask, read_description
from agra.serving.protocol.wire import WireError, pack, unpack
from agra.types import ActionChunk, Continuation, Observation, PolicySpec

MAX_ANSWER = 2**24  # bytes


class ServerLost(ConnectionError):
    """The server is not there, went away or did not answer in time; the next call tries again."""


class ServerRefused(ValueError):
    """The server's word on a request that it cannot take."""


class PolicyClient:
    """An `agra.types.Policy` on a server, such as ws://127.0.0.1:8000. Connects when first needed, and again after a loss.

    An answer that takes longer than `timeout` seconds counts as lost and its connection with it, so that it cannot be
    taken for a later one. Raises ServerLost (a ConnectionError) and ServerRefused (a ValueError). Not for several
    threads at once.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 10.0) -> None:
        if not address.startswith(("ws://", "wss://")):
            raise ValueError(f"server address: expected ws://HOST:PORT or wss://HOST:PORT, got {address!r}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout}")
        self.address, self.timeout = address, timeout
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._connection: ClientConnection | None = None
        self._life = ExitStack()  # of the connection
        self._spec: PolicySpec | None = None
        self._keys = WireKeys()
        self._seed, self._begun = 0, False
        self._asked = 0

    @property
    def spec(self) -> PolicySpec:
        """What the server's policy takes and answers."""
        if self._spec is None:
            self._connect()
        assert self._spec is not None
        return self._spec

    def reset(self, seed: int) -> None:
        """Begin an episode with the next observation."""
        self._seed, self._begun = seed, False

    def act(self, observation: Observation, *, continuation: Continuation | None = None) -> ActionChunk:
        """The server's chunk; `timings` are its stages and `round_trip`, seconds."""
        return self._ask(observation, continuation=continuation)

    def act_and_imagine(self, observation: Observation) -> ActionChunk:
        """The same chunk, with the video that the policy expects where the server gives it (`agra serve --imagine`)."""
        return self._ask(observation, imagine=self.spec.imagines)

    def _ask(
        self, observation: Observation, *, continuation: Continuation | None = None, imagine: bool = False
    ) -> ActionChunk:
        connection = self._connection or self._connect()
        self._asked += 1
        question = Question(
            observation=observation,
            seed=None if self._begun else self._seed,
            continuation=continuation,
            imagine=imagine,
            request_id=self._asked,
        )
        start = time.perf_counter()
        try:
            connection.send(pack(ask(question, self._keys, self.spec)))
            data = connection.recv(timeout=self.timeout)
        except TimeoutError as error:
            self.close()
            raise ServerLost(f"{self.address}: no answer within {self.timeout:g} s") from error
        except (ConnectionClosed, OSError) as error:
            self.close()
            raise ServerLost(f"{self.address}: the connection was lost ({error})") from error
        if isinstance(data, str):
            raise ServerRefused(f"{self.address}: {data}")
        message = _answer(data, self._asked, self.address)
        self._begun = True
        timing = message.get("server_timing", {})
        timings = {k.removesuffix("_ms"): v / 1000 for k, v in timing.items() if k.endswith("_ms")}
        return ActionChunk(
            actions=message["actions"],
            timings={**timings, "round_trip": time.perf_counter() - start},
            imagined=message.get("imagined"),
        )

    def close(self) -> None:
        """Hang up, without waiting for the server's goodbye."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        self._life.close()

    def _connect(self) -> ClientConnection:
        self.close()  # whatever an attempt before left
        try:
            connection = self._life.enter_context(
                connect(
                    self.address,
                    additional_headers=self._headers,
                    compression=None,
                    max_size=MAX_ANSWER,
                    open_timeout=self.timeout,
                    close_timeout=1,
                    proxy=None,
                )
            )
            self._spec, self._keys = read_description(unpack(_binary(connection.recv(timeout=self.timeout))))
        except InvalidURI as error:
            raise ValueError(f"server address {self.address!r}: {error}") from error
        except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError) as error:
            raise ServerLost(f"{self.address}: no policy server to be reached ({error})") from error
        self._connection, self._begun = connection, False  # a new connection is a new episode to the server
        return connection


def _binary(data: bytes | str) -> bytes:
    if isinstance(data, str):
        raise WireError(f"expected a description of the policy, got the text {data[:80]!r}")
    return data


def _answer(data: bytes, asked: int, address: str) -> Mapping[str, Any]:
    message = unpack(data)
    actions = message.get("actions") if isinstance(message, dict) else None
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or message.get("request_id") != asked:
        raise ServerLost(f"{address}: answered with something that is no answer to request {asked}")
    return message
