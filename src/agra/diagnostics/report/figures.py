"""Figures of the report as inline SVG and data URIs, which load nothing from the network.

Colours are not set here. Every series has a class `p0`, `p1`, ... and the page's style sheet defines its colour for
light and dark mode, so that a policy has the same colour in every figure. Text is text, not paths.
"""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup
from PIL import Image

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One line of a chart. `index` is the policy's colour. (point_x, point_y) are marks without a line."""

    label: str
    index: int
    x: np.ndarray
    y: np.ndarray
    point_x: np.ndarray
    point_y: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One dot with its whiskers. `low` and `high` may be NaN."""

    label: str
    index: int
    value: float
    low: float
    high: float


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    rough = (high - low) / max(count, 1)
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick label: at most four significant digits, from 10,000 on in thousands (k), with a minus sign."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("-", "−")


def smooth(values: np.ndarray, fraction: float = 0.05) -> np.ndarray:
    """Centred running mean over `fraction` of the points, at least 3. The window shrinks at the ends."""
    half = max(1, round(len(values) * fraction / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def thin(x: np.ndarray, y: np.ndarray, limit: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Select at most `limit` evenly spread points, including the first and the last."""
    if len(x) <= limit:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, limit).round().astype(int))
    return x[keep], y[keep]


def _range(values: np.ndarray) -> tuple[float, float]:
    """The limits of an axis: up to the 99th percentile, with a margin."""
    low, high = float(values.min()), float(np.percentile(values, 99))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def line_chart(series: Sequence[Series], *, title: str) -> Markup:
    """Lines over training steps: thin for the logged values, bold for their running mean, marks for held-out data."""
    xs = np.concatenate([np.concatenate([s.x, s.point_x]) for s in series])
    ys = np.concatenate([np.concatenate([s.y, s.point_y]) for s in series])
    low, high = _range(ys)
    first, last = float(min(0, xs.min())), float(xs.max()) or 1.0

    def at(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[float, float]]:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        up = HEIGHT - BOTTOM - (np.clip(y, low, high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return zip(across.tolist(), up.tolist(), strict=True)

    parts = [_svg(WIDTH, HEIGHT, title)]
    for tick in ticks(low, high):
        ((_, y),) = at(np.array([0.0]), np.array([tick]))
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(first, last):
        ((x, _),) = at(np.array([tick]), np.array([low]))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>')
    for line in series:
        for name, (x, y) in (("raw", thin(line.x, line.y)), ("mean", thin(line.x, smooth(line.y)))):
            if len(x):
                path = " ".join(f"{px:.1f},{py:.1f}" for px, py in at(x, y))
                parts.append(f'<polyline class="{name} p{line.index}" points="{path}"/>')
        for px, py in at(line.point_x, line.point_y):
            parts.append(_mark(px, py, line.index))
    return Markup("".join([*parts, "</svg>"]))


def interval_chart(
    groups: Sequence[tuple[str, Sequence[Interval]]],
    *,
    title: str,
    limits: tuple[float, float],
    percent: bool = False,
    reference: float | None = None,
) -> Markup:
    """Dots with whiskers on one horizontal axis: a band for each group, a row for each policy."""
    row, gap, left, width = 17, 12, 8, 450
    height = 8 + sum(20 + row * len(rows) + gap for _, rows in groups) + 18
    low, high = limits

    def across(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (width - left - 20)

    parts = [_svg(width, height, title, kind="intervals")]
    for tick in ticks(low, high, 5):
        label = f"{tick * 100:.0f} %" if percent else number(tick)
        parts.append(f'<line class="rule" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="4" y2="{height - 20}"/>')
        anchor = "start" if tick == low else "middle"
        parts.append(f'<text x="{across(tick):.1f}" y="{height - 6}" text-anchor="{anchor}">{label}</text>')
    if reference is not None:
        x = across(reference)
        parts.append(f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 20}"/>')
    y = 8.0
    for name, rows in groups:
        parts.append(f'<text class="strong" x="{left}" y="{y + 10}">{escape(name)}</text>')
        y += 20
        for dot in rows:
            if math.isfinite(dot.low) and math.isfinite(dot.high):
                ends = f'x1="{across(dot.low):.1f}" x2="{across(dot.high):.1f}"'
                parts.append(f'<line class="whisker p{dot.index}" {ends} y1="{y + 7}" y2="{y + 7}"/>')
            if math.isfinite(dot.value):
                parts.append(_mark(across(dot.value), y + 7, dot.index, size=4.5, title=dot.label))
            y += row
        y += gap
    return Markup("".join([*parts, "</svg>"]))


def _svg(width: int, height: float, title: str, kind: str = "lines") -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}">'


def _mark(x: float, y: float, index: int, *, size: float = 3.2, title: str = "") -> str:
    """A policy's mark. Its shape distinguishes policies without colour."""
    shapes = (
        [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 17)[:-1]],  # disc
        [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],  # diamond
        [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],  # square
        [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],  # triangle
    )
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in shapes[index % len(shapes)])
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<polygon class="mark p{index}" points="{points}">{inner}</polygon>'


def swatch(index: int) -> Markup:
    """A policy's mark for legends and table heads."""
    return Markup(f'<svg class="swatch" viewBox="0 0 12 12" aria-hidden="true">{_mark(6, 6, index, size=4.2)}</svg>')


def outline(mask: np.ndarray) -> str:
    """The border of a pixel mask (H, W) as SVG path data in pixels: runs of horizontal and vertical edges."""
    padded = np.pad(mask.astype(bool), 1)
    parts = []
    for flip, edges in ((False, padded[1:] != padded[:-1]), (True, (padded[:, 1:] != padded[:, :-1]).T)):
        for line, row in enumerate(edges):
            turns = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]]))) - 1
            for start, stop in turns.reshape(-1, 2).tolist():
                parts.append(f"M{line} {start}V{stop}" if flip else f"M{start} {line}H{stop}")
    return "".join(parts)


def photo_uri(frame: np.ndarray, *, widest: int = 448) -> str:
    """A camera image (H, W, 3) uint8 as a JPEG data URI, reduced to at most `widest` pixels: a sixth of a PNG's
    size.
    """
    image = Image.fromarray(frame)
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def packed(values: np.ndarray) -> dict[str, object]:
    """An array as base64 bytes of little-endian float32, since values of one latent frame may be far below the
    maximum.
    """
    numbers = np.ascontiguousarray(values, dtype="<f4")
    return {"shape": list(values.shape), "bytes": base64.b64encode(numbers.tobytes()).decode()}


def packed_slices(values: np.ndarray) -> dict[str, object]:
    """Grids (..., H, W) as bytes, each slice (H, W) scaled to its maximum: a quarter of float32's size."""
    top = values.reshape(*values.shape[:-2], -1).max(axis=-1).astype(np.float64)
    scaled = np.divide(values, top[..., None, None], where=top[..., None, None] > 0, out=np.zeros(values.shape))
    data = (scaled * 255).round().astype(np.uint8)
    return {
        "shape": list(values.shape),
        "scales": [float(f"{scale / 255:.4g}") for scale in top.ravel()],
        "bytes": base64.b64encode(np.ascontiguousarray(data).tobytes()).decode(),
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """A mask (H, W) as COCO's plain run lengths: column by column, starting outside the mask."""
    flat = mask.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()


def packed_colours(image: np.ndarray) -> dict[str, object]:
    """Small colour grids (..., h, w, 3) uint8 as base64 bytes."""
    return {"shape": list(image.shape), "bytes": base64.b64encode(np.ascontiguousarray(image).tobytes()).decode()}
