"""What the video DiT expects to happen, beside what did: was the video right and the action wrong?              Fig. 1

The predicted latents are decoded and compared with the recorded frames at the size that the model sees. Predicting
that nothing moves is the baseline: in a nearly static scene its scores are high.
"""

from dataclasses import dataclass

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


@dataclass(frozen=True, kw_only=True)
class VideoLikeness:
    """How near future frames are to the recorded ones."""

    psnr: float  # dB, of the squared error over all of them
    ssim: float  # at most 1, mean over them


def compare_videos(predicted: np.ndarray, recorded: np.ndarray) -> VideoLikeness:
    """PSNR and SSIM of frames (F, H, W, 3) uint8 after the first, which both share.

    Equal frames have an infinite PSNR. Raises ValueError where the shapes differ or there is no future frame.
    """
    if predicted.shape != recorded.shape or predicted.dtype != np.uint8 or recorded.dtype != np.uint8:
        raise ValueError(f"expected two uint8 videos of one shape, got {predicted.shape} and {recorded.shape}")
    if predicted.ndim != 4 or len(predicted) < 2:
        raise ValueError(f"expected (F, H, W, 3) with at least one frame after the first, got {predicted.shape}")
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(recorded[1:], predicted[1:])
    ssim = [structural_similarity(*pair, channel_axis=-1) for pair in zip(recorded[1:], predicted[1:], strict=True)]
    return VideoLikeness(psnr=float(psnr), ssim=float(np.mean(ssim)))


def nothing_moves(recorded: np.ndarray) -> np.ndarray:
    """The observation repeated: the prediction that costs nothing."""
    return np.broadcast_to(recorded[:1], recorded.shape)
