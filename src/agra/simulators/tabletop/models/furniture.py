"""Containers and plates, the goals of the items."""

from agra.simulators.tabletop.models.colours import BAMBOO, BLACK, BLUE, BROWN, GREEN, RED, STRAW, TEAL, WHITE, YELLOW
from agra.simulators.tabletop.models.parts import Colour, Container, Part, block, disc, ring


def _plate(rim: tuple[Colour, ...], face: Colour, *, radius: float = 0.064) -> tuple[Part, ...]:
    lip = 0.007
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
    # Slightly different heights, so that overlapping tops do not flicker.
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
