"""Policies on servers of other projects, as an `agra.types.Policy`: clients of openpi's and of GR00T's protocol.

Both protocols leave the names of the keys to the policy. A `KeyMapping` says which key carries which quantity. These
servers take no seed: trials have the same scenes for every policy, but the policy's own random numbers are not
reproducible. Imports no torch.
"""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agra.serving.client import ServerLost, ServerRefused, closing_on_error
from agra.serving.protocol.wire import pack, pack_groot, unpack, unpack_groot
from agra.types import ActionChunk, Observation

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class KeyMapping:
    """Keys of a server's messages for our frames, states, actions and instruction.

    `images` maps the server's key to `frame` or to one of a suite's `views`. `state` and `actions` map it to the
    dimensions [start, end) of our state and action. `instruction` and each of `constants` are single keys. `image_size`
    (H, W) resizes images to that size, padded with black. None sends them as rendered. `instruction_prefix` precedes
    every instruction.

    With the wire `groot`, GR00T-N1.5's, every array gets a leading axis of one time step and the instruction is a list
    of one text, as its own clients send them. With `groot_n16`, GR00T-N1.6's, keys are the bare names of its modality
    configuration, such as `ego_view` and not `video.ego_view`, and arrays have a leading batch axis as well.
    """

    wire: Literal["openpi", "groot", "groot_n16"]
    images: Mapping[str, str]
    state: Mapping[str, Span]
    actions: Mapping[str, Span]
    instruction: str
    image_size: Span | None = None
    constants: Mapping[str, Any] | None = None
    instruction_prefix: str = ""

    def __post_init__(self) -> None:
        if self.wire not in ("openpi", "groot", "groot_n16"):
            raise ValueError(f"KeyMapping.wire: expected 'openpi', 'groot' or 'groot_n16', got {self.wire!r}")
        if self.wire == "groot_n16" and self.constants:
            raise ValueError("KeyMapping.constants: the wire groot_n16 has no further keys, expected none")
        spans = sorted(tuple(span) for span in self.actions.values())
        ends = [0, *(end for _, end in spans)]
        if not spans or any(start != end for (start, _), end in zip(spans, ends, strict=False)):
            raise ValueError(f"KeyMapping.actions: expected contiguous spans from 0, got {dict(self.actions)}")


_GR1_PARTS = {
    "left_arm": (0, 7),
    "right_arm": (7, 14),
    "left_hand": (14, 20),
    "right_hand": (20, 26),
    "waist": (26, 29),
}

KEY_MAPPINGS = {
    "openpi_libero": KeyMapping(
        wire="openpi",
        images={"observation/image": "frame", "observation/wrist_image": "wrist"},
        state={"observation/state": (0, 8)},
        actions={"actions": (0, 7)},
        instruction="prompt",
        image_size=(224, 224),
    ),
    "openpi_metaworld": KeyMapping(
        wire="openpi",
        images={"observation/image": "frame"},
        state={"observation/state": (0, 4)},
        actions={"actions": (0, 4)},
        instruction="prompt",
        image_size=(224, 224),
    ),
    "groot_gr1": KeyMapping(
        wire="groot",
        images={"video.ego_view": "frame"},
        state={f"state.{part}": span for part, span in _GR1_PARTS.items()},
        actions={f"action.{part}": span for part, span in _GR1_PARTS.items()},
        instruction="annotation.human.coarse_action",
    ),
    "groot_n16_gr1": KeyMapping(
        wire="groot_n16",
        images={"ego_view_bg_crop_pad_res256_freq20": "frame"},
        state=_GR1_PARTS,
        actions=_GR1_PARTS,
        instruction="task",
        instruction_prefix="unlocked_waist: ",
    ),
}
"""Key mappings of openpi's LIBERO policies, of the same keys for Meta-World, of GR00T's GR1 policies, and of
GR00T-N1.6's embodiment tag GR1, whose instructions name the waist."""


