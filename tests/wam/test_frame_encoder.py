import numpy as np
import pytest
import torch

from agra.rng import sharded_rng
from agra.wam.frame_encoder import FrameEncoder, crop, cut, spatial_softmax


def test_keypoints_are_mean_positions():
    maps = torch.randn(2, 3, 4, 5)
    answer = spatial_softmax(maps).numpy()
    for n in range(2):
        for c in range(3):
            weights = np.exp(maps[n, c].double().numpy())
            x = sum(weights[i, j] * (-1 + 2 * j / 4) for i in range(4) for j in range(5)) / weights.sum()
            y = sum(weights[i, j] * (-1 + 2 * i / 3) for i in range(4) for j in range(5)) / weights.sum()
            np.testing.assert_allclose(answer[n, 2 * c : 2 * c + 2], [x, y], atol=1e-6)


def test_a_cut_is_a_slice():
    frames = torch.randint(0, 256, (3, 8, 9, 3), dtype=torch.uint8)
    corners = [(0, 0), (3, 4), (2, 1)]
    answer = cut(frames, torch.tensor(corners), (5, 5))
    for frame, window, (top, left) in zip(frames, answer, corners, strict=True):
        assert torch.equal(window, frame[top : top + 5, left : left + 5])


def test_channels_divide_into_groups_of_16():
    with pytest.raises(ValueError, match="encoder_channels: expected multiples of 16, got"):
        FrameEncoder((16, 40))


def test_every_frame_is_cropped_at_a_place_of_its_own():
    position = torch.arange(32 * 48).reshape(32, 48)
    frames = torch.stack([position % 256, position // 256, position * 0], dim=-1).to(torch.uint8)
    frames = frames.expand(40, 2, -1, -1, -1)
    with sharded_rng(0, 5, samples=40):
        cropped = crop(frames, (28, 42), at_random=True)
    corners = cropped[:, :, 0, 0, 0].long() + 256 * cropped[:, :, 0, 0, 1].long()
    rows, columns = corners // 48, corners % 48
    assert set(rows.flatten().tolist()) == set(range(5))
    assert set(columns.flatten().tolist()) == set(range(7))
    assert (corners[:, 0] != corners[:, 1]).any()
    with sharded_rng(0, 5, samples=20, index=1, count=2):
        assert torch.equal(crop(frames[1::2], (28, 42), at_random=True), cropped[1::2])
    assert torch.equal(crop(frames, (28, 42), at_random=False), frames[:, :, 2:30, 3:45])
