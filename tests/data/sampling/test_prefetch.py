import threading

import pytest
import torch

from agra.data.sampling import prefetch
from agra.data.sampling.prefetch import Prefetched


def test_each_step_gets_its_own_batch_whatever_was_asked_before():
    made = []

    def batch(step):
        made.append(step)
        return step * 10

    with Prefetched(batch, ahead=2) as batches:
        assert [batches(step) for step in (0, 1, 2)] == [0, 10, 20]
        assert batches(50) == 500
        assert batches(3) == 30
    assert made.count(0) == made.count(1) == made.count(2) == 1


def test_the_next_batches_are_begun_before_they_are_asked_for():
    started = threading.Event()

    def batch(step):
        if step == 2:
            started.set()
        return step

    with Prefetched(batch, ahead=2) as batches:
        batches(0)
        assert started.wait(timeout=10)


def test_an_error_is_raised_by_its_own_step():
    def batch(step):
        if step == 1:
            raise ValueError("data/file-000.parquet: damaged")
        return step

    with Prefetched(batch, ahead=3) as batches:
        assert batches(0) == 0
        with pytest.raises(ValueError, match=r"file-000\.parquet: damaged"):
            batches(1)
        assert batches(2) == 2


def test_all_copies_to_a_device_share_a_stream(monkeypatch):
    """The allocator keeps freed memory for each stream. `tests/device/test_gpu.py` measures it."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    prefetch._copy_stream.cache_clear()
    try:
        first, second = (prefetch._copy_stream(torch.device("cuda", index)) for index in (0, 1))
        assert prefetch._copy_stream(torch.device("cuda:0")) is first is not second
    finally:
        prefetch._copy_stream.cache_clear()
