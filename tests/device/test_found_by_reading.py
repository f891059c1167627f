"""Four defects that no device was needed for, each at the place where a run would have met it."""

from dataclasses import replace
from pathlib import Path

import pytest

from agra.data.config import SourceConfig
from agra.diagnostics.samples.sources import dataset_samples
from agra.recipes import agra_dino_hierarchical, agra_dino_l8, agra_siglip_l8
from agra.training.memory_estimate import feature_width, flops_per_sample
from tests.support.small import with_alignment


def test_the_teacher_s_width_comes_from_its_own_config(make_config, recorded, tmp_path):
    """Whatever its folder is called; a training run on a known GPU counts FLOPs with it."""
    config = make_config()
    assert feature_width(config.method) == 24
    assert flops_per_sample(config) > 0
    assert feature_width(agra_dino_l8().method) == 768
    assert feature_width(agra_dino_hierarchical().method) == 3 * 768
    assert feature_width(agra_siglip_l8().method) == 768
    named = recorded / "dinov2"
    (tmp_path / "a-large-folder").symlink_to(named)
    teacher = replace(config.method.alignment.teacher, source=str(tmp_path / "a-large-folder"))
    assert feature_width(with_alignment(config, teacher=teacher).method) == 24
    missing = replace(config.method.alignment.teacher, source=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        feature_width(with_alignment(config, teacher=missing).method)


def test_samples_of_a_mixture_have_their_source_s_frame_stride(make_config):
    """A mixture's own fields count, not those of the config around it."""
    config = make_config()
    mixture = (SourceConfig(path="demonstrations", embodiment="dot", frame_stride=3),)
    folder = str(Path(config.data.path).parent)
    mixed = replace(config, data=replace(config.data, path=folder, mixture=mixture, frame_stride=1))
    direct = replace(config, data=replace(config.data, frame_stride=3))
    for ours, theirs in zip(dataset_samples(mixed, 3), dataset_samples(direct, 3), strict=True):
        assert (ours.frames == theirs.frames).all()
        assert (ours.video == theirs.video).all()