def read_key_mapping(name: str) -> KeyMapping:
    """Return one of `KEY_MAPPINGS` by name, or read a JSON file with the fields of `KeyMapping`. Raises ValueError."""
    if name in KEY_MAPPINGS:
        return KEY_MAPPINGS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"key mapping {name!r}: expected one of {', '.join(KEY_MAPPINGS)}, or a JSON file")
    try:
        return KeyMapping(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(KeyMapping))
        raise ValueError(f"{path}: expected a JSON object with the fields {names} ({error})") from error


def encode_observation(observation: Observation, mapping: KeyMapping) -> dict[str, Any]:
    """Encode an observation with the server's keys. Raises ValueError for an image that the simulator does not have."""
    available = {"frame": observation.frame, **observation.views}
    message: dict[str, Any] = dict(mapping.constants or {})
    for key, name in mapping.images.items():
        if name not in available:
            raise ValueError(
                f"key mapping: the server expects {name!r} as {key}, the simulator has {', '.join(available)}"
            )
        image = available[name]
        message[key] = image if mapping.image_size is None else resize_with_pad(image, *mapping.image_size)
    state = {key: observation.state[start:end].astype(np.float32) for key, (start, end) in mapping.state.items()}
    instruction = mapping.instruction_prefix + observation.instruction
    if mapping.wire == "groot_n16":
        return {
            "video": {key: image[None, None] for key, image in message.items()},
            "state": {key: values[None, None] for key, values in state.items()},
            "language": {mapping.instruction: [[instruction]]},
        }
    message |= state
    if mapping.wire == "groot":
        message = {key: value[None] if isinstance(value, np.ndarray) else value for key, value in message.items()}
    message[mapping.instruction] = [instruction] if mapping.wire == "groot" else instruction
    return message


def decode_actions(message: Any, mapping: KeyMapping) -> ActionChunk:
    """Decode the server's actions (K, D) into our order. Raises ServerRefused for any other message."""
    if isinstance(message, list) and message:  # GR00T N1.6: [action, info]
        message = message[0]
    if isinstance(message, dict) and "error" in message:
        raise ServerRefused(f"error of the policy server: {message['error']}")
    parts = []
    for key, (start, end) in sorted(mapping.actions.items(), key=lambda item: item[1]):
        part = message.get(key) if isinstance(message, dict) else None
        if mapping.wire == "groot_n16" and isinstance(part, np.ndarray) and part.ndim == 3 and len(part) == 1:
            part = part[0]
        if not isinstance(part, np.ndarray) or part.ndim not in (1, 2) or part.shape[-1] < end - start:
            got = f"{part.shape}" if isinstance(part, np.ndarray) else type(part).__name__
            raise ServerRefused(f"{key}: expected (K, {end - start}) numbers from the policy server, got {got}")
        parts.append(np.atleast_2d(part)[:, : end - start])
    return ActionChunk(actions=np.concatenate(parts, axis=1).astype(np.float32))


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3): bilinear, aspect ratio kept, padded with black."""
    from PIL import Image

    scale = min(height / image.shape[0], width / image.shape[1])
    rows, columns = (max(1, int(side * scale)) for side in image.shape[:2])
    resized = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    padded = np.zeros((height, width, 3), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    padded[top : top + rows, left : left + columns] = resized
    return padded


class OpenpiPolicy:
    """A policy on an openpi server, such as ws://127.0.0.1:8000. Connects at the first call.

    Raises ServerLost (a ConnectionError) for a server that is unreachable or too slow, and ServerRefused (a ValueError)
    for its error messages. The first response of a large model can take a minute, so `timeout` is long, in seconds.
    """

    def __init__(
        self, address: str, mapping: KeyMapping, *, api_key: str | None = None, timeout: float = 120.0
    ) -> None:
        if mapping.wire != "openpi" or not address.startswith(("ws://", "wss://")):
            raise ValueError(
                f"{address}: expected ws://HOST:PORT and a key mapping for openpi, got one for {mapping.wire}"
            )
        self.address, self.mapping, self.timeout = address, mapping, timeout
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._connection: Any = None
        self._resources = ExitStack()  # closes the connection

    def reset(self, seed: int) -> None:
        """Do nothing: the protocol has no episodes and no seeds."""

    def act(self, observation: Observation) -> ActionChunk:
        """Request a chunk."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        start = time.perf_counter()
        try:
            with closing_on_error(self.close):
                if self._connection is None:
                    self._connection = self._resources.enter_context(
                        connect(
                            self.address,
                            additional_headers=self._headers,
                            compression=None,
                            max_size=None,
                            open_timeout=self.timeout,
                            close_timeout=1,
                            proxy=None,
                        )
                    )
                    self._connection.recv(timeout=self.timeout)  # the server's metadata
                self._connection.send(pack(encode_observation(observation, self.mapping)))
                data = self._connection.recv(timeout=self.timeout)
        except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
            raise ServerLost(f"{self.address}: no answer from the policy server ({error!r})") from error
        if isinstance(data, str):  # openpi sends its traceback as text
            raise ServerRefused(f"{self.address}: {data.strip().splitlines()[-1] if data.strip() else 'refused'}")
        chunk = decode_actions(unpack(data), self.mapping)
        return ActionChunk(actions=chunk.actions, timings={"round_trip": time.perf_counter() - start})

    def close(self) -> None:
        """Close the connection. The next call connects again."""
        self._connection = None
        self._resources.close()


