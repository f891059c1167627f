"""Conversion of demonstrations in robomimic's HDF5 layout, which LIBERO uses too, to LeRobot v3.0.

`data/demo_<i>` holds `actions` (N, 7) and `obs/<name>`. The file's attributes hold `env_args`. LIBERO's cameras are
`*_rgb` and stored upside down, and `problem_info` holds its instruction (Lifelong-Robot-Learning/LIBERO). robomimic's
cameras are `*_image`, and its files hold no instruction (ARISE-Initiative/robomimic). State: position, axis-angle, two
fingers. Action: movement in position, axis-angle and gripper, 7 numbers.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.spatial.transform import Rotation

from agra.data.importers.hdf5 import array, group, keys, opened, text
from agra.data.lerobot.writer import EncodedEpisode, EncodedVideo, LeRobotWriter
from agra.types import Embodiment

HDF5Kind = Literal["libero", "robomimic"]
STATE_NAMES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right")
ACTION_NAMES = ("move_x", "move_y", "move_z", "turn_x", "turn_y", "turn_z", "gripper")


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Names of cameras and state arrays in one kind of file. `pictures` turns stored images upright."""

    camera_suffix: str
    state: tuple[tuple[str, int], ...]
    pictures: Callable[[np.ndarray], np.ndarray]


_KINDS: dict[HDF5Kind, _Names] = {
    "libero": _Names(
        camera_suffix="_rgb",
        state=(("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2)),
        pictures=lambda frames: frames[:, ::-1, ::-1],
    ),
    "robomimic": _Names(
        camera_suffix="_image",
        state=(("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2)),
        pictures=lambda frames: frames,
    ),
}


def convert_hdf5(
    files: Sequence[Path], output: Path, *, kind: HDF5Kind, instruction: str | None = None, fps: int | None = None
) -> Path:
    """Write the demonstrations of `files` as one LeRobot v3.0 dataset `output`.

    `instruction` and `fps` are needed where the files have no instruction or control rate. Raises FileNotFoundError for
    a missing file and ValueError for a damaged one or for files of different control rates.
    """
    if not files:
        raise FileNotFoundError(f"{output}: expected HDF5 files to convert, got none")
    rates = {path: _control_rate(path, fps) for path in files}
    if len(set(rates.values())) > 1:
        raise ValueError(
            f"{files[0]}: files differ in their control rate ({sorted(set(rates.values()))} Hz); convert them "
            "separately"
        )
    robot = Embodiment(name=kind, state_names=STATE_NAMES, action_names=ACTION_NAMES)
    rate = rates[files[0]]
    with LeRobotWriter(output, embodiment=robot, fps=rate, modality=_modality()) as writer:
        for path in files:
            for episode in _demonstrations(path, kind, instruction, rate):
                writer.add(episode)
    return output


def _demonstrations(path: Path, kind: HDF5Kind, instruction: str | None, fps: int) -> Iterator[EncodedEpisode]:
    with opened(path) as file:
        data = group(file, "data", path)
        task = instruction if instruction is not None else _instruction(dict(data.attrs), path)
        names = sorted((n for n in keys(data) if n.startswith("demo_")), key=lambda n: int(n.removeprefix("demo_")))
        for name in names:
            yield _demonstration(group(data, name, path), path, _KINDS[kind], task, fps)


def _demonstration(demo: Any, path: Path, names: _Names, instruction: str, fps: int) -> EncodedEpisode:
    actions = array(demo, "actions", path, (None, len(ACTION_NAMES)))
    count, observations = len(actions), group(demo, "obs", path)
    position, rotation, fingers = (array(observations, name, path, (count, width)) for name, width in names.state)
    if rotation.shape[1] == 4:  # robosuite's quaternions end with the real part
        rotation = Rotation.from_quat(rotation).as_rotvec()
    cameras = [name for name in keys(observations) if name.endswith(names.camera_suffix)]
    if not cameras:
        raise ValueError(
            f"{path}: no images (*{names.camera_suffix}) in {observations.name}; available: "
            f"{', '.join(keys(observations))}"
        )
    videos = {}
    for name in cameras:
        frames = names.pictures(array(observations, name, path, (count, None, None, 3)))
        feature = f"observation.images.{name.removesuffix(names.camera_suffix)}"
        videos[feature] = EncodedVideo.of(np.ascontiguousarray(frames), fps=fps)
    last = np.arange(count) == count - 1
    return EncodedEpisode(
        states=np.concatenate([position, rotation, fingers], axis=1).astype(np.float32),
        actions=actions.astype(np.float32),
        instruction=instruction,
        videos=videos,
        extra={"next.success": last, "next.done": last},
    )


def _instruction(attributes: dict[str, Any], path: Path) -> str:
    if "problem_info" not in attributes:
        raise ValueError(f"{path}: no instruction (attribute problem_info); set it with --instruction")
    instruction = _json(text(attributes, "problem_info", path), path, "problem_info").get("language_instruction")
    instruction = " ".join(instruction) if isinstance(instruction, list) else instruction
    if not isinstance(instruction, str) or not instruction.strip('" '):
        raise ValueError(f"{path}: problem_info has no language_instruction")
    return instruction.strip('" ')


def _control_rate(path: Path, fps: int | None) -> int:
    if fps is not None:
        return fps
    with opened(path) as file:
        attributes = dict(group(file, "data", path).attrs)
        environment = _json(text(attributes, "env_args", path), path, "env_args") if "env_args" in attributes else {}
    rate = environment.get("env_kwargs", {}).get("control_freq")
    if not isinstance(rate, int) or rate < 1:
        raise ValueError(f"{path}: env_args has no control_freq; set the control rate with --fps")
    return rate


def _json(content: str, path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: attribute {name!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: attribute {name!r}: expected a JSON object, got {type(value).__name__}")
    return value


def _modality() -> dict[str, Any]:
    """Return the dataset's modality.json.

    Movements are relative, so they are zero past an episode's end. The gripper is not.
    """
    state = {"position": (0, 3), "rotation": (3, 6), "gripper": (6, 8)}
    action = {"position": (0, 3), "rotation": (3, 6), "gripper": (6, 7)}

    def entry(name: str, span: tuple[int, int], *, absolute: bool) -> dict[str, Any]:
        kind = {"rotation_type": "axis_angle"} if name == "rotation" else {}
        return {"start": span[0], "end": span[1], "absolute": absolute, **kind}

    return {
        "state": {name: entry(name, span, absolute=True) for name, span in state.items()},
        "action": {name: entry(name, span, absolute=name == "gripper") for name, span in action.items()},
        "video": {},
        "annotation": {},
    }
