"""The items of pick-and-place: ten for training and ten novel ones."""

from itertools import pairwise

from agra.simulators.tabletop.models.colours import (
    BLACK,
    BLUE,
    BROWN,
    CREAM,
    CRUST,
    GOLD,
    LEAF,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    SILVER,
    WHITE,
    YELLOW,
)
from agra.simulators.tabletop.models.parts import Colour, Item, Part, arc, ball, blob, block, disc, rod


def _fruit(radius: float, colour: Colour, *, stem: float = 0.012, leaf: bool = True) -> tuple[Part, ...]:
    top = radius * 0.95
    parts = (ball(radius, colour), rod((0, 0, top), (0.002, 0, top + stem), 0.0022, BROWN, solid=False))
    if leaf:
        parts += (blob((0.012, 0.006, 0.002), LEAF, (0.012, 0, top + stem * 0.7), solid=False),)
    return parts


def _cup() -> tuple[Part, ...]:
    handle = [(0.027, 0, 0.014), (0.042, 0, 0.012), (0.042, 0, -0.012), (0.027, 0, -0.014)]
    return (
        disc(0.027, 0.027, (0.15, 0.72, 0.92)),
        disc(0.0275, 0.004, WHITE, (0, 0, 0.024), solid=False),
        disc(0.023, 0.0005, (0.22, 0.12, 0.06), (0, 0, 0.0281), solid=False),
        *(rod(a, b, 0.0042, (0.15, 0.72, 0.92)) for a, b in pairwise(handle)),
    )


def _carrot() -> tuple[Part, ...]:
    radii = (0.017, 0.0155, 0.013, 0.010, 0.0065)
    xs = (-0.034, -0.018, -0.001, 0.016, 0.031, 0.044)
    body = tuple(rod((xs[i], 0, 0), (xs[i + 1], 0, 0), r, ORANGE) for i, r in enumerate(radii))
    tops = tuple(
        rod((-0.045, 0, 0.004), (-0.068, y, 0.012), 0.0045, LEAF, solid=False) for y in (-0.014, -0.005, 0.005, 0.014)
    )
    return body + tops


def _bread() -> tuple[Part, ...]:
    loaf = (blob((0.042, 0.025, 0.021), CRUST, (0, 0, 0.003)), block((0.034, 0.022, 0.012), CRUST, (0, 0, -0.009)))
    cuts = tuple(
        rod((x - 0.006, -0.013, 0.0205), (x + 0.006, 0.013, 0.0205), 0.0034, CREAM, solid=False)
        for x in (-0.02, 0, 0.02)
    )
    return loaf + cuts


def _can() -> tuple[Part, ...]:
    return (
        disc(0.024, 0.031, (0.05, 0.50, 0.20)),
        disc(0.0245, 0.007, WHITE, solid=False),
        disc(0.0238, 0.002, SILVER, (0, 0, 0.0305), solid=False),
        disc(0.0244, 0.002, SILVER, (0, 0, -0.0285), solid=False),
        blob((0.007, 0.004, 0.0012), BLACK, (0.006, 0, 0.033), solid=False),
    )


SEEN: tuple[Item, ...] = (
    Item(
        name="banana",
        parts=(
            *arc((0.010, 0.0135, 0.0145, 0.0145, 0.0135, 0.010), 0.055, (YELLOW,) * 6, 1.7),
            rod((0.041, -0.019, 0), (0.046, -0.028, 0.001), 0.0055, BROWN, solid=False),
            rod((-0.041, -0.019, 0), (-0.045, -0.026, 0.001), 0.006, BROWN, solid=False),
        ),
        across=(0, 1, 0),
    ),
    Item(name="apple", parts=_fruit(0.028, RED)),
    Item(
        name="ball",
        parts=(
            ball(0.028, BLUE),
            *(disc(0.0284, 0.0045, WHITE, axis=axis, solid=False) for axis in ((1, 0, 0), (0, 1, 0))),
        ),
    ),
    Item(
        name="peach",
        parts=(
            *_fruit(0.027, PINK, stem=0.004),
            blob((0.019, 0.019, 0.024), (0.93, 0.22, 0.30), (-0.008, -0.006, 0.0035), solid=False),
            blob((0.010, 0.006, 0.002), LEAF, (-0.011, 0.004, 0.029), solid=False),
        ),
    ),
    Item(name="cup", parts=_cup(), across=(0, 1, 0)),
    Item(
        name="lemon",
        parts=(
            blob((0.031, 0.0235, 0.0235), (0.98, 0.92, 0.16)),
            blob((0.012, 0.009, 0.009), (0.93, 0.86, 0.10), (0.030, 0, 0)),
            blob((0.010, 0.008, 0.008), (0.60, 0.72, 0.10), (-0.030, 0, 0)),
        ),
        across=(0, 1, 0),
    ),
    Item(name="carrot", parts=_carrot(), across=(0, 1, 0)),
    Item(
        name="egg",
        parts=(blob((0.030, 0.023, 0.023), CREAM), blob((0.024, 0.0215, 0.0215), CREAM, (0.008, 0, 0))),
        across=(0, 1, 0),
    ),
    Item(name="bread", parts=_bread(), across=(0, 1, 0)),
    Item(name="can", parts=_can()),
)


