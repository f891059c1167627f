"""Frames of an episode from one camera, or from several side by side, read from mp4 files or from images in the
rows.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from agra.data.config import SourceConfig
from agra.data.lerobot.checksums import Seal
from agra.data.lerobot.decoding import decode_frames
from agra.data.lerobot.json_parquet import REMEDY, check_rows
from agra.data.lerobot.layout import DatasetLayout, EpisodeEntry, is_inside
from agra.data.lerobot.modality import Modality

_PICTURE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's errors for damaged files


class Cameras:
    """The cameras of a source.

    Each is cropped first. Extra cameras stand to the right of the first, scaled to its height.
    """

    def __init__(
        self, layout: DatasetLayout, modality: Modality, seal: Seal, names: Sequence[str], source: SourceConfig
    ) -> None:
        """`names` are features or their names in modality.json. Raises ValueError for an unknown name."""
        self.layout, self.source, self._seal = layout, source, seal
        available = layout.names("video", "image")
        self.features = tuple(modality.video.get(name, name) for name in names)
        for feature in self.features:
            if feature not in available:
                raise ValueError(f"{layout.root}: no camera {feature!r}; available: {', '.join(available) or 'none'}")

    def frames(self, entry: EpisodeEntry, rows: np.ndarray, *, threads: int = 0) -> np.ndarray:
        """Return the frames (T, H, W, 3) uint8 RGB of an episode's ascending `rows` (T,), cropped and side by side."""
        views = [self._read(entry, feature, rows, threads) for feature in self.features]
        return self.source.picture(views, [f"{self.layout.root}: {feature}" for feature in self.features])

    def sizes(self, entry: EpisodeEntry) -> dict[str, tuple[int, int]]:
        """Return the height and width of each camera's frames before any crop, read from an episode's first row."""
        frames = {feature: self._read(entry, feature, np.zeros(1, np.int64), 0) for feature in self.features}
        return {feature: (first.shape[1], first.shape[2]) for feature, first in frames.items()}

    def _read(self, entry: EpisodeEntry, feature: str, rows: np.ndarray, threads: int) -> np.ndarray:
        if feature in entry.videos:
            path, start = entry.videos[feature]
            self._seal.verify(path)
            fps = self.layout.info["fps"]
            total = entry.length if entry.first_row is None else None
            frames = decode_frames(path, start + rows / fps, fps=fps, threads=threads, total=total)
        else:
            path = entry.data
            self._seal.verify(path)
            frames = _pictures(path, feature, entry, rows, self.layout)
        shape = self.layout.info["features"][feature]["shape"]
        if sorted(shape) != sorted(frames.shape[1:]):
            raise ValueError(
                f"{path}: frames of {feature!r} are {frames.shape[1]} x {frames.shape[2]}, expected {shape} from"
                f" meta/info.json; {REMEDY}"
            )
        return frames


def _pictures(path: Path, feature: str, entry: EpisodeEntry, rows: np.ndarray, layout: DatasetLayout) -> np.ndarray:
    """Read images of the rows, stored as encoded bytes or as a file name (the Image feature of Hugging Face
    datasets).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file is missing; {REMEDY}")
    try:
        with pq.ParquetFile(path) as file:
            check_rows(file, path, layout.rows)
        table = pq.read_table(
            path,
            columns=[feature],
            filters=[("episode_index", "=", entry.index)],
            page_checksum_verification=True,
        )
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged parquet file ({str(error).splitlines()[0]}); {REMEDY}") from error
    if table.num_rows != entry.length:
        raise ValueError(
            f"{path}: expected {entry.length} images of episode {entry.index}, got {table.num_rows}; {REMEDY}"
        )
    frames = []
    for row, cell in zip(rows, table[feature].take(pa.array(rows)).to_pylist(), strict=True):
        try:
            content = cell["bytes"]
            if content is None:
                if not is_inside(cell["path"]):
                    raise ValueError(f"its file {cell['path']!r} is outside the dataset")
                content = (layout.root / cell["path"]).read_bytes()
            frames.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: {feature!r} of row {row} is not an image ({error}); {REMEDY}") from error
        except _PICTURE_ERRORS as error:
            raise ValueError(f"{path}: damaged image {feature!r} in row {row} ({error}); {REMEDY}") from error
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{path}: images {feature!r} of episode {entry.index} differ in size; {REMEDY}")
    return np.stack(frames)
