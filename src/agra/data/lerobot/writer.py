"""Writing LeRobot v3.0 datasets, which `agra.data.lerobot.dataset` and LeRobot itself read.

Each episode is encoded separately (`encode_episode`, in any process) and then appended. The result does not depend on
the number of processes.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from agra import files
from agra.data.config import EGO_VIEW
from agra.data.lerobot.checksums import seal
from agra.data.lerobot.episode_files import RawEpisode, as_lists
from agra.data.lerobot.files_v3 import DATA_FILE_MIB, FILES_PER_CHUNK, VIDEO_FILE_MIB, FilesV3, info_v3
from agra.data.lerobot.json_parquet import write_json
from agra.data.lerobot.layout import INFO, STATS
from agra.data.lerobot.modality import ACTION, MODALITY, STATE
from agra.data.lerobot.video import GROUP_OF_PICTURES, OPTIONS, FrameEncoder, encode_frames
from agra.data.normalization.dataset_statistics import describe_pictures, picture_histogram
from agra.types import Embodiment, Episode

DEFAULT_COLUMNS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}
DEFAULT_COLUMNS |= {"index": "int64", "task_index": "int64"}
"""The columns that every LeRobot dataset has, each of shape (1,)."""

EXTRA_DTYPES = ("bool", "int64", "float32")


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedVideo:
    """The frames of one camera in an episode as an mp4, and the histogram for their statistics."""

    video: bytes
    size: tuple[int, int]  # height, width
    histogram: np.ndarray  # (3, 256) int64

    @classmethod
    def of(cls, frames: np.ndarray, *, fps: int) -> "EncodedVideo":
        """Encode `frames` (N, H, W, 3) uint8 RGB."""
        size = frames.shape[1], frames.shape[2]
        return cls(video=encode_frames(frames, fps=fps), size=size, histogram=picture_histogram(frames))


class GrowingVideo:
    """An `EncodedVideo` that is encoded frame by frame. Equals `EncodedVideo.of` all frames."""

    def __init__(self, height: int, width: int, *, fps: int) -> None:
        self.size = height, width
        self._encoder = FrameEncoder(height, width, fps=fps)
        self._histogram = np.zeros((3, 256), np.int64)

    def add(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3) uint8 RGB."""
        self._encoder.add(frame)
        self._histogram += picture_histogram(frame[None])

    def finish(self) -> EncodedVideo:
        """Return the video. No frame can be added afterwards."""
        return EncodedVideo(video=self._encoder.finish(), size=self.size, histogram=self._histogram)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedEpisode:
    """An episode ready to be written: its rows, and the video of each camera by feature name."""

    states: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, D) float32
    instruction: str
    videos: Mapping[str, EncodedVideo]
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)  # column name -> (N,)

    def __len__(self) -> int:
        return len(self.actions)


def encode_episode(
    episode: Episode, *, camera: str = EGO_VIEW, extra: Mapping[str, np.ndarray] | None = None
) -> EncodedEpisode:
    """Encode the frames of an episode. `extra` adds columns of shape (N,) and dtype bool, int64 or float32."""
    extra = extra or {}
    for name, column in extra.items():
        if column.shape != (len(episode),) or column.dtype.name not in EXTRA_DTYPES:
            raise ValueError(
                f"extra column {name!r}: expected ({len(episode)},) of {', '.join(EXTRA_DTYPES)},"
                f" got {column.shape} {column.dtype}"
            )
    return EncodedEpisode(
        states=episode.states.astype(np.float32),
        actions=episode.actions.astype(np.float32),
        instruction=episode.instruction,
        videos={camera: EncodedVideo.of(episode.frames, fps=episode.fps)},
        extra=dict(extra),
    )


def write_dataset(path: Path, episodes: Iterable[Episode], *, embodiment: Embodiment, fps: int) -> None:
    """Write `episodes` as the LeRobot v3.0 dataset `path`. Raises ValueError where `path` exists."""
    with LeRobotWriter(path, embodiment=embodiment, fps=fps) as writer:
        for episode in episodes:
            writer.add(encode_episode(episode))


