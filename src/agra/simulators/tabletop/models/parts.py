"""Primitive shapes, and the items and containers made of them. Metres. Local z points up in an upright object."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import atan2, cos, pi, sin
from typing import Literal

import numpy as np

Colour = tuple[float, float, float]
Vector = tuple[float, float, float]
Shape = Literal["sphere", "ellipsoid", "capsule", "cylinder", "box"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A MuJoCo primitive: `size` as in MuJoCo, `axis` the direction of its local z, `spin` a rotation about that axis.

    A part that is not `solid` is only visible: it has neither mass nor contacts.
    """

    shape: Shape
    size: tuple[float, ...]
    colour: Colour
    at: Vector = (0.0, 0.0, 0.0)
    axis: Vector = (0.0, 0.0, 1.0)
    spin: float = 0.0
    solid: bool = True

    @cached_property
    def rotation(self) -> np.ndarray:
        """Rotation from the part's to the object's coordinates, (3, 3)."""
        z = np.asarray(self.axis) / np.linalg.norm(self.axis)
        reference = np.array([1.0, 0.0, 0.0]) if abs(z[0]) < 0.9 else np.array([0.0, 1.0, 0.0])
        x = reference - z * (reference @ z)
        x /= np.linalg.norm(x)
        y = np.cross(z, x)
        return np.column_stack([x * cos(self.spin) + y * sin(self.spin), y * cos(self.spin) - x * sin(self.spin), z])

    @cached_property
    def reach(self) -> np.ndarray:
        """Half extents along the object's axes, (3,)."""
        rotation = np.abs(self.rotation)
        if self.shape == "sphere":
            return np.full(3, self.size[0])
        if self.shape == "box":
            return rotation @ np.array(self.size)
        if self.shape == "ellipsoid":
            return np.sqrt(rotation**2 @ np.square(self.size))
        radius, half = self.size
        along = rotation[:, 2]
        return half * along + (radius if self.shape == "capsule" else radius * np.sqrt(1 - np.minimum(along, 1) ** 2))


def ball(radius: float, colour: Colour, at: Vector = (0, 0, 0), *, solid: bool = True) -> Part:
    """A sphere."""
    return Part(shape="sphere", size=(radius,), colour=colour, at=at, solid=solid)


def blob(size: Vector, colour: Colour, at: Vector = (0, 0, 0), *, axis: Vector = (0, 0, 1), solid: bool = True) -> Part:
    """An ellipsoid."""
    return Part(shape="ellipsoid", size=size, colour=colour, at=at, axis=axis, solid=solid)


def block(
    size: Vector,
    colour: Colour,
    at: Vector = (0, 0, 0),
    *,
    spin: float = 0.0,
    axis: Vector = (0, 0, 1),
    solid: bool = True,
) -> Part:
    """A cuboid of half sizes `size`."""
    return Part(shape="box", size=size, colour=colour, at=at, spin=spin, axis=axis, solid=solid)


def disc(
    radius: float,
    half_height: float,
    colour: Colour,
    at: Vector = (0, 0, 0),
    *,
    axis: Vector = (0, 0, 1),
    solid: bool = True,
) -> Part:
    """A cylinder."""
    return Part(shape="cylinder", size=(radius, half_height), colour=colour, at=at, axis=axis, solid=solid)


def rod(start: Vector, end: Vector, radius: float, colour: Colour, *, solid: bool = True) -> Part:
    """A capsule between two points."""
    a, b = np.array(start, float), np.array(end, float)
    half = float(np.linalg.norm(b - a)) / 2
    middle, axis = (a + b) / 2, b - a
    at, direction = (middle[0], middle[1], middle[2]), (axis[0], axis[1], axis[2])
    return Part(shape="capsule", size=(radius, half), colour=colour, at=at, axis=direction, solid=solid)


def arc(radii: Sequence[float], bend: float, colours: Sequence[Colour], angle: float) -> tuple[Part, ...]:
    """Capsules end to end on a horizontal arc of radius `bend` over `angle`, centred at the origin."""
    count = len(radii)
    turns = np.linspace(-angle / 2, angle / 2, count + 1)
    points = [(bend * sin(t), bend * (cos(t) - 1), 0.0) for t in turns]
    return tuple(rod(points[i], points[i + 1], radii[i], colours[i]) for i in range(count))


def ring(
    radius: float,
    half_height: float,
    half_thickness: float,
    colours: Sequence[Colour],
    *,
    z: float,
    count: int = 16,
    lean: float = 0.0,
    stretch: float = 1.0,
) -> tuple[Part, ...]:
    """A round wall of `count` cuboids, leaning outwards by `lean` radians, its x axis `stretch` times as long."""
    parts = []
    for index in range(count):
        angle = 2 * pi * index / count
        x, y = stretch * radius * cos(angle), radius * sin(angle)
        # The wall is perpendicular to the ellipse's normal.
        normal = atan2(stretch * sin(angle), cos(angle))
        half_width = radius * stretch * sin(pi / count) * 1.06
        axis = (sin(lean) * cos(normal), sin(lean) * sin(normal), cos(lean))
        parts.append(
            _wall((half_thickness, half_width, half_height), colours[index % len(colours)], (x, y, z), axis, normal)
        )
    return tuple(parts)


def _wall(size: Vector, colour: Colour, at: Vector, axis: Vector, normal: float) -> Part:
    """A cuboid with its thin side towards the direction `normal`."""
    upright = Part(shape="box", size=size, colour=colour, axis=axis)
    x, y = upright.rotation[:, 0], upright.rotation[:, 1]
    outward = np.array([cos(normal), sin(normal), 0.0])
    spin = atan2(outward @ y, outward @ x)
    return Part(shape="box", size=size, colour=colour, at=at, axis=axis, spin=spin)


@dataclass(frozen=True, kw_only=True)
class TabletopObject:
    """The common part of items and containers."""

    name: str
    parts: tuple[Part, ...]

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner of the solid parts, (3,) each."""
        solid = [part for part in self.parts if part.solid]
        low = np.min([np.array(part.at) - part.reach for part in solid], axis=0)
        return low, np.max([np.array(part.at) + part.reach for part in solid], axis=0)

    @cached_property
    def radius(self) -> float:
        """Radius of the upright bounding cylinder around the origin."""
        low, high = self.bounds
        return float(max(np.abs(low[:2]).max(), np.abs(high[:2]).max()))


@dataclass(frozen=True, kw_only=True)
class Item(TabletopObject):
    """A loose object. `across` is the local closing direction of the fingers, None for any horizontal direction.

    `faces` marks flat sides: the fingers must be parallel to one of the horizontal local axes.
    """

    across: Vector | None = None
    faces: bool = False
    density: float = 450.0  # kg / m^3


@dataclass(frozen=True, kw_only=True)
class Container(TabletopObject):
    """A fixed goal for items. z = 0 is its underside.

    `inside` is the half size (x, y) of the area that counts as within, for a round container of the ellipse in it.
    """

    inside: tuple[float, float]
    round: bool = True
    floor: float = 0.006  # height of the surface inside
    rim: float = 0.012  # height of the wall
    preposition: Literal["in", "on"] = "in"
