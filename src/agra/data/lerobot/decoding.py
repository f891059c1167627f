"""Frames of video files at given times, decoded with PyAV."""

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import cast

import av
import av.container
import av.error
import numpy as np

from agra.data.lerobot.json_parquet import REMEDY

_RATE_TOLERANCE = 0.02  # relative. Headers round the frame rate


def decode_frames(
    path: Path,
    times: np.ndarray,
    *,
    fps: float,
    threads: int = 0,
    size: tuple[int, int] | None = None,
    total: int | None = None,
) -> np.ndarray:
    """Decode the frames (T, H, W, 3) uint8 RGB of `path` at ascending `times` (T,) in seconds.

    Decoding starts at the key frame before the first time, so a short clip of a long file costs little. `threads` is
    the number of decoder threads, 0 for one on each core. `size` (H, W) rescales every frame. `total` is the expected
    number of frames of a file whose frame i belongs to i / `fps`. Raises FileNotFoundError for a missing file, and
    ValueError for a damaged file, where no frame is within half a period of a time, or where the file's frame rate
    leaves it open which frame belongs to a time.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: video file is missing; {REMEDY}")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: has no video stream; {REMEDY}")
            stream = container.streams.video[0]
            _check_stream(path, stream, fps, total)
            shown = _presentation_times(path, stream, times, fps, total)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            # By default FFmpeg conceals a damaged packet with a guessed picture.
            stream.codec_context.options = {"err_detect": "explode"}
            starts = _seek_times(float(shown[0]))
            for start in starts:
                try:
                    clip = _frames_from(container, stream, start, shown, 0.5 / fps, size)
                except av.error.FFmpegError:
                    if start == starts[-1]:
                        raise
                    continue  # the leading frames of an open group of pictures need the group before it
                if clip is not None:
                    frames = clip
                    break
    except (av.error.FFmpegError, OverflowError) as error:
        raise ValueError(f"{path}: damaged video ({str(error).splitlines()[0]}); {REMEDY}") from error
    if len(frames) < len(times):
        raise ValueError(f"{path}: no frame at {times[len(frames)]:.3f} s, expected {fps:g} frames/s; {REMEDY}")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{path}: damaged video (frames differ in size); {REMEDY}")
    return np.stack(frames)


def _seek_times(first: float) -> list[float]:
    """Return the times to seek to, one after another, until the frame at `first` is found.

    FFmpeg seeks by decoding time. Where frames are reordered (HEVC, open groups of pictures), the key frame that it
    finds can be shown after the wanted frame. The times therefore go back by 1, 2, 4 ... s, down to 0.
    """
    back = 2.0 ** np.arange(np.ceil(np.log2(first)) if first > 1 else 0)
    return [first, *(first - back).tolist(), *([0.0] if first > 0 else [])]


def _frames_from(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    start: float,
    times: np.ndarray,
    tolerance: float,
    size: tuple[int, int] | None,
) -> list[np.ndarray] | None:
    """Seek to `start` and decode the frames at `times`, or those before the first that is missing.

    None where the key frame is shown after the first of the times.
    """
    time_base = stream.time_base
    assert time_base is not None
    frames: list[np.ndarray] = []
    container.seek(round(start / time_base), stream=stream)
    earlier = False  # whether a frame before the first time was decoded
    for frame in _decoded(container, stream):
        shown = None if frame.pts is None else float(frame.pts * time_base)
        if shown is None:
            continue
        if shown < times[len(frames)] - tolerance:
            earlier = True
            continue
        if shown > times[len(frames)] + tolerance:
            return frames if frames or earlier else None
        if size is not None:
            frame = frame.reformat(height=size[0], width=size[1], interpolation="AREA", threads=1)
        picture = frame.to_ndarray(format="rgb24")
        while len(frames) < len(times) and abs(times[len(frames)] - shown) <= tolerance:
            frames.append(picture)
        if len(frames) == len(times):
            break
    return frames


def packets_of(
    container: av.container.InputContainer, stream: av.VideoStream
) -> "closing[Generator[av.Packet, None, None]]":
    """Yield the packets from the current position, in a context that closes the generator.

    PyAV's generators leak about 180 bytes where they are dropped before their end without `close`. `container.decode`
    drops such a generator, so it is not used here.
    """
    return closing(cast(Generator[av.Packet, None, None], container.demux(stream)))


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    with packets_of(container, stream) as packets:
        for packet in packets:
            yield from cast(list[av.VideoFrame], packet.decode())


def _check_stream(path: Path, stream: av.VideoStream, fps: float, total: int | None) -> None:
    """Compare the frame rate and the number of frames in the header, where it has them, with the expected ones."""
    rate = stream.average_rate
    if rate and abs(float(rate) - fps) > _RATE_TOLERANCE * fps:
        raise ValueError(f"{path}: has {float(rate):.2f} frames/s, expected {fps:g}; {REMEDY}")
    if total is not None and stream.frames and stream.frames != total:
        raise ValueError(f"{path}: has {stream.frames} frames, expected {total} for the rows of its episode; {REMEDY}")


@lru_cache(maxsize=256)
def _all_times(path: Path, size: int, changed: int) -> np.ndarray:
    """Return when all frames of a file are shown. Reads the whole file, once while its size and time of change stay."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        with packets_of(container, stream) as packets:
            return float(stream.time_base) * np.array(sorted(p.pts for p in packets if p.pts is not None))


def _presentation_times(
    path: Path,
    stream: av.VideoStream,
    times: np.ndarray,
    fps: float,
    total: int | None,
) -> np.ndarray:
    """Return when the frames of `times` are shown.

    Where the file's rate is so different from `fps` that some time would be nearer to another frame than to its own,
    frame i is found by its number in a file of `total` frames. Raises ValueError for such a file of several episodes.
    """
    rate = stream.average_rate
    if not rate or (stream.frames and abs(float(rate) / fps - 1) * stream.frames < 0.5):
        return times
    state = path.stat()
    shown = _all_times(path, state.st_size, state.st_mtime_ns)
    if total is not None and len(shown) == total:
        numbers = np.round(times * fps).astype(np.int64)
        if numbers[-1] >= total:
            missing = times[numbers >= total][0]
            raise ValueError(f"{path}: no frame at {missing:.3f} s, expected {total} frames; {REMEDY}")
        return shown[numbers]
    if len(shown) and abs((shown[-1] - shown[0]) * fps - (len(shown) - 1)) >= 0.5:
        raise ValueError(
            f"{path}: has {float(rate):.3f} frames/s, expected {fps:g}. Over its {len(shown)} frames this moves frames to"
            f" other rows; encode the video with {fps:g} frames/s"
        )
    return times


def inspect_video(path: Path) -> tuple[int, tuple[int, int], float]:
    """Read (frames, (height, width), frames/s) from the header of a file. Raises the errors of `decode_frames`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: video file is missing; {REMEDY}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: has no video stream; {REMEDY}")
            stream = container.streams.video[0]
            return stream.frames, (stream.height, stream.width), float(stream.average_rate or 0)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: damaged video ({str(error).splitlines()[0]}); {REMEDY}") from error
