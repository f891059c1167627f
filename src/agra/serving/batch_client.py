"""A served policy as an `agra.types.BatchPolicy`: many episodes at once, for programs that play several environments."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from agra.serving.client import PolicyClient
from agra.types import ActionChunk, PolicyRequest, PolicySpec


class BatchClient:
    """An `agra.types.BatchPolicy` on a server, such as ws://127.0.0.1:8000. Every episode has a connection of its own.

    The requests of one call are sent at once, so the server computes them in one forward pass. Raises what
    `agra.serving.client.PolicyClient` raises. Call `close` of an episode at its end.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 10.0) -> None:
        self._address, self._api_key, self._timeout = address, api_key, timeout
        client = self._connect()
        self.spec: PolicySpec = client.spec
        """Inputs and outputs of the server's policy, read once."""
        client.close()

    def episode(self, seed: int) -> PolicyClient:
        """Return a client that begins an episode with its first request."""
        client = self._connect()
        client.reset(seed)
        return client

    def act_batch(self, requests: Sequence[PolicyRequest]) -> list[ActionChunk]:
        """Return one chunk per request, in order. Raises ServerLost, or ServerRefused for an invalid request."""
        if len(requests) < 2:
            return [_act(request) for request in requests]
        with ThreadPoolExecutor(len(requests)) as threads:
            return [*threads.map(_act, requests)]

    def _connect(self) -> PolicyClient:
        return PolicyClient(self._address, api_key=self._api_key, timeout=self._timeout)


def _act(request: PolicyRequest) -> ActionChunk:
    client: PolicyClient = request.episode
    if request.imagine:
        return client.act_and_imagine(request.observation)
    return client.act(request.observation, continuation=request.continuation)
