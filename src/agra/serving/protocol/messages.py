"""What the messages of the openpi wire mean: observations, checked against what the policy takes, and chunks.   fact 9

openpi leaves the keys to the policy. Ours are below and can be renamed, so that a robot that already speaks to some
openpi server need not change. Shared by server and client; no torch.
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


class RequestError(ValueError):
    """A request that its sender can mend: says which key, what was expected and what came."""


@dataclass(frozen=True, kw_only=True)
class WireKeys:
    """How a request names its observation; several state keys are joined in order."""

    image: str = "observation/image"
    state: tuple[str, ...] = ("observation/state",)
    prompt: str = "prompt"

    def __post_init__(self) -> None:
        names = [self.image, *self.state, self.prompt]
        if not self.state or not all(names) or len(set(names)) != len(names):
            raise ValueError(f"wire keys: expected different names and at least one for the state, got {names}")


OPTIONAL = {
    "embodiment": "text: which robot this is, where the policy knows several",
    "seed": f"whole number of 0 to {SEEDS - 1}: an episode begins with this observation",
    "continuation": "(P, D) float: actions being executed, from this observation's control step on",
    "continuation_delay": "whole number: how many of those will have been executed when the answer arrives",
    "imagine": "true: the answer has `imagined` too, (F, H, W, 3) uint8, the video that the policy expects",
    "request_id": "whole number or text of at most 100 characters: comes back with the answer",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A checked request."""

    observation: Observation
    seed: int | None = None
    continuation: Continuation | None = None
    imagine: bool = False
    request_id: int | str | None = None
    ignored: tuple[str, ...] = ()  # keys that mean nothing here


def describe(spec: PolicySpec, keys: WireKeys) -> dict[str, Any]:
    """The map that a server sends first: what the policy is and how to ask it."""
    dims = {name: (one.state_dim, one.action_dim) for name, one in spec.embodiments.items()}
    state = " or ".join(f"({size[0]},)" for size in dict.fromkeys(dims.values()))
    joined = " (all of them joined)" if len(keys.state) > 1 else ""
    return {
        "agra_wire": WIRE_VERSION,
        "policy": spec.name,
        "horizon": spec.horizon,
        "frame_size": list(spec.frame_size),
        "embodiments": {
            name: {
                quantity: {part: list(span) for part, span in getattr(one, quantity).items()}
                for quantity in ("state", "action")
            }
            for name, one in spec.embodiments.items()
        },
        "keys": {
            keys.image: f"(H, W, 3) uint8 RGB, resized to {spec.frame_size[0]} x {spec.frame_size[1]}",
            **dict.fromkeys(keys.state, f"{state} float{joined}"),
            keys.prompt: f"text of 1 to {MAX_INSTRUCTION} characters",
        },
        "optional_keys": OPTIONAL if spec.imagines else {k: v for k, v in OPTIONAL.items() if k != "imagine"},
        "imagines": spec.imagines,
        "roles": {"image": keys.image, "state": list(keys.state), "prompt": keys.prompt},
    }


def read_description(message: Any) -> tuple[PolicySpec, WireKeys]:
    """Inverse of `describe`. Raises ValueError for what no server of ours sends."""
    try:
        version = message["agra_wire"]
        embodiments = {
            name: EmbodimentSpec(
                **{q: {part: (int(a), int(b)) for part, (a, b) in one[q].items()} for q in ("state", "action")}
            )
            for name, one in message["embodiments"].items()
        }
        height, width = message["frame_size"]
        roles = message["roles"]
        spec = PolicySpec(
            name=str(message["policy"]),
            horizon=int(message["horizon"]),
            frame_size=(int(height), int(width)),
            embodiments=embodiments,
            imagines=bool(message.get("imagines", False)),
        )
        keys = WireKeys(image=roles["image"], state=tuple(roles["state"]), prompt=roles["prompt"])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the server's first message describes no policy of agra ({error!r})") from error
    if version != WIRE_VERSION:
        raise ValueError(f"the server speaks version {version} of the wire, this client version {WIRE_VERSION}")
    return spec, keys


def ask(question: Question, keys: WireKeys, spec: PolicySpec) -> dict[str, Any]:
    """The request that `parse` understands."""
    seen, continuation = question.observation, question.continuation
    message: dict[str, Any] = {keys.image: seen.frame, keys.prompt: seen.instruction, "embodiment": seen.embodiment}
    if len(keys.state) == 1:
        message[keys.state[0]] = seen.state.astype(np.float32)
    else:
        parts = spec.embodiments[seen.embodiment].state
        if len(parts) != len(keys.state):
            raise ValueError(f"the server wants the state as {keys.state}, the policy's parts are {tuple(parts)}")
        for key, (start, end) in zip(keys.state, parts.values(), strict=True):
            message[key] = seen.state[start:end].astype(np.float32)
    if question.seed is not None:
        message["seed"] = question.seed
    if continuation is not None:
        message["continuation"] = continuation.actions.astype(np.float32)
        message["continuation_delay"] = continuation.delay
    if question.imagine:
        message["imagine"] = True
    if question.request_id is not None:
        message["request_id"] = question.request_id
    return message


