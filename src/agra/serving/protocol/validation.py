"""Validation of requests: what a client sent, checked key by key against what the policy takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agra.serving.protocol.messages import (
    FRAME_SIDES,
    MAX_IGNORED_KEYS,
    MAX_INSTRUCTION,
    OPTIONAL,
    SEEDS,
    InferRequest,
    WireKeys,
    _optional,
)
from agra.types import Continuation, EmbodimentSpec, Observation, PolicySpec


class RequestError(ValueError):
    """An invalid request. The message names the key, the expected value and the actual one."""


def parse_request(message: Any, spec: PolicySpec, keys: WireKeys) -> InferRequest:
    """Validate a request against the policy.

    Raises RequestError with the key, the expected value and the actual one.
    """
    if not isinstance(message, dict):
        raise RequestError(f"request: expected a map with the keys {_listed(_required(keys))}, got {kind_of(message)}")
    _check_present(message, _required(keys))
    embodiment = _embodiment(message.get("embodiment"), spec)
    robot = spec.embodiments[embodiment]
    view_keys = keys.views(robot.views)
    if view_keys and not view_keys.values() & message.keys():
        raise RequestError(
            f"{', '.join(view_keys.values())}: missing; the policy reads each camera by itself, and clients of version 0.1 "
            "send one joined frame: update agra beside the robot"
        )
    _check_present(message, (*_required(keys), *view_keys.values()))
    observation = Observation(
        past=_past(message, embodiment, robot, spec),
        frame=parse_frame(keys.image, message[keys.image]),
        views={view: parse_frame(key, message[key]) for view, key in view_keys.items()},
        state=_state(message, keys.state, robot.state_dim),
        instruction=parse_text(keys.prompt, message[keys.prompt], MAX_INSTRUCTION),
        embodiment=embodiment,
    )
    accepted = {*_required(keys), *view_keys.values(), *_optional(spec)}
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
        raise RequestError(f"{key}: expected (H, W, 3) uint8 with H and W from {low} to {high}, got {kind_of(value)}")
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
        raise RequestError(f"{key}: expected ({expected}) float, got {kind_of(value)}")
    with np.errstate(over="ignore"):
        converted = value.astype(np.float32)
    if not np.isfinite(converted).all():
        index = np.argwhere(~np.isfinite(converted))[0].tolist()
        raise RequestError(f"{key}: expected finite numbers, got {value[tuple(index)]} at {index}")
    return converted


def parse_text(key: str, value: Any, longest: int) -> str:
    """Check a text of 1 to `longest` characters. Raises RequestError."""
    if not isinstance(value, str) or not value.strip() or len(value) > longest:
        got = f"{len(value)} characters" if isinstance(value, str) else kind_of(value)
        raise RequestError(f"{key}: expected a text of 1 to {longest} characters, got {got}")
    return value


def _required(keys: WireKeys) -> tuple[str, ...]:
    return keys.image, *keys.state, keys.prompt


def _check_present(message: Mapping[str, Any], required: Sequence[str]) -> None:
    if missing := [key for key in required if key not in message]:
        raise RequestError(f"{missing[0]}: missing; expected the keys {_listed(required)}, got {_listed(message)}")


def _past(
    message: Mapping[str, Any], embodiment: str, robot: EmbodimentSpec, spec: PolicySpec
) -> tuple[Observation, ...]:
    """The past observations, or none of them."""
    states, given = message.get("past_state"), message.get("past_views")
    if not spec.past or (message.get("past_image") is None and states is None):
        return ()
    clips: dict[str, Any] = {"past_image": message.get("past_image")}
    if robot.views:
        if not isinstance(given, dict) or given.keys() != {*robot.views}:
            got = _listed(given) if isinstance(given, dict) else kind_of(given)
            raise RequestError(f"past_views: expected a map of {', '.join(robot.views)}, got {got}")
        clips |= {f"past_views.{view}": given[view] for view in robot.views}
    count = len(spec.past)
    for key, frames in clips.items():
        if not isinstance(frames, np.ndarray) or frames.ndim != 4 or len(frames) != count:
            raise RequestError(f"{key}: expected ({count}, H, W, 3) uint8, got {kind_of(frames)}")
    rows = parse_floats("past_state", states, (count, robot.state_dim))
    pictures = [[parse_frame(key, frames[step]) for key, frames in clips.items()] for step in range(count)]
    return tuple(
        Observation(
            frame=frame,
            views=dict(zip(robot.views, views, strict=True)),
            state=row,
            instruction="",
            embodiment=embodiment,
        )
        for (frame, *views), row in zip(pictures, rows, strict=True)
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
        raise RequestError(f"{key}: expected an integer from 0 to {largest}, got {kind_of(value)}")
    return value


def _imagine(value: Any, spec: PolicySpec) -> bool:
    if value is not None and type(value) is not bool:
        raise RequestError(f"imagine: expected true or false, got {kind_of(value)}")
    if value and not spec.imagines:
        raise RequestError("imagine: not enabled; start the server with --imagine")
    return bool(value)


def _request_id(value: Any) -> int | str | None:
    if value is None or type(value) is int or (isinstance(value, str) and len(value) <= 100):
        return value
    raise RequestError(f"request_id: expected {OPTIONAL['request_id'].partition(':')[0]}, got {kind_of(value)}")


def kind_of(value: Any) -> str:
    """Return a short name of a value for error messages."""
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
