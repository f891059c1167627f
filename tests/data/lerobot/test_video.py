import ctypes
from fractions import Fraction

import av
import numpy as np
import pytest

from agra.data.lerobot.decoding import decode_frames
from agra.data.lerobot.video import VideoFile, cut_video, encode_frames, write_video


def moving_square(count: int, *, shade: int = 90, height: int = 64, width: int = 96) -> np.ndarray:
    """A shaded background and a bright square that moves two pixels a frame."""
    background = np.linspace(shade, shade + 60, width).astype(np.uint8)
    frames = np.repeat(np.tile(background[None, :, None], (height, 1, 3))[None], count, axis=0)
    for index, frame in enumerate(frames):
        frame[20:40, 4 + 2 * index : 24 + 2 * index] = (200, 60, 40)
    return frames


def decode(path, start: float, count: int) -> np.ndarray:
    return decode_frames(path, start + np.arange(count) / 10, fps=10)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_frames_come_back_close(tmp_path):
    frames = moving_square(20)
    write_video(tmp_path / "a.mp4", frames, fps=10)
    decoded = decode(tmp_path / "a.mp4", 0, 20)
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    assert psnr(decoded, frames) > 36
    assert not (tmp_path / "a.mp4.tmp").exists()


def test_same_frames_same_bytes_and_key_frames_every_eight():
    frames = moving_square(20)
    assert encode_frames(frames, fps=10) == encode_frames(frames, fps=10)


def test_stream_is_what_browsers_play(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(20), fps=10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 10)
        keys = [packet.is_keyframe for packet in container.demux(stream) if packet.pts is not None]
    assert [i for i, key in enumerate(keys) if key] == [0, 8, 16]


def test_joined_episodes_are_found_by_their_timestamps(tmp_path):
    episodes = [moving_square(5, shade=20), moving_square(9, shade=100), moving_square(12, shade=180)]
    with VideoFile(tmp_path / "joined.mp4", fps=10) as file:
        spans = [file.append(encode_frames(e, fps=10), num_frames=len(e)) for e in episodes]
    assert spans == [(0, 0.5), (0.5, 1.4), (1.4, 2.6)]
    for (start, _), episode in zip(reversed(spans), reversed(episodes), strict=True):
        assert psnr(decode(tmp_path / "joined.mp4", start, len(episode)), episode) > 36
    middle = decode(tmp_path / "joined.mp4", 0.9, 3)
    assert psnr(middle, episodes[1][4:7]) > 36


def test_joining_refuses_another_size(tmp_path):
    with VideoFile(tmp_path / "joined.mp4", fps=10) as file:
        file.append(encode_frames(moving_square(3), fps=10), num_frames=3)
        with pytest.raises(ValueError, match="cannot append 3 frames of 80 x 64"):
            file.append(encode_frames(moving_square(3, width=80), fps=10), num_frames=3)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 9, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3))],
)
def test_unfit_frames_are_refused(frames):
    with pytest.raises(ValueError, match="video frames"):
        encode_frames(frames, fps=10)


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(FileNotFoundError, match=r"a\.mp4: video file is missing"):
        decode(path, 0, 1)
    write_video(path, moving_square(20), fps=10)
    with pytest.raises(ValueError, match=r"a\.mp4: no frame at 2.000 s"):
        decode(path, 0, 21)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.mp4: damaged video"):
        decode(path, 0, 20)
    start = whole.index(b"mdat") + 900
    path.write_bytes(whole[:start] + bytes(400) + whole[start + 400 :])
    with pytest.raises(ValueError, match=r"a\.mp4"):
        decode(path, 0, 20)


def test_clips_skip_frames_and_repeat_the_last(tmp_path):
    frames = moving_square(20)
    write_video(tmp_path / "a.mp4", frames, fps=10)
    steps = np.array([3, 6, 9, 19, 19])
    clip = decode_frames(tmp_path / "a.mp4", steps / 10, fps=10, threads=1)
    assert np.array_equal(clip, decode(tmp_path / "a.mp4", 0, 20)[steps])


def test_a_frame_at_another_time_is_no_substitute(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(20), fps=10)
    with pytest.raises(ValueError, match=r"a\.mp4: has 10\.00 frames/s, expected 20"):
        decode_frames(tmp_path / "a.mp4", np.arange(10) / 20, fps=20)
    with pytest.raises(ValueError, match=r"a\.mp4: no frame at 2\.500 s, expected 10 frames/s"):
        decode_frames(tmp_path / "a.mp4", np.array([0.5, 2.5]), fps=10)
    with pytest.raises(ValueError, match=r"a\.mp4: has 20 frames, expected 19 for the rows of its episode"):
        decode_frames(tmp_path / "a.mp4", np.arange(19) / 10, fps=10, total=19)


