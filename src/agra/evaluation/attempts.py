"""Attempts of an unfinished collection: one safetensors file each in a staging folder, beside the collection's
settings.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from agra import files
from agra.data.lerobot.json_parquet import read_json, write_json
from agra.data.lerobot.writer import EGO_VIEW, EncodedEpisode, EncodedVideo

MANIFEST = "collection.json"


class Staging:
    """The folder of an unfinished collection. A failed attempt is a file without tensors."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Open or create the folder. Raises ValueError for attempts of a collection with other settings."""
        self.path = path
        manifest = path / MANIFEST
        if manifest.is_file():
            check_settings(read_json(manifest), settings, f"{path}: holds an unfinished collection")
            return
        for attempt in path.glob("*.safetensors"):  # left by an interrupted removal, settings unknown
            attempt.unlink()
        write_json(manifest, settings)

    @staticmethod
    def file(path: Path, index: int) -> Path:
        """The file of attempt `index` in the folder `path`."""
        return path / f"{index:06d}.safetensors"

    @classmethod
    def save(cls, path: Path, index: int, episode: EncodedEpisode | None) -> None:
        """Write an attempt, None for a failed one, whole or not at all. OSError names the file."""
        tensors: dict[str, np.ndarray] = {}
        metadata = {"success": "false"}
        if episode is not None:
            video = episode.videos[EGO_VIEW]
            tensors = {"states": episode.states, "actions": episode.actions, "histogram": video.histogram}
            tensors["video"] = np.frombuffer(video.video, dtype=np.uint8)
            tensors |= {f"extra/{name}": column for name, column in episode.extra.items()}
            size = json.dumps(video.size)
            metadata = {"success": "true", "instruction": episode.instruction, "size": size}
        files.write_bytes(cls.file(path, index), save(tensors, metadata))

    def outcome(self, index: int) -> bool | None:
        """Success of an attempt. None for one that has not been made."""
        if not self.file(self.path, index).is_file():
            return None
        return self._read(index)[0]["success"] == "true"

    def length(self, index: int) -> int:
        """Number of rows of a successful attempt."""
        return len(self._read(index, tensors=True)[1]["states"])

    def take_over(self, folder: Path, settings: Mapping[str, object]) -> None:
        """Move the attempts of a shard here and remove its folder. Raises ValueError for one with other settings."""
        with files.lock(folder):
            check_settings(read_json(folder / MANIFEST), settings, f"{folder}: holds a shard")
            for attempt in folder.glob("*.safetensors"):
                attempt.replace(self.path / attempt.name)
            shutil.rmtree(folder, ignore_errors=True)

    def episodes(self, indices: Iterable[int]) -> Iterator[EncodedEpisode]:
        """The episodes of successful attempts."""
        return map(self._episode, indices)

    def _read(self, index: int, *, tensors: bool = False) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        path = self.file(self.path, index)
        try:
            with safe_open(path, framework="numpy") as file:
                return file.metadata(), {name: file.get_tensor(name) for name in file.keys() if tensors}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error}); remove this file and collect again") from error

    def _episode(self, index: int) -> EncodedEpisode:
        metadata, tensors = self._read(index, tensors=True)
        height, width = json.loads(metadata["size"])
        video = EncodedVideo(video=tensors["video"].tobytes(), size=(height, width), histogram=tensors["histogram"])
        return EncodedEpisode(
            states=tensors["states"],
            actions=tensors["actions"],
            instruction=metadata["instruction"],
            videos={EGO_VIEW: video},
            extra={k.removeprefix("extra/"): v for k, v in tensors.items() if k.startswith("extra/")},
        )


def check_settings(recorded: Mapping[str, object], settings: Mapping[str, object], subject: str) -> None:
    """Raise ValueError, beginning with `subject`, where a recorded setting differs from the present one."""
    for key, value in settings.items():
        if recorded.get(key) != value:
            raise ValueError(
                f"{subject} with {key} {recorded.get(key)!r} instead of {value!r};"
                " use the same settings, choose another output, or remove it"
            )
