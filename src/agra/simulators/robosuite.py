"""Rendering of the suites based on robosuite. Imports no suite."""

from collections.abc import Callable
from typing import Any

import numpy as np


def render_on_demand(simulation: Any, rendering: Callable[[], bool]) -> None:
    """Skip robosuite's rendering of its cameras in every control step unless `rendering()`: it receives black frames.

    `simulation` is the environment's `sim`, which lasts until the next hard reset. The sampling times of observations
    stay the same. Segmentations are always rendered.
    """
    render_frame = simulation.render

    def render(*, height: int, width: int, **options: Any) -> Any:
        if rendering() or options.get("segmentation"):
            return render_frame(height=height, width=width, **options)
        return np.zeros((height, width, 3), np.uint8)

    simulation.render = render
