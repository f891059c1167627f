"""What the suites on robosuite share. Imports nothing of theirs."""

from collections.abc import Callable
from typing import Any

import numpy as np


def draw_on_demand(simulation: Any, looked_at: Callable[[], bool]) -> None:
    """From now on robosuite, which draws its cameras in every control step, is handed black pictures where nobody looks.

    `simulation` is the environment's `sim`, which lives until its next hard reset. What it samples, and when, stays its
    own; segmentations, which are asked for one by one, are always drawn.
    """
    draw = simulation.render

    def render(*, height: int, width: int, **options: Any) -> Any:
        if looked_at() or options.get("segmentation"):
            return draw(height=height, width=width, **options)
        return np.zeros((height, width, 3), np.uint8)

    simulation.render = render
