"""EgoDex, egocentric video of human hands, converted to wrist poses in LeRobot v3.0 (C.2.1; docs/paper.md #33).

A trajectory is `<task>/<i>.mp4` (1920 x 1080, 30 Hz) beside `<task>/<i>.hdf5` with `transforms/<joint>` (N, 4, 4) in
the recording's world frame (Hoque et al., arXiv 2505.11709). The mapping is DIAL's
(`preprocessing/convert_egodex_data_to_lerobot.py`): the position of each wrist and the first two columns of its
rotation, x to the right, y forward, z up. The state of a step is its pose, the action is the pose of the next step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agra.data.config import EGO_VIEW, SourceConfig
from agra.data.importers.hdf5 import array, group, opened, text
from agra.data.lerobot.decoding import decode_frames, inspect_video
from agra.data.lerobot.json_parquet import REMEDY
from agra.data.lerobot.writer import EncodedEpisode, EncodedVideo, LeRobotWriter
from agra.types import Embodiment, Episode

EMBODIMENT, FPS = "human_egodex", 30
SIDES = ("left", "right")
STORED_SIZE = (270, 480)
"""Rows and columns of a converted frame, a quarter of the recorded ones."""

CROP_ROWS = (81, 270)
"""The lower 70 % of a converted frame. It shows hands and table, without the background."""

_WORLD = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float64)  # ARKit's y up and z back to z up and y forward
# Signs of a hand's axes, by column of its rotation. DIAL's diagonals are (1, -1, 1) and (-1, -1, -1). The pose holds
# two of the three columns, and the third follows from them.
_HAND = {"left": np.array([1.0, -1.0]), "right": np.array([-1.0, -1.0])}


def trajectories(root: Path) -> list[Path]:
    """Return the HDF5 files below `root`, by task and number. Raises FileNotFoundError where there are none."""
    paths = sorted(root.rglob("*.hdf5"), key=lambda p: (p.parent.as_posix(), not p.stem.isdigit(), p.stem.zfill(9)))
    if not paths:
        raise FileNotFoundError(f"{root}: no EgoDex trajectories; expected <task>/<i>.hdf5 beside <task>/<i>.mp4")
    return paths


def choose_instruction(attributes: Mapping[str, Any], path: Path) -> str:
    """Return the description of a trajectory, in lower case and without full stops.

    A "reversible" task has two descriptions, and `which_llm_description` selects one. Raises ValueError for a missing
    attribute or an empty description.
    """
    name = "llm_description"
    if attributes.get("llm_type") in ("reversible", b"reversible"):
        which = text(attributes, "which_llm_description", path)
        if which not in ("1", "2"):
            raise ValueError(f"{path}: which_llm_description: expected '1' or '2', got {which!r}")
        name = "llm_description" if which == "1" else "llm_description2"
    instruction = text(attributes, name, path).replace(".", "").strip().lower()
    if not instruction:
        raise ValueError(f"{path}: {name} is empty")
    return instruction


def wrist_pose(transforms: np.ndarray, side: str) -> np.ndarray:
    """Convert a hand's transforms (N, 4, 4) in the world to poses (N, 9) float32: position (m), two columns of the
    rotation.
    """
    position = transforms[:, :3, 3] @ _WORLD.T
    columns = (_WORLD @ transforms[:, :3, :3])[:, :, :2] * _HAND[side]
    return np.concatenate([position, columns[:, :, 0], columns[:, :, 1]], axis=1).astype(np.float32)


def read_trajectory(path: Path, *, size: tuple[int, int] = STORED_SIZE) -> Episode:
    """Read one trajectory. Its last frame gives only the last action. `size` is (rows, columns) of the frames.

    Raises FileNotFoundError for a missing file, and ValueError for a damaged one or for video and poses of different
    length.
    """
    with opened(path) as file:
        transforms = group(file, "transforms", path)
        poses = np.concatenate([_hand(transforms, side, path) for side in SIDES], axis=1)
        instruction = choose_instruction(dict(file.attrs), path)
    video = path.with_suffix(".mp4")
    count, _, rate = inspect_video(video)
    if count != len(poses):
        raise ValueError(f"{video}: has {count} frames, expected {len(poses)} for the poses in {path.name}; {REMEDY}")
    if len(poses) < 2 or abs(rate - FPS) > 0.5:
        raise ValueError(f"{video}: expected at least 2 frames at {FPS} frames/s, got {count} at {rate:g}")
    return Episode(
        frames=decode_frames(video, np.arange(count - 1) / rate, fps=rate, size=size),
        states=poses[:-1],
        actions=poses[1:],
        instruction=instruction,
        embodiment=EMBODIMENT,
        fps=FPS,
    )


def _hand(transforms: Any, side: str, path: Path) -> np.ndarray:
    matrices = array(transforms, f"{side}Hand", path, (None, 4, 4)).astype(np.float64)
    rotations = matrices[:, :3, :3]
    if np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max(initial=0) > 1e-2:
        raise ValueError(f"{path}: transforms/{side}Hand: expected rotation matrices; {REMEDY}")
    return wrist_pose(matrices, side)


def convert_egodex(root: Path, output: Path, *, limit: int | None = None, size: tuple[int, int] = STORED_SIZE) -> Path:
    """Write the trajectories below `root`, or the first `limit` of them, as the LeRobot v3.0 dataset `output`."""
    names = tuple(f"{side}_{name}" for side in SIDES for name in _NAMES)
    embodiment = Embodiment(name=EMBODIMENT, state_names=names, action_names=names)
    with LeRobotWriter(output, embodiment=embodiment, fps=FPS, modality=_modality()) as writer:
        for path in trajectories(root)[:limit]:
            episode = read_trajectory(path, size=size)
            encoded = EncodedEpisode(
                states=episode.states,
                actions=episode.actions,
                instruction=episode.instruction,
                videos={EGO_VIEW: EncodedVideo.of(episode.frames, fps=FPS)},
            )
            writer.add(encoded)
    return output


_NAMES = ("x", "y", "z", "r00", "r10", "r20", "r01", "r11", "r21")
KEYS = tuple(f"{side}_wrist_{quantity}" for side in SIDES for quantity in ("position", "rotation"))


def _modality() -> dict[str, Any]:
    parts = {}
    for index, side in enumerate(SIDES):
        start = 9 * index
        parts[f"{side}_wrist_position"] = {"start": start, "end": start + 3}
        parts[f"{side}_wrist_rotation"] = {"start": start + 3, "end": start + 9, "rotation_type": "rotation_6d"}
    return {"state": parts, "action": parts, "video": {"ego_view": {"original_key": EGO_VIEW}}, "annotation": {}}


def egodex_source(path: str, **settings: Any) -> SourceConfig:
    """Return the source of a converted dataset: positions mean_std, rotations rot6d, the lower 70 % of the frames."""
    keys = tuple(f"{key}:{'mean_std' if key.endswith('position') else 'rot6d'}" for key in KEYS)
    fields = {"embodiment": EMBODIMENT, "crop_rows": CROP_ROWS, "state": keys, "action": keys} | settings
    return SourceConfig(path=path, **fields)
