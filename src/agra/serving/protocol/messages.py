"""Request and response schema of the websocket protocol.

openpi leaves the names of the keys to the policy. The names used here are defaults (`WireKeys`), so that a robot which
already talks to an openpi server keeps its own. Shared by server and client. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from agra.types import (
    ActionChunk,
    ActionNoise,
    Continuation,
    EmbodimentSpec,
    Observation,
    PolicySpec,
    VideoNoise,
    cameras_of,
    side_by_side,
)

WIRE_VERSION = 1
FRAME_SIDES = (16, 4096)
"""Smallest and largest height and width of a frame, pixels."""
MAX_INSTRUCTION = 1000  # characters
SEEDS = 2**63
MAX_IGNORED_KEYS = 16  # listed in a response


@dataclass(frozen=True, kw_only=True)
class WireKeys:
    """Names of the observation's keys in a request. Several state keys are joined in order.

    `view` is the pattern of the keys of further cameras, with `{view}` for a camera's name. None is the protocol of
    earlier servers, which take all cameras side by side in one image.
    """

    image: str = "observation/image"
    state: tuple[str, ...] = ("observation/state",)
    prompt: str = "prompt"
    view: str | None = "observation/{view}_image"

    def __post_init__(self) -> None:
        if self.view is not None and "{view}" not in self.view:
            raise ValueError(f"wire keys: expected {{view}} in the pattern of further cameras, got {self.view!r}")
        names = [self.image, *self.state, self.prompt]
        if not self.state or not all(names) or len(set(names)) != len(names):
            raise ValueError(f"wire keys: expected different names and at least one for the state, got {names}")

    def views(self, names: Sequence[str]) -> dict[str, str]:
        """Return the keys of further cameras by name. Raises ValueError for a key that another quantity has."""
        if self.view is None:
            return {}
        keys = {name: self.view.replace("{view}", name) for name in names}
        if taken := {*keys.values()} & {self.image, *self.state, self.prompt, *OPTIONAL}:
            raise ValueError(f"wire keys: {min(taken)!r} is the key of a camera and of another quantity; rename one")
        return keys


OPTIONAL = {
    "embodiment": "text: the robot, for a policy with several",
    "seed": f"integer from 0 to {SEEDS - 1}: begins an episode with this observation",
    "continuation": "(P, D) float: actions being executed, starting at this observation's control step",
    "continuation_delay": "integer: number of those that will have been executed when the response arrives",
    "past_image": "(P, H, W, 3) uint8 RGB: at the control steps in `past`, all after an episode's first observation",
    "past_state": "(P, S) float: the states there, all keys joined",
    "past_views": "map of each further camera's name to (P, H, W, 3) uint8 RGB: its frames there",
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
    picture = f"(H, W, 3) uint8 RGB, resized to {spec.frame_size[0]} x {spec.frame_size[1]}"
    views = [key for robot in spec.embodiments.values() for key in keys.views(robot.views).values()]
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
            | {"views": list(robot.views), "recorded_sizes": [list(size) for size in robot.recorded_sizes]}
            for name, robot in spec.embodiments.items()
        },
        "keys": {
            keys.image: picture,
            **dict.fromkeys(views, "(H, W, 3) uint8 RGB, a further camera beside the first before the resizing"),
            **dict.fromkeys(keys.state, f"{state} float{joined}"),
            keys.prompt: f"text of 1 to {MAX_INSTRUCTION} characters",
        },
        "optional_keys": {key: OPTIONAL[key] for key in _optional(spec) if spec.imagines or key != "imagine"},
        "imagines": spec.imagines,
        "past": list(spec.past),
        "action_noise": spec.action_noise,
        "video_noise": spec.video_noise,
        "roles": {"image": keys.image, "state": list(keys.state), "prompt": keys.prompt, "view": keys.view},
    }


def read_description(message: Any) -> tuple[PolicySpec, WireKeys]:
    """Inverse of `describe`. Raises ValueError for any other message."""
    try:
        version = message["agra_wire"]
        embodiments = {
            name: EmbodimentSpec(
                **{q: {part: (int(a), int(b)) for part, (a, b) in robot[q].items()} for q in ("state", "action")},
                views=tuple(str(view) for view in robot.get("views", ())),
                recorded_sizes=tuple((int(h), int(w)) for h, w in robot.get("recorded_sizes", ())),
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
            action_noise=_choice(message, "action_noise", get_args(ActionNoise)),
            video_noise=_choice(message, "video_noise", get_args(VideoNoise)),
        )
        keys = WireKeys(
            image=roles["image"], state=tuple(roles["state"]), prompt=roles["prompt"], view=roles.get("view")
        )
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the server's first message does not describe an agra policy ({error!r})") from error
    if version != WIRE_VERSION:
        raise ValueError(f"the server uses version {version} of the protocol, this client version {WIRE_VERSION}")
    return spec, keys


def encode_request(request: InferRequest, keys: WireKeys, spec: PolicySpec) -> dict[str, Any]:
    """Encode a request. Inverse of `parse_request`.

    Further cameras of the policy have keys of their own. For an earlier server they are placed beside the frame.
    Raises ValueError for a missing view.
    """
    observation, continuation = request.observation, request.continuation
    views = spec.embodiments[observation.embodiment].views if observation.embodiment in spec.embodiments else ()
    pictures = _pictures(observation, views, keys)
    message: dict[str, Any] = {
        keys.image: pictures[0],
        **dict(zip(keys.views(views).values(), pictures[1:], strict=True)),
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
        frames, *others = map(np.stack, zip(*(_pictures(m, views, keys) for m in observation.past), strict=True))
        message["past_image"] = frames
        if others:
            message["past_views"] = dict(zip(views, others, strict=True))
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


def _pictures(observation: Observation, views: Sequence[str], keys: WireKeys) -> list[np.ndarray]:
    """Return the pictures to send: the frame and each view, or one picture of all cameras for an earlier server."""
    cameras = cameras_of(observation, views)
    if keys.view is None:
        return [side_by_side(cameras)]
    if len(cameras) != 1 + len(views):
        raise ValueError(
            f"Observation.joined: the server takes each camera by itself; expected {', '.join(views)} in views"
        )
    return cameras


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


def _choice(message: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> Any:
    """Return one of the `choices`: the first one where an earlier version's message leaves the key out."""
    chosen = message.get(key, choices[0])
    if chosen not in choices:
        raise ValueError(f"{key} {chosen!r} is none of {choices}")
    return chosen


def _optional(spec: PolicySpec) -> list[str]:
    """The optional keys that are read. Without past observations or further cameras those are ignored."""
    ignored = set() if spec.past else {"past_image", "past_state", "past_views"}
    if not any(robot.views for robot in spec.embodiments.values()):
        ignored.add("past_views")
    return [key for key in OPTIONAL if key not in ignored]
