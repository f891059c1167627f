"""Observations and modality config of GR00T's protocol: the maps that a client sends and gets, as our own types.

An observation names its parts: `video.<camera>` (T, H, W, 3) uint8, `state.<part>` (T, d), and a text
`annotation.<...>`. N1.6's may nest them. Every array may have a leading batch axis.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from agra.serving.protocol.messages import MAX_INSTRUCTION
from agra.serving.protocol.validation import RequestError, kind_of, parse_floats, parse_frame, parse_text
from agra.serving.server.config import GrootWire
from agra.types import EmbodimentSpec, Observation, PolicySpec

MAX_BATCH = 64  # environments in a request


def flatten(observation: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the parts of N1.6's nested observation to N1.5's flat keys. Texts of N1.6 are lists of lists."""
    flat: dict[str, Any] = {}
    for key, value in observation.items():
        if key in ("video", "state") and isinstance(value, dict):
            flat |= {f"{key}.{name}": part for name, part in value.items()}
        elif key == "language" and isinstance(value, dict):
            for name, part in value.items():
                annotation = str(name) if str(name).startswith("annotation.") else f"annotation.{name}"
                flat[annotation] = [_newest(text) for text in part] if isinstance(part, list) else part
        else:
            flat[str(key)] = value
    return flat


def _newest(text: Any) -> Any:
    return text[-1] if isinstance(text, list) and text else text


def parse_observations(
    message: Mapping[str, Any], robot: EmbodimentSpec, embodiment: str, config: GrootWire, *, past: int = 0
) -> tuple[list[Observation], bool]:
    """Return an observation of each environment, and whether there is a batch axis. Raises RequestError.

    Of any number of steps but `past` + 1 the newest is used.
    """
    cameras = [f"video.{camera}" for camera in (config.camera, *robot.views)]
    annotation = _annotation_key(message, config)
    required = [*cameras, *(f"state.{part}" for part in robot.state), annotation]
    if missing := [key for key in required if key not in message]:
        raise RequestError(f"{missing[0]}: missing; expected the keys {', '.join(required)}")
    videos = {key: message[key] for key in cameras}
    batched = isinstance(videos[cameras[0]], np.ndarray) and videos[cameras[0]].ndim == 5
    for key, frames in videos.items():
        if not isinstance(frames, np.ndarray) or frames.ndim not in (4, 5) or 0 in frames.shape:
            raise RequestError(f"{key}: expected (T, H, W, 3) or (B, T, H, W, 3) uint8, got {kind_of(frames)}")
        if (frames.ndim == 5) != batched:
            raise RequestError(f"{key}: expected the axes of {cameras[0]}, got {kind_of(frames)}")
    videos = {key: frames if batched else frames[None] for key, frames in videos.items()}
    count = len(videos[cameras[0]])
    if count > MAX_BATCH:
        raise RequestError(f"{cameras[0]}: expected at most {MAX_BATCH} environments, got {count}")
    for key, frames in videos.items():
        if len(frames) != count:
            raise RequestError(f"{key}: expected {count} environments as in {cameras[0]}, got {len(frames)}")
    parts = {}
    for part, (start, end) in robot.state.items():
        shape = (count, "T", end - start) if batched else ("T", end - start)
        values = parse_floats(f"state.{part}", message[f"state.{part}"], shape)
        parts[start, end] = values if batched else values[None]
    steps = past + 1 if all(values.shape[1] == past + 1 for values in (*videos.values(), *parts.values())) else 1
    states = np.zeros((count, steps, robot.state_dim), np.float32)
    for (start, end), values in parts.items():
        states[..., start:end] = values[:, -steps:]
    texts = message[annotation]
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or len(texts) not in (1, count):
        raise RequestError(f"{annotation}: expected a list of 1 or {count} texts, got {kind_of(texts)}")
    texts = [parse_text(annotation, text, MAX_INSTRUCTION) for text in texts] * (count if len(texts) == 1 else 1)
    observations = []
    for number, (rows, instruction) in enumerate(zip(states, texts, strict=True)):
        clips = [[parse_frame(key, frame) for frame in frames[number, -steps:]] for key, frames in videos.items()]
        *earlier, present = (
            Observation(
                frame=frame,
                views=dict(zip(robot.views, views, strict=True)),
                state=row,
                instruction=instruction,
                embodiment=embodiment,
            )
            for (frame, *views), row in zip(zip(*clips, strict=True), rows, strict=True)
        )
        observations.append(replace(present, past=tuple(earlier)))
    return observations, batched


def _annotation_key(message: Mapping[str, Any], config: GrootWire) -> str:
    """Return the key of the instruction: the configured one, or the only one in the message, because clients differ."""
    configured = f"annotation.{config.annotation}"
    others = [key for key in message if key.startswith("annotation.") or key == "task"]
    return others[0] if configured not in message and len(others) == 1 else configured


def modality_config(spec: PolicySpec, embodiment: str, config: GrootWire) -> dict[str, Any]:
    """Return the keys of requests and responses with their steps relative to now, with GR00T's own type marks.

    Clients of N1.5 read a JSON text with full keys, those of N1.6 and later a map with the bare names of the parts.
    """
    robot = spec.embodiments[embodiment]
    n15 = config.version == "n1.5"
    keys = {
        "video": ([config.camera, *robot.views], [*spec.past, 0]),
        "state": (list(robot.state), [*spec.past, 0]),
        "action": (list(robot.action), list(range(spec.horizon))),
    }
    modalities = {
        name: {"delta_indices": steps, "modality_keys": [f"{name}.{key}" for key in parts] if n15 else parts}
        for name, (parts, steps) in keys.items()
    }
    modalities["language"] = {"delta_indices": [0], "modality_keys": [f"annotation.{config.annotation}"]}
    return {
        name: {"__ModalityConfig_class__": True, "as_json": json.dumps(modality) if n15 else modality}
        for name, modality in modalities.items()
    }
