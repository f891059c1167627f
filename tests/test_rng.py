"""A sample's random numbers do not depend on the shards of a step."""

import pytest
import torch

from agra.flow import beta_levels, logit_normal_levels, uniform_levels
from agra.rng import noise_like, sample_shard, seed_everything, sharded_rng

SAMPLES = 8


def step_numbers(samples, index=0, count=1, dropout=0):
    """The draws of a training step: levels of half the samples, noise, two actions per sample, with dropout in between."""
    with sharded_rng(3, 7, samples=samples, index=index, count=count):
        levels = logit_normal_levels(samples // 2)
        torch.rand(dropout)
        noise = noise_like(torch.zeros(samples, 2, 3))
        return levels, noise, beta_levels(2 * samples).view(samples, 2), uniform_levels(samples)


@pytest.mark.parametrize("count", [2, 4])
def test_shards_together_are_the_whole(count):
    whole = step_numbers(SAMPLES)
    for index in range(count):
        for mine, all_rows in zip(step_numbers(SAMPLES // count, index, count), whole, strict=True):
            assert torch.equal(mine, all_rows[index::count])


def test_dropout_in_between_changes_nothing_and_differs_between_shards():
    for plain, disturbed in zip(step_numbers(4, 1, 2), step_numbers(4, 1, 2, dropout=100), strict=True):
        assert torch.equal(plain, disturbed)
    masks = []
    for index in (0, 1):
        with sharded_rng(3, 7, samples=4, index=index, count=2):
            masks.append(torch.rand(50))
    assert not torch.equal(*masks)


def test_a_single_shard_draws_the_same_as_the_seed_alone():
    with sharded_rng(3, 7, samples=4):
        ours = sample_shard(torch.rand, 4), sample_shard(torch.randn, 4)
    seed_everything(3, 7)
    assert torch.equal(ours[0], torch.rand(4))
    assert torch.equal(ours[1], torch.randn(4))
    seed_everything(3, 7)
    assert torch.equal(sample_shard(torch.rand, 4), ours[0])
