"""Configuration of a policy server: addresses, limits, TLS and GR00T's protocol.

`agra serve` takes every field as a flag, with the field's docstring as its help. Groups have no prefix, so a field
whose name needs one for the command line says so.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from agra.serving.protocol.messages import WireKeys

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what clients can use."""

    max_message: int = 8 * 2**20
    """Bytes of a request, in any number of frames or parts."""
    max_pending: int = 256 * 2**20
    """Bytes of all requests that are being read or not yet answered, over both protocols."""
    max_connections: int = 64
    """Clients of each protocol."""
    max_batch: int = 16
    """Requests of different clients that are computed in one forward pass."""
    request_rate: float = 100.0
    """Requests per second of each client. A faster client is slowed down."""
    max_bad_requests: int = 20
    """Consecutive invalid requests after which a connection is closed."""
    bad_request_rate: float = 100.0
    """Error replies per second, over all clients. Only the senders of invalid requests wait."""
    request_timeout: float = 30.0
    """Seconds for a response, with the time in the queue."""
    idle_timeout: float = 600.0
    """Seconds without a request after which a connection is closed."""
    send_timeout: float = 10.0
    """Seconds for a client to read a response."""
    handshake_timeout: float = 10.0
    """Seconds for a handshake."""
    receive_timeout: float = 10.0
    """Seconds to receive a large request, once there is memory for it."""
    input_stretch: float = 10.0
    """Widths of the training range by which states and continuations may lie outside it."""
    check_timeout: float = 120.0
    """Seconds for a newly loaded policy to answer a blank observation."""
    stuck_after: float = 60.0
    """Seconds of a forward pass after which /readyz fails."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.max_pending < 2 * self.max_message:
            raise ValueError(
                f"max_pending: expected at least twice max_message, {2 * self.max_message}, got {self.max_pending}"
            )

    @property
    def share(self) -> int:
        """Bytes that each connection may always have pending: half of `max_pending`, split over the connections of both
        protocols. Larger requests wait for one of the slots in the other half."""
        return min(self.max_message, self.max_pending // (4 * self.max_connections))

    @property
    def large_requests(self) -> int:
        """Number of slots for requests larger than a share."""
        return self.max_pending // 2 // self.max_message


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Encryption of the websocket server, which is plain without the two files."""

    certificate: Annotated[Path | None, arg(name="tls-certificate")] = None
    """PEM file. The address is then wss://."""
    key: Annotated[Path | None, arg(name="tls-key")] = None
    """PEM file of its private key."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("--tls-certificate and --tls-key: expected both or none, got one")

    def context(self) -> ssl.SSLContext | None:
        """Load the files. Raises OSError for one that is missing or invalid."""
        if self.certificate is None or self.key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key)
        return context


@dataclass(frozen=True, kw_only=True)
class GrootWire:
    """GR00T's ZeroMQ protocol and the names that its clients use."""

    port: Annotated[int | None, arg(name="groot-port")] = None
    """Port of GR00T's ZeroMQ protocol, which is served beside the websocket. 0 takes a free one."""
    camera: Annotated[str, arg(name="groot-camera")] = "ego_view"
    """Name of the first camera in GR00T's requests: video.NAME. Further ones have the names of the policy's views."""
    annotation: Annotated[str, arg(name="groot-annotation")] = "human.action.task_description"
    """Name of the instruction in GR00T's requests: annotation.NAME."""
    version: Annotated[Literal["n1.5", "n1.6"], arg(name="groot-version")] = "n1.6"
    """Format of get_modality_config for GR00T's clients. Later versions read that of n1.6."""
    embodiment: str | None = None
    """Robot of GR00T's clients, for a policy with several embodiments."""
    allow_plaintext: Annotated[bool, arg(name="groot-allow-plaintext")] = False
    """Serve GR00T's protocol beside TLS on a network too, where its key and frames are sent unencrypted."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Configuration of a policy server. The API key is not part of it, because flags are visible to other users."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs AGRA_API_KEY or --allow-unauthenticated."""
    port: int = 8000
    """Port of the websocket server. 0 takes a free one."""
    allow_unauthenticated: bool = False
    """Listen on a network without a key."""
    image_key: str = "observation/image"
    """Key of the frame in requests."""
    view_key: str = "observation/{view}_image"
    """Pattern of the keys of further cameras in requests, with {view} for a camera's name."""
    state_keys: tuple[str, ...] = ("observation/state",)
    """Keys of the state in requests. Several are joined in order."""
    prompt_key: str = "prompt"
    """Key of the instruction in requests."""
    reload_interval: float | None = None
    """Seconds between checks for a newer checkpoint in the run folder, which is then loaded."""
    ready_file: Path | None = None
    """Write the addresses as JSON here once the server accepts clients."""
    tls: Annotated[Tls, arg(name="")] = Tls()
    groot: Annotated[GrootWire, arg(name="")] = GrootWire()
    limits: Annotated[Limits, arg(name="")] = Limits()

    def __post_init__(self) -> None:
        for flag, port in (("--port", self.port), ("--groot-port", self.groot.port)):
            if port is not None and not 0 <= port < 65536:
                raise ValueError(f"{flag} {port}: expected 0 to 65535")
        plaintext = self.tls.certificate is not None and self.groot.port is not None and not self.groot.allow_plaintext
        if plaintext and self.host not in LOOPBACK:
            raise ValueError(
                f"--groot-port {self.groot.port}: GR00T's protocol has no TLS, so the key would be sent unencrypted; "
                "use --groot-allow-plaintext to allow that, or serve only one of the two protocols"
            )

    @property
    def keys(self) -> WireKeys:
        """Names of the keys in requests."""
        return WireKeys(image=self.image_key, state=self.state_keys, prompt=self.prompt_key, view=self.view_key)

    def check_access(self, api_key: str | None) -> None:
        """Raise ValueError for an invalid key, or for a network address without a key."""
        check_key(api_key)
        if self.host not in LOOPBACK and api_key is None and not self.allow_unauthenticated:
            raise ValueError(
                f"--host {self.host}: set AGRA_API_KEY, or use --allow-unauthenticated to let everyone on that network "
                "in"
            )


def check_key(key: str | None) -> bytes | None:
    """Return a server's key as bytes, stripped. Raises ValueError for a key that an HTTP header cannot carry."""
    if key is None:
        return None
    if not key.strip():
        raise ValueError(
            "API key: expected at least one character, got none; unset AGRA_API_KEY to serve without a key"
        )
    if not key.isascii() or not key.strip().isprintable():
        raise ValueError("API key: expected printable ASCII characters, which every client encodes alike")
    return key.strip().encode("ascii")