def write_numbered(path, count, *, rate, codec, options):
    """Write frames whose number stands in them as eleven bright or dark squares."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 32, "yuv420p"
        for index in range(count):
            bits = [200 if index >> bit & 1 else 40 for bit in range(11)] + [120]
            row = np.repeat(np.array(bits, np.uint8), 8)
            picture = np.repeat(np.tile(row, (32, 1))[:, :, None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def numbers(frames):
    """Read the numbers of `write_numbered` in frames."""
    bright = frames[:, 16, 4:88:8, 0] > 120
    return (bright << np.arange(11)).sum(1)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx265", {"g": "2", "preset": "ultrafast", "x265-params": "log-level=none:bframes=4:b-adapt=0:open-gop=1"}),
        ("libx264", {"g": "10", "bf": "3", "preset": "veryfast", "x264-params": "open-gop=1:b-adapt=0"}),
        ("libx264", {"g": "10", "bf": "3", "preset": "veryfast"}),
    ],
    ids=["hevc", "open groups", "closed groups"],
)
def test_every_frame_is_found_where_frames_are_reordered(tmp_path, codec, options):
    write_numbered(tmp_path / "a.mp4", 60, rate=10, codec=codec, options=options)
    whole = decode_frames(tmp_path / "a.mp4", np.arange(60) / 10, fps=10, threads=1)
    assert numbers(whole).tolist() == list(range(60))
    for index in range(60):
        assert np.array_equal(
            decode_frames(tmp_path / "a.mp4", np.array([index / 10]), fps=10, threads=1)[0], whole[index]
        )


def test_a_rate_slightly_off_moves_no_frame_to_another_row(tmp_path):
    """At 29.97 frames/s, frame 501 is nearer to row 502 of 30 rows/s than to its own."""
    path, options = tmp_path / "a.mp4", {"preset": "ultrafast", "g": "30"}
    write_numbered(path, 1200, rate=Fraction(30000, 1001), codec="libx264", options=options)
    rows = np.array([0, 499, 500, 501, 700, 1000, 1199])
    decoded = decode_frames(path, rows / 30, fps=30, threads=1, total=1200)
    assert numbers(decoded).tolist() == rows.tolist()
    with pytest.raises(ValueError, match=r"a\.mp4: has 29\.970 frames/s, expected 30\. Over its 1200 frames"):
        decode_frames(path, rows / 30, fps=30, threads=1)
    with pytest.raises(ValueError, match=r"a\.mp4: no frame at 40\.000 s, expected 1200 frames"):
        decode_frames(path, np.array([1199, 1200]) / 30, fps=30, threads=1, total=1200)


def test_what_is_cut_out_is_what_was_put_in(tmp_path):
    parts = [encode_frames(moving_square(n, shade=20 * n), fps=10) for n in (9, 12, 5)]
    with VideoFile(tmp_path / "joined.mp4", fps=10) as file:
        spans = [file.append(part, num_frames=n) for part, n in zip(parts, (9, 12, 5), strict=True)]
    cut = [
        cut_video(tmp_path / "joined.mp4", start=s, count=n, fps=10)
        for (s, _), n in zip(spans, (9, 12, 5), strict=True)
    ]
    with VideoFile(tmp_path / "again.mp4", fps=10) as file:
        assert [file.append(part, num_frames=n) for part, n in zip(cut, (9, 12, 5), strict=True)] == spans
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "joined.mp4").read_bytes()
    with pytest.raises(ValueError, match=r"joined\.mp4: the 5 frames from 0\.300 s on do not begin at a key frame"):
        cut_video(tmp_path / "joined.mp4", start=0.3, count=5, fps=10)
    with pytest.raises(ValueError, match=r"joined\.mp4: the 9 frames from 2\.100 s on are only 5"):
        cut_video(tmp_path / "joined.mp4", start=2.1, count=9, fps=10)


class _Allocated(ctypes.Structure):
    """glibc's `struct mallinfo2`; `in_use` counts the main thread's bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "mapped", "f", "g", "in_use", "free", "top")]


def test_reading_clips_leaves_nothing_behind(tmp_path):
    """Clips and cuts end before their file does: what PyAV holds of a file must go with them, to the last bytes."""
    count = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if count is None:
        pytest.skip("counts with glibc's mallinfo2")
    count.restype = _Allocated
    write_video(tmp_path / "a.mp4", moving_square(24), fps=10)

    def read(times):
        for _ in range(times):
            decode(tmp_path / "a.mp4", 0.3, 4)
            cut_video(tmp_path / "a.mp4", start=0.8, count=8, fps=10)

    read(50)
    before = count().in_use
    read(300)
    assert (count().in_use - before) / 300 < 60
