"""Request and response schema of the websocket protocol, and its validation.

openpi leaves the names of the keys to the policy. The names used here are defaults (`WireKeys`), so that a robot which already
talks to an openpi server keeps its own. Shared by server and client. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agra.types import ActionChunk, Continuation, EmbodimentSpec, Observation, PolicySpec

WIRE_VERSION = 1
FRAME_SIDES = (16, 4096)
"""Smallest and largest height and width of a frame, pixels."""
MAX_INSTRUCTION = 1000  # characters
SEEDS = 2**63
MAX_IGNORED_KEYS = 16  # listed in a response


class RequestError(ValueError):
    """An invalid request. The message names the key, the expected value and the actual one."""


@dataclass(frozen=True, kw_only=True)
class WireKeys:
    """Names of the observation's keys in a request. Several state keys are joined in order."""

    image: str = "observation/image"
    state: tuple[str, ...] = ("observation/state",)
    prompt: str = "prompt"

    def __post_init__(self) -> None:
        names = [self.image, *self.state, self.prompt]
        if not self.state or not all(names) or len(set(names)) != len(names):
            raise ValueError(f"wire keys: expected different names and at least one for the state, got {names}")


OPTIONAL = {
    "embodiment": "text: the robot, for a policy with several",
    "seed": f"integer from 0 to {SEEDS - 1}: begins an episode with this observation",
    "continuation": "(P, D) float: actions being executed, starting at this observation's control step",
    "continuation_delay": "integer: number of those that will have been executed when the response arrives",
    "past_image": "(P, H, W, 3) uint8 RGB: at the control steps in `past`, all after an episode's first observation",
    "past_state": "(P, S) float: the states there, all keys joined",
    "imagine": "true: return the predicted video too, as `imagined`, (F, H, W, 3) uint8",
    "request_id": "integer, or text of at most 100 characters: returned with the response",
}
"""Optional keys of a request and their meaning, as the server describes them to clients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InferRequest:
    """A validated request."""

    observation: Observation
    seed: int | None = None
    continuation: Continuation | None = None
    imagine: bool = False
    request_id: int | str | None = None
    ignored: tuple[str, ...] = ()  # unknown keys


def describe(spec: PolicySpec, keys: WireKeys) -> dict[str, Any]:
    """Encode the first message of a server: the policy, and the keys of a request."""
    dims = dict.fromkeys(robot.state_dim for robot in spec.embodiments.values())
    state = " or ".join(f"({size},)" for size in dims)
    joined = " (all of them joined)" if len(keys.state) > 1 else ""
    return {
        "agra_wire": WIRE_VERSION,
        "policy": spec.name,
        "horizon": spec.horizon,
        "frame_size": list(spec.frame_size),
        "embodiments": {
            name: {
                quantity: {part: list(span) for part, span in getattr(robot, quantity).items()}
                for quantity in ("state", "action")
            }
            for name, robot in spec.embodiments.items()
        },
        "keys": {
            keys.image: f"(H, W, 3) uint8 RGB, resized to {spec.frame_size[0]} x {spec.frame_size[1]}",
            **dict.fromkeys(keys.state, f"{state} float{joined}"),
            keys.prompt: f"text of 1 to {MAX_INSTRUCTION} characters",
        },
        "optional_keys": {key: OPTIONAL[key] for key in _optional(spec) if spec.imagines or key != "imagine"},
        "imagines": spec.imagines,
        "past": list(spec.past),
        "roles": {"image": keys.image, "state": list(keys.state), "prompt": keys.prompt},
    }


def read_description(message: Any) -> tuple[PolicySpec, WireKeys]:
    """Inverse of `describe`. Raises ValueError for any other message."""
    try:
        version = message["agra_wire"]
        embodiments = {
            name: EmbodimentSpec(
                **{q: {part: (int(a), int(b)) for part, (a, b) in robot[q].items()} for q in ("state", "action")}
            )
            for name, robot in message["embodiments"].items()
        }
        height, width = message["frame_size"]
        roles = message["roles"]
        spec = PolicySpec(
            name=str(message["policy"]),
            horizon=int(message["horizon"]),
            frame_size=(int(height), int(width)),
            embodiments=embodiments,
            imagines=bool(message.get("imagines", False)),
            past=tuple(int(step) for step in message.get("past", ())),
        )
        keys = WireKeys(image=roles["image"], state=tuple(roles["state"]), prompt=roles["prompt"])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the server's first message does not describe an agra policy ({error!r})") from error
    if version != WIRE_VERSION:
        raise ValueError(f"the server uses version {version} of the protocol, this client version {WIRE_VERSION}")
    return spec, keys


def encode_request(request: InferRequest, keys: WireKeys, spec: PolicySpec) -> dict[str, Any]:
    """Encode a request. Inverse of `parse_request`."""
    observation, continuation = request.observation, request.continuation
    message: dict[str, Any] = {
        keys.image: observation.frame,
        keys.prompt: observation.instruction,
        "embodiment": observation.embodiment,
    }
    if len(keys.state) == 1:
        message[keys.state[0]] = observation.state.astype(np.float32)
    else:
        parts = spec.embodiments[observation.embodiment].state
        if len(parts) != len(keys.state):
            raise ValueError(
                f"state: the server expects the keys {keys.state}, but the policy's state has the parts {tuple(parts)}"
            )
        for key, (start, end) in zip(keys.state, parts.values(), strict=True):
            message[key] = observation.state[start:end].astype(np.float32)
    if observation.past:
        message["past_image"] = np.stack([moment.frame for moment in observation.past])
        message["past_state"] = np.stack([moment.state for moment in observation.past]).astype(np.float32)
    if request.seed is not None:
        message["seed"] = request.seed
    if continuation is not None:
        message["continuation"] = continuation.actions.astype(np.float32)
        message["continuation_delay"] = continuation.delay
    if request.imagine:
        message["imagine"] = True
    if request.request_id is not None:
        message["request_id"] = request.request_id
    return message


def encode_response(chunk: ActionChunk, request: InferRequest, timing: Mapping[str, Any]) -> dict[str, Any]:
    """Encode a response: openpi's `actions` and `server_timing`, and the keys that the request asked for."""
    message: dict[str, Any] = {"actions": chunk.actions, "server_timing": dict(timing)}
    if chunk.imagined is not None:
        message["imagined"] = chunk.imagined
    if request.request_id is not None:
        message["request_id"] = request.request_id
    if request.ignored:
        message["ignored"] = list(request.ignored)
    return message


