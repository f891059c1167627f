import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from agra.diagnostics.report.figures import (
    Interval,
    Series,
    interval_chart,
    line_chart,
    outline,
    packed,
    photo_uri,
    smooth,
    thin,
    ticks,
)


def covered(path, shape):
    """Pixels inside an outline, by counting its vertical edges to the left."""
    crossings = np.zeros((shape[0], shape[1] + 1), dtype=int)
    for x, y, stop in re.findall(r"M(\d+) (\d+)V(\d+)", path):
        crossings[int(y) : int(stop), int(x)] += 1
    return np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1


def test_outline_encloses_the_mask():
    random = np.random.default_rng(0)
    for mask in (random.random((7, 9)) < 0.5, np.ones((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool)):
        path = outline(mask)
        np.testing.assert_array_equal(covered(path, mask.shape), mask)
        horizontal = sum(int(stop) - int(start) for start, stop in re.findall(r"M(\d+) \d+H(\d+)", path))
        padded = np.pad(mask, 1).astype(int)
        assert horizontal == np.abs(np.diff(padded, axis=0)).sum()


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.5, 1] or ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 600) == [0, 200, 400, 600]
    for low, high in ((-0.93, -0.41), (3e-6, 9e-6), (0, 12_345)):
        marks = ticks(low, high)
        assert 2 <= len(marks) <= 6
        assert all(low <= tick <= high for tick in marks)
    assert ticks(1, 1) == [1]


def test_smooth_and_thin():
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3)
    np.testing.assert_allclose(smooth(np.arange(9.0))[1:-1], np.arange(1, 8))
    x, _ = thin(np.arange(1000.0), np.arange(1000.0), limit=100)
    assert len(x) == 100
    assert (x[0], x[-1]) == (0, 999)


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_charts_stay_inside_their_box():
    x = np.arange(0, 500.0, 10)
    none = np.zeros(0)
    series = [
        Series(label="a", index=0, x=x, y=np.exp(-x / 100), point_x=x[::10], point_y=np.exp(-x[::10] / 100)),
        Series(label="b", index=1, x=none, y=none, point_x=x[::10], point_y=np.full(5, 40.0)),
    ]
    parser = Balanced()
    parser.feed(line_chart(series, title='loss <&"'))
    assert not parser.open
    lines = [a["points"] for tag, a in parser.seen if tag == "polyline"]
    assert len(lines) == 2
    points = np.array([p.split(",") for line in lines for p in line.split()], dtype=float)
    assert (points >= 0).all()
    assert (points <= [360, 200]).all()


def test_interval_chart_leaves_undefined_values_out():
    nan = float("nan")
    dots = [
        Interval(label="a", index=0, value=0.5, low=0.2, high=0.8),
        Interval(label="b", index=1, value=0.5, low=nan, high=nan),
        Interval(label="c", index=2, value=nan, low=nan, high=nan),
    ]
    svg = interval_chart([("one", dots)], title="t", limits=(0, 1), percent=True, reference=0.3)
    assert svg.count("<polygon") == 2
    assert svg.count('class="whisker') == 1
    assert svg.count('class="reference"') == 1


def test_images_survive_the_round_trip():
    frame = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    body = base64.b64decode(photo_uri(frame).removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(body)).size == (8, 6)
    wide = photo_uri(np.zeros((100, 1000, 3), dtype=np.uint8))
    assert Image.open(io.BytesIO(base64.b64decode(wide.split(",")[1]))).size == (448, 45)
    values = np.random.default_rng(1).random((2, 3, 4))
    cell = packed(values)
    decoded = np.frombuffer(base64.b64decode(cell["bytes"]), dtype="<f4").reshape(cell["shape"])
    np.testing.assert_array_equal(decoded, values.astype(np.float32))
