"""Attempts of an unfinished collection on disk: one safetensors file each, and what they are attempts of."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from agra.data.lerobot.writer import EncodedEpisode, EncodedVideo
from agra.data.config import EGO_VIEW
from agra.data.lerobot.json_parquet import read_json, write_json

MANIFEST = "collection.json"


class Staging:
    """The folder of an unfinished collection. A failed attempt is kept too, as a file without tensors."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Raises ValueError where the folder holds attempts of a collection with other settings."""
        self.path = path
        manifest = path / MANIFEST
        if manifest.is_file():
            check_same(read_json(manifest), settings, f"{path}: holds an unfinished collection")
            return
        for attempt in path.glob("*.safetensors"):  # left by an interrupted removal, of unknown settings
            attempt.unlink()
        with naming(manifest):
            write_json(manifest, settings)

    @staticmethod
    def file(path: Path, index: int) -> Path:
        """Where attempt `index` lies in the folder `path`."""
        return path / f"{index:06d}.safetensors"

    @classmethod
    def save(cls, path: Path, index: int, episode: EncodedEpisode | None) -> None:
        """Write an attempt, None for a failed one, whole or not at all. OSError names the file."""
        tensors: dict[str, np.ndarray] = {}
        metadata = {"success": "false"}
        if episode is not None:
            seen = episode.videos[EGO_VIEW]
            tensors = {"states": episode.states, "actions": episode.actions, "histogram": seen.histogram}
            tensors["video"] = np.frombuffer(seen.video, dtype=np.uint8)
            tensors |= {f"extra/{name}": column for name, column in episode.extra.items()}
            size = json.dumps(seen.size)
            metadata = {"success": "true", "instruction": episode.instruction, "size": size}
        temporary = cls.file(path, index).with_suffix(".tmp")
        with naming(temporary):
            temporary.write_bytes(save(tensors, metadata))
        os.replace(temporary, cls.file(path, index))

    def outcome(self, index: int) -> bool | None:
        """Whether an attempt succeeded, None where it has not been made."""
        if not self.file(self.path, index).is_file():
            return None
        return self._open(index)[0]["success"] == "true"

    def episodes(self, indices: Iterable[int]) -> Iterator[EncodedEpisode]:
        """The episodes of successful attempts."""
        return map(self._load, indices)

    def _open(self, index: int, *, tensors: bool = False) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        path = self.file(self.path, index)
        try:
            with safe_open(path, framework="numpy") as file:
                return file.metadata(), {name: file.get_tensor(name) for name in file.keys() if tensors}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error}); remove this file and collect again") from error

    def _load(self, index: int) -> EncodedEpisode:
        metadata, tensors = self._open(index, tensors=True)
        height, width = json.loads(metadata["size"])
        video = EncodedVideo(video=tensors["video"].tobytes(), size=(height, width), histogram=tensors["histogram"])
        return EncodedEpisode(
            states=tensors["states"],
            actions=tensors["actions"],
            instruction=metadata["instruction"],
            videos={EGO_VIEW: video},
            extra={k.removeprefix("extra/"): v for k, v in tensors.items() if k.startswith("extra/")},
        )


def check_same(recorded: Mapping[str, object], settings: Mapping[str, object], what: str) -> None:
    """Raise ValueError, beginning with `what`, where recorded settings differ from those asked for."""
    for key, value in settings.items():
        if recorded.get(key) != value:
            raise ValueError(
                f"{what} with {key} {recorded.get(key)!r} instead of {value!r};"
                " use the same settings, choose another output, or remove it"
            )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock file of an output folder, which is made as needed. Nothing waits.

    Raises ValueError naming the process that holds it. The kernel releases the lock when its process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", errors="replace").strip() or "unknown"
            raise ValueError(
                f"{folder}: another process (pid {holder}) writes here; wait for it, stop it, or choose another output"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
