"""Random numbers that belong to samples, not to processes.

The samples of a step are divided into shards: processes, and micro-batches of each process. Every shard draws the
numbers of the whole step from the same seed and keeps the rows of its own samples. One process, eight processes and
eight micro-batches therefore see the same noise, and a run can continue with another number of processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Sampler = Callable[[int], Tensor]
"""Draws a number of rows."""


@dataclass
class _Shard:
    samples: int
    index: int
    count: int
    state: tuple[Tensor, Tensor | None]


_current: ContextVar[_Shard | None] = ContextVar("shard", default=None)


def seed_everything(*numbers: int) -> None:
    """Seed torch's global generators with a hash of `numbers`, such as (seed, step)."""
    torch.manual_seed(int(np.random.SeedSequence([*numbers, 0]).generate_state(1, np.uint64)[0]))


@contextmanager
def sharded_rng(seed: int, step: int, *, samples: int, index: int = 0, count: int = 1) -> Iterator[None]:
    """Make `sample_shard` return only this shard's rows (`index::count`) of the whole step's noise from (seed, step).

    The shard holds `samples` samples. Dropout draws from torch's global generators directly, so its numbers differ
    between shards.
    """
    seed_everything(seed, step)
    token = _current.set(_Shard(samples, index, count, _get_state()))
    seed_everything(seed, step, 1 + index)
    try:
        yield
    finally:
        _current.reset(token)


def sample_shard(sampler: Sampler, rows: int) -> Tensor:
    """Draw `rows` rows of noise. Outside `sharded_rng` this is `sampler(rows)`.

    Sample i of a shard is sample index + i * count of the step. The rows of a sample stay together.
    """
    shard = _current.get()
    if shard is None:
        return sampler(rows)
    outer_state = _get_state()
    _set_state(shard.state)
    rows_per_sample = max(1, rows // shard.samples)
    values = sampler(rows * shard.count).unflatten(0, (-1, rows_per_sample))[shard.index :: shard.count].flatten(0, 1)
    shard.state = _get_state()
    _set_state(outer_state)
    return values


def noise_like(like: Tensor) -> Tensor:
    """Draw standard normal numbers in the shape of `like`, one row per sample."""
    return sample_shard(lambda n: torch.randn(n, *like.shape[1:], dtype=like.dtype, device=like.device), len(like))


def _get_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