class LeRobotWriter:
    """Write one dataset, episode by episode, into `<path>.partial`. `close` renames it to `path`.

    Raises ValueError where `path` exists or another writer has begun it.
    An error in `close`, or an exception that leaves the context manager, removes the partial dataset. All episodes have
    the frame size, the state and action dimensions and the extra columns of the first. A file is closed before an
    episode that would make it exceed its limit (MiB). `modality` is written as GR00T's meta/modality.json.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        embodiment: Embodiment,
        fps: int,
        modality: Mapping[str, Any] | None = None,
        data_file_mib: float = DATA_FILE_MIB,
        video_file_mib: float = VIDEO_FILE_MIB,
        files_per_chunk: int = FILES_PER_CHUNK,
    ) -> None:
        self.path, self.embodiment, self.fps, self.modality = Path(path), embodiment, fps, modality
        self._building = ExitStack()
        with files.naming(self.path):
            self._root = self._building.enter_context(files.building(self.path))
        self._files = FilesV3(
            self._root,
            fps=fps,
            data_file_mib=data_file_mib,
            video_file_mib=video_file_mib,
            files_per_chunk=files_per_chunk,
        )
        self._tasks: dict[str, int] = {}
        self._histograms: dict[str, np.ndarray] = {}
        self._features: dict[str, dict[str, Any]] = {}

    @property
    def num_frames(self) -> int:
        """Number of rows so far."""
        return self._files.num_frames

    def add(self, episode: EncodedEpisode) -> None:
        """Append one episode.

        Raises ValueError where its shapes or columns differ from those of the first episode, and OSError where the disk
        is full.
        """
        features, index = self._describe_features(episode), self._files.num_episodes
        self._features = self._features or features
        if features != self._features:
            different = [k for k in {**features, **self._features} if features.get(k) != self._features.get(k)]
            raise ValueError(f"{self.path}: feature {different[0]!r} of episode {index} differs from that of episode 0")
        columns = self._columns(episode)
        pictures = {c: describe_pictures(v.histogram, count=len(episode)) for c, v in episode.videos.items()}
        raw = RawEpisode(
            table=pa.table({name: _arrow(values, features[name]) for name, values in columns.items()}),
            tasks=[episode.instruction],
            videos={camera: video.video for camera, video in episode.videos.items()},
            picture_statistics={camera: as_lists(statistics) for camera, statistics in pictures.items()},
        )
        with files.naming(self.path):
            self._files.add(raw, features)
        for camera, video in episode.videos.items():
            self._histograms[camera] = self._histograms.get(camera, 0) + video.histogram

    def close(self) -> None:
        """Write the metadata and rename the dataset to its path.

        Raises ValueError without episodes and OSError where the disk is full. Nothing is left on disk then.
        """
        with files.naming(self.path), self._building:
            try:
                self._finish()
            finally:
                self._files.discard()

    def _finish(self) -> None:
        if not self._files.num_episodes:
            raise ValueError(f"{self.path}: expected at least one episode, got none")
        self._files.finish(self._tasks)
        pictures = {c: describe_pictures(h, count=self.num_frames) for c, h in self._histograms.items()}
        statistics = {camera: as_lists(values) for camera, values in pictures.items()}
        statistics |= dict(self._files.statistics(self._features))
        write_json(self._root / STATS, {name: statistics[name] for name in self._features})
        if self.modality is not None:
            write_json(self._root / MODALITY, self.modality)
        info = info_v3(
            {"robot_type": self.embodiment.name, "fps": self.fps},
            files=self._files,
            tasks=len(self._tasks),
            features=self._features,
            splits={"train": f"0:{self._files.num_episodes}"},
        )
        write_json(self._root / INFO, info)
        seal(self._root)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._files.discard()
            self._building.__exit__(kind, value, trace)

    def _describe_features(self, episode: EncodedEpisode) -> dict[str, dict[str, Any]]:
        """Return the features of `info.json`, in the order of the columns."""
        return {
            **{camera: _video_feature(video.size, self.fps) for camera, video in episode.videos.items()},
            STATE: _vector(episode.states, self.embodiment.state_names, STATE),
            ACTION: _vector(episode.actions, self.embodiment.action_names, ACTION),
            **{k: {"dtype": v.dtype.name, "shape": [1], "names": None} for k, v in episode.extra.items()},
            **{k: {"dtype": dtype, "shape": [1], "names": None} for k, dtype in DEFAULT_COLUMNS.items()},
        }

    def _columns(self, episode: EncodedEpisode) -> dict[str, np.ndarray]:
        """Return every column of the episode as (N, D)."""
        count = len(episode)
        steps = np.arange(count)
        task = self._tasks.setdefault(episode.instruction, len(self._tasks))
        scalars = {
            **episode.extra,
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(count, self._files.num_episodes),
            "index": steps + self.num_frames,
            "task_index": np.full(count, task),
        }
        vectors = {STATE: episode.states, ACTION: episode.actions}
        return vectors | {name: values.reshape(count, 1) for name, values in scalars.items()}


def _video_feature(size: tuple[int, int], fps: int) -> dict[str, Any]:
    height, width = size
    video = {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "video.g": GROUP_OF_PICTURES,
        "video.crf": int(OPTIONS["crf"]),
        "has_audio": False,
    }
    shape = [height, width, 3]
    return {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"], "info": video}


def _vector(values: np.ndarray, names: tuple[str, ...], key: str) -> dict[str, Any]:
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"{key}: expected (N, {len(names)}) for {', '.join(names)}, got {values.shape}")
    return {"dtype": "float32", "shape": [len(names)], "names": list(names)}


def _arrow(values: np.ndarray, feature: Mapping[str, Any]) -> pa.Array:
    """Convert values (N, D) to fixed-size lists, or to plain numbers where the feature's shape is (1,)."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return flat if feature["shape"] == [1] else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
