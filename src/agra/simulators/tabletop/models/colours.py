"""Named colours and tablecloths. RGB in [0, 1]."""

from agra.simulators.tabletop.models.parts import Colour

RED, GREEN, BLUE = (0.82, 0.08, 0.08), (0.16, 0.55, 0.13), (0.08, 0.25, 0.85)
YELLOW, ORANGE, PINK = (1.0, 0.83, 0.05), (1.0, 0.47, 0.02), (1.0, 0.55, 0.50)
PURPLE, BROWN, BLACK = (0.34, 0.07, 0.42), (0.38, 0.20, 0.07), (0.06, 0.06, 0.06)
WHITE, CREAM, SILVER = (0.98, 0.98, 0.98), (0.99, 0.91, 0.76), (0.80, 0.82, 0.86)
CRUST, GOLD, LEAF = (0.78, 0.44, 0.14), (0.87, 0.56, 0.16), (0.20, 0.62, 0.12)
BAMBOO, STRAW, TEAL = (0.80, 0.62, 0.32), (0.72, 0.50, 0.22), (0.02, 0.55, 0.55)

DEFAULT_TABLECLOTH = "grey"
TABLECLOTHS: dict[str, tuple[Colour, Colour]] = {
    "grey": ((0.50, 0.53, 0.57), (0.53, 0.56, 0.60)),
    "blue checks": ((0.20, 0.36, 0.66), (0.44, 0.57, 0.80)),
    "green": ((0.24, 0.45, 0.30), (0.28, 0.50, 0.34)),
    "plum": ((0.40, 0.22, 0.33), (0.46, 0.26, 0.38)),
}
"""Two colours of each woven pattern. Training uses the default alone."""
