"""What lies on the table: ten seen and ten novel objects, containers, plates, the steamer, buns and tablecloths."""

from itertools import pairwise
from math import pi

from agra.simulators.tabletop.parts import Colour, Container, Item, Part, arc, ball, blob, block, disc, ring, rod

RED, GREEN, BLUE = (0.82, 0.08, 0.08), (0.16, 0.55, 0.13), (0.08, 0.25, 0.85)
YELLOW, ORANGE, PINK = (1.0, 0.83, 0.05), (1.0, 0.47, 0.02), (1.0, 0.55, 0.50)
PURPLE, BROWN, BLACK = (0.34, 0.07, 0.42), (0.38, 0.20, 0.07), (0.06, 0.06, 0.06)
WHITE, CREAM, SILVER = (0.98, 0.98, 0.98), (0.99, 0.91, 0.76), (0.80, 0.82, 0.86)
CRUST, GOLD, LEAF = (0.78, 0.44, 0.14), (0.87, 0.56, 0.16), (0.20, 0.62, 0.12)
BAMBOO, STRAW, TEAL = (0.80, 0.62, 0.32), (0.72, 0.50, 0.22), (0.02, 0.55, 0.55)


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


def _plate(rim: tuple[Colour, ...], face: Colour, *, radius: float = 0.064, lip: float = 0.007) -> tuple[Part, ...]:
    wall = ring(radius - 0.002, lip, 0.0035, rim, z=lip, count=20, lean=0.35)
    return (disc(radius - 0.002, 0.003, face, (0, 0, 0.003)), *wall)


def _square(half: float, height: float, colour: Colour, edge: Colour) -> tuple[Part, ...]:
    thick = 0.004
    walls = []
    for sign in (-1, 1):
        walls.append(block((thick, half, height / 2), edge, (sign * (half - thick), 0, height / 2)))
        walls.append(block((half - 2 * thick, thick, height / 2), edge, (0, sign * (half - thick), height / 2)))
    return (block((half, half, 0.003), colour, (0, 0, 0.003)), *walls)


def _basket() -> tuple[Part, ...]:
    low = ring(0.054, 0.007, 0.004, (STRAW, BROWN), z=0.009, count=16, lean=0.25)
    middle = ring(0.058, 0.007, 0.004, (BROWN, STRAW), z=0.022, count=16, lean=0.25)
    top = ring(0.061, 0.003, 0.0055, (STRAW,), z=0.031, count=16)
    return (disc(0.054, 0.003, BAMBOO, (0, 0, 0.003)), *low, *middle, *top)


def _bowl() -> tuple[Part, ...]:
    blue = (0.13, 0.22, 0.62)
    low = ring(0.045, 0.011, 0.004, (blue,), z=0.012, count=18, lean=0.75)
    top = ring(0.058, 0.009, 0.004, (WHITE,), z=0.026, count=18, lean=0.35)
    return (disc(0.040, 0.003, (0.88, 0.90, 0.95), (0, 0, 0.003)), *low, *top)


BOX = Container(
    name="box",
    parts=_square(0.060, 0.034, (0.66, 0.48, 0.28), (0.50, 0.33, 0.16)),
    inside=(0.052, 0.052),
    round=False,
    rim=0.034,
)
PLATE = Container(
    name="plate", parts=_plate((WHITE,), (0.93, 0.93, 0.95)), inside=(0.058, 0.058), rim=0.014, preposition="on"
)
BOWL = Container(name="bowl", parts=_bowl(), inside=(0.054, 0.054), rim=0.035)
BASKET = Container(name="basket", parts=_basket(), inside=(0.056, 0.056), rim=0.034)
CONTAINERS: tuple[Container, ...] = (BOX, PLATE, BOWL, BASKET)


def _oval() -> tuple[Part, ...]:
    # Heights differ by a hair, so that overlapping tops do not flicker.
    xs = (0.0, -0.0075, 0.0075, -0.015, 0.015)
    base = tuple(disc(0.048, 0.003 - 0.0002 * i, (0.66, 0.42, 0.20), (x, 0, 0.003)) for i, x in enumerate(xs))
    return (*base, *ring(0.050, 0.006, 0.0035, (BROWN,), z=0.007, count=24, stretch=1.3))


TRAINING_PLATES: tuple[Container, ...] = (
    PLATE,
    Container(
        name="blue plate", parts=_plate((BLUE,), (0.25, 0.45, 0.90)), inside=(0.058, 0.058), rim=0.014, preposition="on"
    ),
    Container(
        name="green plate",
        parts=_plate((GREEN,), (0.45, 0.78, 0.40)),
        inside=(0.058, 0.058),
        rim=0.014,
        preposition="on",
    ),
)
NOVEL_PLATES: tuple[Container, ...] = (
    Container(
        name="square plate",
        parts=_square(0.058, 0.013, (0.16, 0.16, 0.19), BLACK),
        inside=(0.054, 0.054),
        round=False,
        rim=0.013,
        preposition="on",
    ),
    Container(
        name="striped plate",
        parts=_plate((RED, WHITE), (0.99, 0.95, 0.88)),
        inside=(0.058, 0.058),
        rim=0.014,
        preposition="on",
    ),
    Container(name="oval plate", parts=_oval(), inside=(0.060, 0.046), rim=0.013, preposition="on"),
    Container(
        name="ringed plate",
        parts=(
            *_plate((YELLOW,), (0.98, 0.90, 0.45)),
            disc(0.044, 0.0005, TEAL, (0, 0, 0.0061), solid=False),
            disc(0.032, 0.0005, (0.98, 0.90, 0.45), (0, 0, 0.0064), solid=False),
        ),
        inside=(0.058, 0.058),
        rim=0.014,
        preposition="on",
    ),
)
PLATES = TRAINING_PLATES + NOVEL_PLATES


def _bun(
    colour: Colour, *, size: tuple[float, float, float] = (0.0275, 0.0275, 0.021), marks: tuple[Part, ...] = ()
) -> tuple[Part, ...]:
    base = disc(min(size[:2]) * 0.72, 0.004, colour, (0, 0, -size[2] + 0.003))
    return (blob(size, colour), base, *marks)


def _pleats(colour: Colour, count: int = 8) -> tuple[Part, ...]:
    from math import cos, sin

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
"""Height of the middle of the lid's knob above the lid's origin."""

ITEMS = {item.name: item for item in (*SEEN, *NOVEL, *BUNS, LID)}
FURNITURE = {container.name: container for container in (*CONTAINERS, *PLATES, STEAMER)}

DEFAULT_TABLECLOTH = "grey"
TABLECLOTHS: dict[str, tuple[Colour, Colour]] = {
    "grey": ((0.50, 0.53, 0.57), (0.53, 0.56, 0.60)),
    "blue checks": ((0.20, 0.36, 0.66), (0.44, 0.57, 0.80)),
    "green": ((0.24, 0.45, 0.30), (0.28, 0.50, 0.34)),
    "plum": ((0.40, 0.22, 0.33), (0.46, 0.26, 0.38)),
}
"""Two colours of a woven pattern each; the default one is the only one in training."""
