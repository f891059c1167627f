"""Image augmentation: GR00T's random crop and colour change, and random shifts. All frames of a clip change alike.

Source of the former: NVIDIA/Isaac-GR00T, `gr00t/experiment/data_config.py`: crop of 95 %, brightness .3, contrast .4,
saturation .5, hue .08, each drawn uniformly as in torchvision's ColorJitter. Latents and teacher targets both come from
the changed clip, so neither can be cached.
"""

import numpy as np
from PIL import Image

from agra.data.config import AugmentConfig

_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def augment(clip: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Augment a clip (T, H, W, 3) uint8. The same state of `rng` gives the same clip."""
    return _jitter(_crop(clip, config.crop, rng), config, rng)


def shift(clip: np.ndarray, most: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Shift a clip (T, H, W, 3) by a random offset of up to `most` pixels in each direction, counted at `size` (h, w).

    The pixels of the edge repeat, as in DrQ (Kostrikov et al., arXiv 2004.13649).
    """
    height, width = clip.shape[1:3]
    down, right = np.rint(rng.integers(-most, most + 1, size=2) * np.array([height, width]) / size).astype(np.int64)
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return clip[:, rows[:, None], columns]


def _crop(clip: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    height, width = clip.shape[1:3]
    rows, columns = round(height * fraction), round(width * fraction)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    if (rows, columns) == (height, width):
        return clip
    cropped = clip[:, top : top + rows, left : left + columns]
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in cropped]
    return np.stack([np.asarray(frame) for frame in resized])


def _jitter(clip: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue in random order, on values in [0, 1]."""
    factors = {name: rng.uniform(1 - s, 1 + s) for name, s in _strengths(config).items()}
    turn = rng.uniform(-config.hue, config.hue)
    values = clip.astype(np.float32) / 255
    for name in rng.permutation(["brightness", "contrast", "saturation", "hue"]):
        if name == "hue":
            values = _turn_hue(values, turn)
            continue
        grey = (values @ _GREY)[..., None]
        # Contrast is relative to the clip's mean, not each frame's, so that no frame flickers.
        anchor = {"brightness": 0, "contrast": grey.mean(), "saturation": grey}[str(name)]
        values = np.clip(anchor + (values - anchor) * np.float32(factors[str(name)]), 0, 1)
    return (values * 255).round().astype(np.uint8)


def _strengths(config: AugmentConfig) -> dict[str, float]:
    return {"brightness": config.brightness, "contrast": config.contrast, "saturation": config.saturation}


def _turn_hue(values: np.ndarray, turn: float) -> np.ndarray:
    """Rotate the colours about the grey axis by `turn` of a full circle in YIQ, which leaves luma unchanged."""
    to_yiq = np.array([_GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float64)
    angle = 2 * np.pi * turn
    rotation = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    matrix = (np.linalg.inv(to_yiq) @ rotation @ to_yiq).astype(np.float32)
    return np.clip(values @ matrix.T, 0, 1)