def _croissant() -> tuple[Part, ...]:
    shades = (CRUST, GOLD, CRUST, GOLD, CRUST, GOLD, CRUST)
    return arc((0.008, 0.0125, 0.0165, 0.0185, 0.0165, 0.0125, 0.008), 0.036, shades, 2.9)


def _cube() -> tuple[Part, ...]:
    side, blue = 0.024, (0.10, 0.30, 0.88)
    dots = [(x, y, side) for x in (-0.011, 0.011) for y in (-0.011, 0.011)]
    front = [(0.0, -side, 0.0), (-0.012, -side, 0.012), (0.012, -side, -0.012)]
    sides = [(sign * side, 0.0, 0.0) for sign in (-1, 1)] + [(0.0, side, 0.0)]
    pips = (*dots, *front, *sides)
    return (block((side, side, side), blue), *(ball(0.0048, YELLOW, at, solid=False) for at in pips))


def _brick() -> tuple[Part, ...]:
    holes = tuple(disc(0.0075, 0.0006, (0.22, 0.06, 0.03), (x, 0, 0.0181), solid=False) for x in (-0.024, 0, 0.024))
    return (block((0.038, 0.021, 0.018), (0.64, 0.22, 0.12)), *holes)


def _bottle() -> tuple[Part, ...]:
    glass = (0.05, 0.48, 0.78)
    return (
        disc(0.0225, 0.026, glass, (0, 0, -0.014)),
        blob((0.0225, 0.0225, 0.016), glass, (0, 0, 0.012)),
        disc(0.0095, 0.009, glass, (0, 0, 0.029)),
        disc(0.0110, 0.005, RED, (0, 0, 0.038)),
        disc(0.0229, 0.011, WHITE, (0, 0, -0.014), solid=False),
    )


def _mushroom() -> tuple[Part, ...]:
    spots = [(0, 0, 0.035), (0.019, 0, 0.026), (-0.019, 0.002, 0.026), (0.001, 0.020, 0.025), (-0.002, -0.020, 0.025)]
    return (
        disc(0.0165, 0.018, CREAM, (0, 0, -0.012)),
        blob((0.032, 0.032, 0.022), RED, (0, 0, 0.014)),
        *(ball(0.0055, WHITE, at, solid=False) for at in spots),
    )


def _pepper() -> tuple[Part, ...]:
    green, d = (0.28, 0.66, 0.10), 0.011
    lobes = tuple(blob((0.018, 0.018, 0.027), green, (x, y, 0)) for x in (-d, d) for y in (-d, d))
    return (*lobes, rod((0, 0, 0.022), (0.004, 0, 0.036), 0.0045, (0.10, 0.36, 0.06), solid=False))


NOVEL: tuple[Item, ...] = (
    Item(
        name="pear",
        parts=(
            ball(0.0265, (0.72, 0.80, 0.14), (0, 0, -0.010)),
            ball(0.0185, (0.72, 0.80, 0.14), (0, 0, 0.016)),
            disc(0.016, 0.003, (0.72, 0.80, 0.14), (0, 0, -0.0325)),
            rod((0, 0, 0.033), (0.004, 0, 0.046), 0.0026, BROWN, solid=False),
        ),
    ),
    Item(
        name="eggplant",
        parts=(
            blob((0.028, 0.0235, 0.0235), PURPLE, (0.016, 0, 0)),
            blob((0.036, 0.0185, 0.0185), PURPLE, (-0.006, 0, 0)),
            blob((0.013, 0.0165, 0.0165), (0.22, 0.55, 0.16), (-0.034, 0, 0)),
            rod((-0.044, 0, 0), (-0.060, 0, 0.005), 0.005, (0.22, 0.55, 0.16), solid=False),
        ),
        across=(0, 1, 0),
    ),
    Item(name="croissant", parts=_croissant(), across=(0, 1, 0)),
    Item(
        name="orange",
        parts=(ball(0.028, (1.0, 0.42, 0.0)), blob((0.006, 0.006, 0.002), LEAF, (0, 0, 0.0275), solid=False)),
    ),
    Item(name="cube", parts=_cube(), faces=True),
    Item(name="brick", parts=_brick(), across=(0, 1, 0)),
    Item(name="bottle", parts=_bottle()),
    Item(name="mushroom", parts=_mushroom()),
    Item(name="pepper", parts=_pepper(), faces=True),
    Item(
        name="tower",
        parts=(
            block((0.025, 0.025, 0.013), RED, (0, 0, -0.026)),
            block((0.020, 0.020, 0.013), YELLOW),
            block((0.015, 0.015, 0.013), (0.12, 0.62, 0.25), (0, 0, 0.026)),
        ),
        faces=True,
    ),
)
