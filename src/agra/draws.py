"""Random numbers that belong to a sample, not to a process. A leaf.

A step's samples are spread over shares: processes, and parts of a batch whose gradients are accumulated. Every share
draws the whole step's numbers from the same seed and keeps the rows of its own samples, so one process, eight processes
and eight parts see the same noise, and a run may be moved between them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Sample = Callable[[int], Tensor]


@dataclass
class _Share:
    samples: int
    index: int
    count: int
    state: tuple[Tensor, Tensor | None]


_current: ContextVar[_Share | None] = ContextVar("share", default=None)


def seed_everything(*numbers: int) -> None:
    """Seed torch's global generators with a hash of `numbers`, such as (seed, step)."""
    torch.manual_seed(int(np.random.SeedSequence([*numbers, 0]).generate_state(1, np.uint64)[0]))


@contextmanager
def shared_draws(seed: int, step: int, *, samples: int, index: int = 0, count: int = 1) -> Iterator[None]:
    """Within it `draw` answers for the `samples` samples index::count of the step that (seed, step) stand for.

    What else draws from torch's global generators, dropout that is, gets numbers of its own for each share.
    """
    seed_everything(seed, step)
    token = _current.set(_Share(samples, index, count, _get_state()))
    seed_everything(seed, step, 1 + index)
    try:
        yield
    finally:
        _current.reset(token)


def draw(sample: Sample, rows: int) -> Tensor:
    """`rows` rows of what `sample(n)` draws for n; outside `shared_draws` that is sample(rows).

    Sample i of a share is sample index + i * count of the step; where a sample has several rows they lie together.
    """
    share = _current.get()
    if share is None:
        return sample(rows)
    outer = _get_state()
    _set_state(share.state)
    together = max(1, rows // share.samples)
    values = sample(rows * share.count).unflatten(0, (-1, together))[share.index :: share.count].flatten(0, 1)
    share.state = _get_state()
    _set_state(outer)
    return values


def noise_like(like: Tensor) -> Tensor:
    """Standard normal numbers in the shape of `like`, a row of it for each sample."""
    return draw(lambda n: torch.randn(n, *like.shape[1:], dtype=like.dtype, device=like.device), len(like))


def _get_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
