"""Image augmentation as GR00T trains with it: one random crop and one colour change for all frames of a clip.

Source: NVIDIA/Isaac-GR00T, `gr00t/experiment/data_config.py`: crop of 95 %, brightness .3, contrast .4, saturation .5,
hue .08, each drawn uniformly as torchvision's ColorJitter does. It changes what the video DiT has to predict and what the
teacher sees alike, so it works on decoded clips only.
"""

import numpy as np
from PIL import Image

from agra.data.config import AugmentConfig

_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def augment(clip: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W, 3) uint8 to the same shape; the same draw of `rng` gives the same clip."""
    return _jitter(_crop(clip, config.crop, rng), config, rng)


def _crop(clip: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    height, width = clip.shape[1:3]
    rows, columns = round(height * share), round(width * share)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    if (rows, columns) == (height, width):
        return clip
    kept = clip[:, top : top + rows, left : left + columns]
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in kept]
    return np.stack([np.asarray(frame) for frame in resized])


def _jitter(clip: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, in an order drawn as well, on values in [0, 1]."""
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
    """Turn the colours about the grey axis by `turn` of a full circle, keeping luma: the YIQ form of a hue shift."""
    to_yiq = np.array([_GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float64)
    angle = 2 * np.pi * turn
    rotation = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    matrix = (np.linalg.inv(to_yiq) @ rotation @ to_yiq).astype(np.float32)
    return np.clip(values @ matrix.T, 0, 1)
