"""Validation is part of the plan: its memory and its time."""

from dataclasses import replace

import numpy as np
import pytest

from agra.training import memory_estimate
from agra.training.plan import Machines, lay_out
from tests.support.small import make_small_config


@pytest.fixture(scope="module")
def step_cost():
    return memory_estimate.measure(make_small_config())


def test_a_validation_that_takes_more_than_the_step_decides_the_peak(small_config, step_cost, monkeypatch):
    counted = memory_estimate._validation

    def large(method, config, count, **options):
        result = counted(method, config, count, **options)
        return replace(result, levels=result.levels + 1e12 * count)

    monkeypatch.setattr(memory_estimate, "_validation", large)
    cost = memory_estimate.measure(small_config)
    assert step_cost.peak(3) < 1e9
    assert cost.peak(3) == pytest.approx(3e12, rel=1e-3)
    assert np.array_equal(cost.gradients, step_cost.gradients)


def test_its_time_is_added(small_config, step_cost):
    """As many windows as in a step, forward alone, every `validate_every` steps and once at the end."""
    machines = Machines(gpus=1, gpu="h100")
    rare, often = (
        lay_out(
            replace(small_config, stage=replace(small_config.stage, steps=1000, validate_every=every)),
            machines,
            [step_cost],
        )
        for every in (1000, 10)
    )
    (layout,) = rare.layouts
    assert layout.validation_seconds > 0
    assert layout.validation_seconds < layout.seconds
    assert often.hours - rare.hours == pytest.approx(99 * layout.validation_seconds / 3600)
