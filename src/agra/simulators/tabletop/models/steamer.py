"""The steamer with its lid, and the buns."""

from math import cos, pi, sin

from agra.simulators.tabletop.models.colours import BAMBOO, BLACK, LEAF, YELLOW
from agra.simulators.tabletop.models.parts import Colour, Container, Item, Part, ball, blob, block, disc, ring, rod


def _bun(
    colour: Colour, *, size: tuple[float, float, float] = (0.0275, 0.0275, 0.021), marks: tuple[Part, ...] = ()
) -> tuple[Part, ...]:
    base = disc(min(size[:2]) * 0.72, 0.004, colour, (0, 0, -size[2] + 0.003))
    return (blob(size, colour), base, *marks)


def _pleats(colour: Colour, count: int = 8) -> tuple[Part, ...]:
    turns = [2 * pi * i / count for i in range(count)]
    return tuple(
        rod(
            (0.004 * cos(t), 0.004 * sin(t), 0.0205),
            (0.018 * cos(t), 0.018 * sin(t), 0.0158),
            0.0019,
            colour,
            solid=False,
        )
        for t in turns
    )


def _dots(colour: Colour, radius: float = 0.0036) -> tuple[Part, ...]:
    spots = [
        (0, 0, 0.0205),
        (0.014, 0.004, 0.0175),
        (-0.013, 0.008, 0.0172),
        (-0.006, -0.014, 0.0172),
        (0.010, -0.013, 0.0162),
        (0.004, 0.017, 0.0158),
    ]
    return tuple(ball(radius, colour, at, solid=False) for at in spots)


TRAINING_BUNS: tuple[Item, ...] = (
    Item(name="white bun", parts=_bun((0.97, 0.95, 0.90), marks=_pleats((0.78, 0.74, 0.66))), density=350),
    Item(name="wheat bun", parts=_bun((0.74, 0.52, 0.28)), density=350),
    Item(name="matcha bun", parts=_bun((0.52, 0.70, 0.30)), density=350),
)
NOVEL_BUNS: tuple[Item, ...] = (
    Item(name="taro bun", parts=_bun((0.56, 0.38, 0.72)), density=350),
    Item(
        name="peach bun",
        parts=(
            *_bun(
                (1.0, 0.72, 0.74), marks=(blob((0.012, 0.012, 0.012), (0.95, 0.32, 0.42), (0, 0, 0.0165), solid=False),)
            ),
            *(blob((0.014, 0.007, 0.003), LEAF, (x, 0, -0.012), solid=False) for x in (-0.026, 0.026)),
        ),
        density=350,
    ),
    Item(name="sesame bun", parts=_bun((0.95, 0.90, 0.78), marks=_dots(BLACK)), density=350),
    Item(name="spotted bun", parts=_bun((0.98, 0.78, 0.20), marks=_dots((0.75, 0.10, 0.08), 0.0046)), density=350),
    Item(
        name="striped bun",
        parts=_bun(
            (0.97, 0.94, 0.88),
            marks=tuple(
                blob((0.0030, h, 0.0205), (0.42, 0.20, 0.08), (x, 0, 0.0014), solid=False)
                for x, h in ((-0.013, 0.0235), (0, 0.027), (0.013, 0.0235))
            ),
        ),
        density=350,
    ),
    Item(
        name="square bun",
        parts=(
            block((0.024, 0.024, 0.017), (0.96, 0.93, 0.85)),
            blob((0.023, 0.023, 0.007), (0.96, 0.93, 0.85), (0, 0, 0.016), solid=False),
        ),
        faces=True,
        density=350,
    ),
    Item(name="long bun", parts=_bun((0.93, 0.74, 0.42), size=(0.037, 0.0225, 0.020)), across=(0, 1, 0), density=350),
    Item(
        name="flower bun",
        parts=(
            *(ball(0.0165, (0.98, 0.55, 0.62), (x, y, 0)) for x in (-0.0115, 0.0115) for y in (-0.0115, 0.0115)),
            ball(0.008, YELLOW, (0, 0, 0.012), solid=False),
        ),
        faces=True,
        density=350,
    ),
)
BUNS = TRAINING_BUNS + NOVEL_BUNS

STEAMER = Container(
    name="steamer",
    parts=(
        disc(0.074, 0.005, (0.86, 0.72, 0.45), (0, 0, 0.005)),
        *ring(0.074, 0.020, 0.004, (BAMBOO, (0.74, 0.55, 0.27)), z=0.028, count=20),
        *ring(0.0755, 0.003, 0.004, ((0.55, 0.36, 0.16),), z=0.009, count=20),
    ),
    inside=(0.07, 0.07),
    floor=0.010,
    rim=0.048,
)
LID = Item(
    name="lid",
    parts=(
        disc(0.080, 0.004, (0.86, 0.70, 0.40)),
        disc(0.060, 0.003, (0.78, 0.58, 0.28), (0, 0, 0.006)),
        disc(0.0125, 0.014, (0.45, 0.12, 0.06), (0, 0, 0.020)),
        blob((0.016, 0.016, 0.006), (0.62, 0.18, 0.08), (0, 0, 0.033)),
    ),
    density=350,
)
LID_KNOB = 0.020
"""Height of the centre of the lid's knob above the lid's origin, metres."""