def parse_request(message: Any, spec: PolicySpec, keys: WireKeys) -> InferRequest:
    """Validate a request against the policy. Raises RequestError with the key, the expected value and the actual one."""
    if not isinstance(message, dict):
        raise RequestError(f"request: expected a map with the keys {_listed(_required(keys))}, got {_kind(message)}")
    missing = [key for key in _required(keys) if key not in message]
    if missing:
        raise RequestError(
            f"{missing[0]}: missing; expected the keys {_listed(_required(keys))}, got {_listed(message)}"
        )
    embodiment = _embodiment(message.get("embodiment"), spec)
    robot = spec.embodiments[embodiment]
    observation = Observation(
        past=_past(message, embodiment, robot.state_dim, spec),
        frame=parse_frame(keys.image, message[keys.image]),
        state=_state(message, keys.state, robot.state_dim),
        instruction=parse_text(keys.prompt, message[keys.prompt], MAX_INSTRUCTION),
        embodiment=embodiment,
    )
    accepted = {*_required(keys), *_optional(spec)}
    return InferRequest(
        observation=observation,
        seed=_integer("seed", message.get("seed"), SEEDS - 1),
        continuation=_continuation(message, robot.action_dim, spec.horizon),
        imagine=_imagine(message.get("imagine"), spec),
        request_id=_request_id(message.get("request_id")),
        ignored=tuple(_shortened(key) for key in message if key not in accepted)[:MAX_IGNORED_KEYS],
    )


def parse_frame(key: str, value: Any) -> np.ndarray:
    """Check an image, (H, W, 3) uint8. Raises RequestError."""
    low, high = FRAME_SIDES
    valid = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
    if not valid or not all(low <= side <= high for side in value.shape[:2]):
        raise RequestError(f"{key}: expected (H, W, 3) uint8 with H and W from {low} to {high}, got {_kind(value)}")
    return value


def parse_floats(key: str, value: Any, shape: tuple[int | str, ...]) -> np.ndarray:
    """Check finite floats of a shape and return them as float32. A name in `shape` is any size of at least 1.

    Raises RequestError.
    """
    expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    valid = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == len(shape)
    if not valid or any(
        (n < 1) if isinstance(size, str) else (n != size) for n, size in zip(value.shape, shape, strict=True)
    ):
        raise RequestError(f"{key}: expected ({expected}) float, got {_kind(value)}")
    with np.errstate(over="ignore"):
        converted = value.astype(np.float32)
    if not np.isfinite(converted).all():
        index = np.argwhere(~np.isfinite(converted))[0].tolist()
        raise RequestError(f"{key}: expected finite numbers, got {value[tuple(index)]} at {index}")
    return converted