class GrootPolicy:
    """A policy on a server of GR00T-N1.5 or N1.6, such as tcp://127.0.0.1:5555. Raises as `OpenpiPolicy` does."""

    def __init__(
        self, address: str, mapping: KeyMapping, *, api_key: str | None = None, timeout: float = 120.0
    ) -> None:
        if mapping.wire == "openpi" or not address.startswith("tcp://"):
            raise ValueError(
                f"{address}: expected tcp://HOST:PORT and a key mapping for groot, got one for {mapping.wire}"
            )
        self.address, self.mapping, self.timeout, self.api_key = address, mapping, timeout, api_key
        self._socket: Any = None

    def reset(self, seed: int) -> None:
        """Begin an episode of N1.6, whose own server ignores the seed. N1.5 has no episodes."""
        if self.mapping.wire == "groot_n16":
            answer = self._call("reset", {"options": {"seed": seed}})
            if isinstance(answer, dict) and "error" in answer:
                raise ServerRefused(f"error of the policy server: {answer['error']}")

    def act(self, observation: Observation) -> ActionChunk:
        """Request a chunk."""
        start = time.perf_counter()
        data = encode_observation(observation, self.mapping)
        if self.mapping.wire == "groot_n16":
            data = {"observation": data, "options": None}
        chunk = decode_actions(self._call("get_action", data), self.mapping)
        return ActionChunk(actions=chunk.actions, timings={"round_trip": time.perf_counter() - start})

    def close(self) -> None:
        """Close the connection. The next call connects again."""
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()

    def _call(self, endpoint: str, data: Mapping[str, Any]) -> Any:
        import zmq

        message = {"endpoint": endpoint, "data": dict(data)}
        try:
            with closing_on_error(self.close):
                if self._socket is None:
                    self._socket = zmq.Context.instance().socket(zmq.REQ)
                    self._socket.setsockopt(zmq.LINGER, 0)
                    self._socket.connect(self.address)
                self._socket.send(pack_groot(message | ({"api_token": self.api_key} if self.api_key else {})))
                if not self._socket.poll(1000 * self.timeout):
                    raise ServerLost(f"{self.address}: no answer from the policy server within {self.timeout:g} s")
                return unpack_groot(self._socket.recv())
        except zmq.ZMQError as error:
            raise ServerLost(
                f"{self.address}: no answer from the policy server ({error}); expected a server at tcp://HOST:PORT"
            ) from error


def connect_policy(address: str, mapping: KeyMapping, *, api_key: str | None = None) -> OpenpiPolicy | GrootPolicy:
    """Create the client of the mapping's protocol."""
    return (OpenpiPolicy if mapping.wire == "openpi" else GrootPolicy)(address, mapping, api_key=api_key)
