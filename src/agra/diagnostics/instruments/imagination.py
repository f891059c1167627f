"""Comparison of the predicted video with the recording (Fig. 1), to tell a wrong prediction from a wrong action.

The predicted latents are decoded and compared with the recorded frames at the model's frame size. The baseline repeats
the observation. In a nearly static scene its scores are high.
"""

from dataclasses import dataclass

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


@dataclass(frozen=True, kw_only=True)
class VideoScores:
    """Similarity of predicted future frames to the recorded frames."""

    psnr: float  # dB, from the squared error over all future frames
    ssim: float  # at most 1, mean over the future frames


def compare_videos(predicted: np.ndarray, recorded: np.ndarray) -> VideoScores:
    """PSNR and SSIM of the frames (F, H, W, 3) uint8 after the first, which is the observation in both.

    Equal frames have an infinite PSNR. Raises ValueError for different shapes and for videos without a future frame.
    """
    if predicted.shape != recorded.shape or predicted.dtype != np.uint8 or recorded.dtype != np.uint8:
        raise ValueError(f"expected two uint8 videos of one shape, got {predicted.shape} and {recorded.shape}")
    if predicted.ndim != 4 or len(predicted) < 2:
        raise ValueError(f"expected (F, H, W, 3) with at least one frame after the first, got {predicted.shape}")
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(recorded[1:], predicted[1:])
    ssim = [structural_similarity(*pair, channel_axis=-1) for pair in zip(recorded[1:], predicted[1:], strict=True)]
    return VideoScores(psnr=float(psnr), ssim=float(np.mean(ssim)))


def static_video(recorded: np.ndarray) -> np.ndarray:
    """The baseline: the observation, repeated."""
    return np.broadcast_to(recorded[:1], recorded.shape)