def parse_text(key: str, value: Any, longest: int) -> str:
    """Check a text of 1 to `longest` characters. Raises RequestError."""
    if not isinstance(value, str) or not value.strip() or len(value) > longest:
        got = f"{len(value)} characters" if isinstance(value, str) else _kind(value)
        raise RequestError(f"{key}: expected a text of 1 to {longest} characters, got {got}")
    return value


def _required(keys: WireKeys) -> tuple[str, ...]:
    return keys.image, *keys.state, keys.prompt


def _optional(spec: PolicySpec) -> list[str]:
    """The optional keys that are read. Without past observations those are ignored."""
    return [key for key in OPTIONAL if spec.past or not key.startswith("past_")]


def _past(message: Mapping[str, Any], embodiment: str, size: int, spec: PolicySpec) -> tuple[Observation, ...]:
    """The past observations, or none of them."""
    frames, states = message.get("past_image"), message.get("past_state")
    if not spec.past or (frames is None and states is None):
        return ()
    count = len(spec.past)
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or len(frames) != count:
        raise RequestError(f"past_image: expected ({count}, H, W, 3) uint8, got {_kind(frames)}")
    rows = parse_floats("past_state", states, (count, size))
    return tuple(
        Observation(frame=parse_frame("past_image", frame), state=row, instruction="", embodiment=embodiment)
        for frame, row in zip(frames, rows, strict=True)
    )


def _embodiment(value: Any, spec: PolicySpec) -> str:
    if value is None and len(spec.embodiments) == 1:
        return next(iter(spec.embodiments))
    if not isinstance(value, str) or value not in spec.embodiments:
        got = "none" if value is None else _shortened(value)
        raise RequestError(f"embodiment: expected one of {', '.join(spec.embodiments)}, got {got}")
    return value


def _state(message: Mapping[str, Any], keys: tuple[str, ...], size: int) -> np.ndarray:
    if len(keys) == 1:
        return parse_floats(keys[0], message[keys[0]], (size,))
    parts = [parse_floats(key, message[key], ("n",)) for key in keys]
    state = np.concatenate(parts)
    if len(state) != size:
        sizes = ", ".join(f"{key} {len(part)}" for key, part in zip(keys, parts, strict=True))
        raise RequestError(f"{' and '.join(keys)}: expected {size} numbers in total, got {sizes}")
    return state


def _continuation(message: Mapping[str, Any], size: int, horizon: int) -> Continuation | None:
    if message.get("continuation") is None:
        return None
    actions = parse_floats("continuation", message["continuation"], ("P", size))[:horizon]
    delay = _integer("continuation_delay", message.get("continuation_delay"), horizon)
    return Continuation(actions=actions, delay=min(delay or 0, len(actions)))


def _integer(key: str, value: Any, largest: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, np.integer):
        value = int(value)
    if type(value) is not int or not 0 <= value <= largest:
        raise RequestError(f"{key}: expected an integer from 0 to {largest}, got {_kind(value)}")
    return value


def _imagine(value: Any, spec: PolicySpec) -> bool:
    if value is not None and type(value) is not bool:
        raise RequestError(f"imagine: expected true or false, got {_kind(value)}")
    if value and not spec.imagines:
        raise RequestError("imagine: not enabled; start the server with --imagine")
    return bool(value)


def _request_id(value: Any) -> int | str | None:
    if value is None or type(value) is int or (isinstance(value, str) and len(value) <= 100):
        return value
    raise RequestError(f"request_id: expected {OPTIONAL['request_id'].partition(':')[0]}, got {_kind(value)}")


def _kind(value: Any) -> str:
    """A short name of a value for error messages."""
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype}"
    if isinstance(value, bool | int | float | np.generic):
        return f"{type(value).__name__} {_shortened(value)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Sequence[Any] | Mapping[Any, Any]) -> str:
    texts = [_shortened(name) for name in names]
    return ", ".join(texts[:12]) + (f" and {len(texts) - 12} more" if len(texts) > 12 else "") if texts else "none"
