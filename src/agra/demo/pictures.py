"""Pictures of the demo: a player's camera with its plan, what the policy saw and where it read, and what it imagined."""

import numpy as np
from PIL import Image, ImageDraw

from agra.demo.player import Player
from agra.diagnostics.report.gallery_section import RAMP
from agra.simulators.tabletop.placement import pixels
from agra.types import ActionChunk

SCALE = 2
"""Pixels of a picture for each pixel of the camera's frame."""
PLAN, UNMASKED_PLAN, MARK = (255, 140, 0), (255, 255, 255), (20, 110, 255)


def camera(player: Player, mask: np.ndarray | None, corner: tuple[int, int] | None = None) -> np.ndarray:
    """The camera's frame (SCALE * H, SCALE * W, 3) with the hand's path in the present chunk, and the mask's border.

    Under a mask, the path that the policy would take without it is white. `corner` marks a pixel (column, row).
    """
    picture = Image.fromarray(enlarged(player.observation.frame, SCALE))
    draw = ImageDraw.Draw(picture)
    if mask is not None:
        border = np.kron(mask, np.ones((SCALE, SCALE), bool))
        inner = np.pad(border, 1)
        inside = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        picture.paste(MARK, mask=Image.fromarray((border & ~inside).astype(np.uint8) * 255))
    if player.answer.unmasked is not None:
        _draw_path(draw, player, player.answer.unmasked, UNMASKED_PLAN)
    _draw_path(draw, player, player.answer.chunk, PLAN)
    if corner is not None:
        x, y = (SCALE * (value + 0.5) for value in corner)
        draw.line([(x - 6, y), (x + 6, y)], fill=MARK, width=2)
        draw.line([(x, y - 6), (x, y + 6)], fill=MARK, width=2)
    return np.asarray(picture)


def read(player: Player) -> np.ndarray:
    """The frame that the policy received for its present chunk, (H, W, 3), with its attention.

    The brightest token is the one with most attention. Tokens with little attention stay as they are.
    """
    seen = player.answer.seen
    if player.answer.attention is None:
        return seen
    grid = player.answer.attention.grid
    height, width = seen.shape[:2]
    rows, columns = np.arange(height) * grid.shape[0] // height, np.arange(width) * grid.shape[1] // width
    heat = (grid / grid.max())[rows][:, columns][..., None]
    stops = np.linspace(0, 1, len(RAMP))
    colour = np.stack([np.interp(heat[..., 0], stops, channel) for channel in np.transpose(RAMP)], axis=-1)
    return (seen + 0.65 * heat * (colour - seen)).round().astype(np.uint8)


def enlarged(frame: np.ndarray, scale: int) -> np.ndarray:
    """A frame (H, W, 3) uint8, smoothly enlarged."""
    height, width = frame.shape[:2]
    return np.asarray(Image.fromarray(frame).resize((scale * width, scale * height), Image.Resampling.BICUBIC))


def _draw_path(draw: ImageDraw.ImageDraw, player: Player, chunk: ActionChunk, colour: tuple[int, int, int]) -> None:
    simulator = player.simulator
    path = SCALE * (pixels(simulator.scene, player.path(chunk), simulator.frame_size) + 0.5)
    points = [(float(x), float(y)) for x, y in path]
    draw.line(points, fill=colour, width=3, joint="curve")
    x, y = points[-1]
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
