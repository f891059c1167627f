"""Sizes of the frames that a policy's crop was chosen for, in a checkpoint's recorded_sizes.json.

A crop counts pixels, so it fits frames of the recorded size alone. The file maps each embodiment whose source crops to
its cameras in order, and each camera to [height, width]. Checkpoints without a crop, and earlier ones, do not have it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from agra import files
from agra.checkpoints.folder import REMEDY, read_object
from agra.data.config import DataConfig

FILE = "recorded_sizes.json"
RecordedSizes = Mapping[str, Mapping[str, tuple[int, int]]]
"""Embodiment -> camera -> (height, width), the cameras in the order of the source."""


def write_recorded_sizes(path: Path, sizes: RecordedSizes) -> None:
    """Write the file."""
    files.write_text(path, json.dumps(sizes, indent=2) + "\n")


def read_recorded_sizes(path: Path, data: DataConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """Read the file of `write_recorded_sizes`. Returns no sizes where it is missing.

    Raises ValueError for other content, and for another number of cameras than that of the embodiment's source.
    """
    if not path.is_file():
        return {}
    content = read_object(path)
    for name, cameras in content.items():
        count = 1 + len(data.source(name).extra_cameras)
        valid = isinstance(cameras, dict) and len(cameras) == count and all(map(_is_size, cameras.values()))
        if not valid:
            raise ValueError(
                f"{path}: {name}: expected [height, width] of {count} cameras, got {cameras!r:.80}; {REMEDY}"
            )
    return {name: {key: (size[0], size[1]) for key, size in cameras.items()} for name, cameras in content.items()}


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)
