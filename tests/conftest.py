"""Fixtures that several rooms' tests use."""

import pytest
import torch

from tests.support.small import make_small_config, random_batch


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` on a machine without CUDA."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and torch.cuda.is_available() is false here"))


@pytest.fixture
def small_config():
    return make_small_config()


@pytest.fixture
def make_batch():
    return random_batch