def answer(chunk: ActionChunk, question: Question, timing: Mapping[str, Any]) -> dict[str, Any]:
    """The reply: openpi's `actions` and `server_timing`, and what the request asked to have back."""
    message: dict[str, Any] = {"actions": chunk.actions, "server_timing": dict(timing)}
    if chunk.imagined is not None:
        message["imagined"] = chunk.imagined
    if question.request_id is not None:
        message["request_id"] = question.request_id
    if question.ignored:
        message["ignored"] = list(question.ignored)
    return message


def parse(message: Any, spec: PolicySpec, keys: WireKeys) -> Question:
    """A request as the policy takes it. Raises RequestError naming the key, what was expected and what came."""
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
        frame=frame(keys.image, message[keys.image]),
        state=_state(message, keys.state, robot.state_dim),
        instruction=text(keys.prompt, message[keys.prompt], MAX_INSTRUCTION),
        embodiment=embodiment,
    )
    known = {*_required(keys), *OPTIONAL}
    return Question(
        observation=observation,
        seed=_whole("seed", message.get("seed"), SEEDS - 1),
        continuation=_continuation(message, robot.action_dim, spec.horizon),
        imagine=_imagine(message.get("imagine"), spec),
        request_id=_request_id(message.get("request_id")),
        ignored=tuple(_shown(key) for key in message if key not in known)[:16],
    )


def frame(key: str, value: Any) -> np.ndarray:
    """An image (H, W, 3) uint8. Raises RequestError."""
    low, high = FRAME_SIDES
    fits = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
    if not fits or not all(low <= side <= high for side in value.shape[:2]):
        raise RequestError(f"{key}: expected (H, W, 3) uint8 with H and W of {low} to {high}, got {_kind(value)}")
    return value


def numbers(key: str, value: Any, shape: tuple[int | str, ...]) -> np.ndarray:
    """Finite floats of a shape, in which a text stands for any size of at least 1, as float32. Raises RequestError."""
    wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    fits = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == len(shape)
    if not fits or any(
        (n < 1) if isinstance(size, str) else (n != size) for n, size in zip(value.shape, shape, strict=True)
    ):
        raise RequestError(f"{key}: expected ({wanted}) float, got {_kind(value)}")
    with np.errstate(over="ignore"):
        found = value.astype(np.float32)
    if not np.isfinite(found).all():
        where = np.argwhere(~np.isfinite(found))[0].tolist()
        raise RequestError(f"{key}: expected finite numbers, got {value[tuple(where)]} at {where}")
    return found


def text(key: str, value: Any, longest: int) -> str:
    """A text of 1 to `longest` characters. Raises RequestError."""
    if not isinstance(value, str) or not value.strip() or len(value) > longest:
        got = f"{len(value)} characters" if isinstance(value, str) else _kind(value)
        raise RequestError(f"{key}: expected a text of 1 to {longest} characters, got {got}")
    return value


def _required(keys: WireKeys) -> tuple[str, ...]:
    return keys.image, *keys.state, keys.prompt


def _embodiment(value: Any, spec: PolicySpec) -> str:
    if value is None and len(spec.embodiments) == 1:
        return next(iter(spec.embodiments))
    if not isinstance(value, str) or value not in spec.embodiments:
        got = "none" if value is None else _shown(value)
        raise RequestError(f"embodiment: expected one of {', '.join(spec.embodiments)}, got {got}")
    return value


def _state(message: Mapping[str, Any], keys: tuple[str, ...], size: int) -> np.ndarray:
    if len(keys) == 1:
        return numbers(keys[0], message[keys[0]], (size,))
    parts = [numbers(key, message[key], ("n",)) for key in keys]
    state = np.concatenate(parts)
    if len(state) != size:
        found = ", ".join(f"{key} {len(part)}" for key, part in zip(keys, parts, strict=True))
        raise RequestError(f"{' and '.join(keys)}: expected {size} numbers between them, got {found}")
    return state


def _continuation(message: Mapping[str, Any], size: int, horizon: int) -> Continuation | None:
    if message.get("continuation") is None:
        return None
    actions = numbers("continuation", message["continuation"], ("P", size))[:horizon]
    delay = _whole("continuation_delay", message.get("continuation_delay"), horizon)
    return Continuation(actions=actions, delay=min(delay or 0, len(actions)))


def _whole(key: str, value: Any, largest: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, np.integer):
        value = int(value)
    if type(value) is not int or not 0 <= value <= largest:
        raise RequestError(f"{key}: expected a whole number of 0 to {largest}, got {_kind(value)}")
    return value


def _imagine(value: Any, spec: PolicySpec) -> bool:
    if value is not None and type(value) is not bool:
        raise RequestError(f"imagine: expected true or false, got {_kind(value)}")
    if value and not spec.imagines:
        raise RequestError("imagine: this server does not; it is started with --imagine where it shall")
    return bool(value)


def _request_id(value: Any) -> int | str | None:
    if value is None or type(value) is int or (isinstance(value, str) and len(value) <= 100):
        return value
    raise RequestError(f"request_id: expected {OPTIONAL['request_id'].partition(':')[0]}, got {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype}"
    if isinstance(value, bool | int | float | np.generic):
        return f"{type(value).__name__} {_shown(value)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    found = value if isinstance(value, str) else repr(value)
    return found if len(found) <= 60 else found[:57] + "..."


def _listed(names: Sequence[Any] | Mapping[Any, Any]) -> str:
    shown = [_shown(name) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") if shown else "none"
