"""What makes training and answers quicker, against the plain way of computing them (benchmarks/stock.py).

In float32 the two agree up to rounding. In bfloat16 each is held against the plain way in float32: ours may be no further
from it than the plain way in bfloat16 is, within a quarter.
"""

import statistics

import pytest
import torch
from benchmarks.stock import StockWAM

from agra.rng import sharded_rng
from agra.flow import euler
from agra.methods.wam import Objective
from agra.training.parallelize import ParallelConfig, apply, joined
from agra.wam.fast import FastWAM
from agra.wam.model import WAM

FLOAT32 = 2e-5
"""Length of the difference, as a share of the plain way's."""


@pytest.fixture
def pair(small_config):
    """The same weights, ours and the plain way."""
    torch.manual_seed(0)
    ours = WAM(small_config.model)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return ours, StockWAM(ours)


def distance(ours, theirs):
    """Length of the difference as a share of the plain way's."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def losses_and_gradients(model, config, batch, *, half=False, checkpointed=False):
    objective = Objective(model, config.method.objective, config.method.alignment, 6)
    torch.manual_seed(3)
    for parameter in objective.projectors.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    apply(objective, ParallelConfig(activation_checkpointing=checkpointed))
    objective.zero_grad(set_to_none=True)
    with sharded_rng(0, 0, samples=len(batch)), torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = objective(batch)
    losses.total.backward()
    gradient = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
    return torch.stack([losses.video, losses.action, losses.alignment]).detach(), gradient


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_training_step_in_float32(pair, small_config, make_batch, checkpointed):
    batch = make_batch(small_config)
    ours = losses_and_gradients(pair[0], small_config, batch, checkpointed=checkpointed)
    theirs = losses_and_gradients(pair[1], small_config, batch)
    for one, other in zip(ours, theirs, strict=True):
        assert distance(one, other) < FLOAT32


def test_a_training_step_in_bfloat16(pair, small_config, make_batch):
    ratios = []
    for seed in range(12):  # a ReLU that flips makes single gradients of so small a model jump
        batch = make_batch(small_config, seed=seed)
        _, exact = losses_and_gradients(pair[1], small_config, batch)
        ours, theirs = (
            distance(losses_and_gradients(model, small_config, batch, half=True)[1], exact) for model in pair
        )
        assert 0 < theirs < 0.1
        ratios.append(ours / theirs)
    assert statistics.median(ratios) < 1.25


@torch.no_grad()
def answers(pair, config, batch, *, half):
    """A chunk of actions, the fast way and the plain way."""
    torch.manual_seed(1)
    noise, start, steps = torch.randn_like(batch.latents), torch.randn_like(batch.actions), 4
    ours, plain = (model.eval() for model in pair)
    observed = batch.latents[:, :, :1]

    def anew(actions, level):
        guidance = plain.guide(plain.condition(observed, noise, batch.instruction))
        return plain.action_dit(actions, batch.state, level, guidance, batch.embodiment).velocity

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        fast = FastWAM(ours, action_steps=steps)
        hidden = fast.condition(observed, noise, [fast.instruction(one) for one in batch.instruction])
        quick = fast.act(ours.guide(hidden), batch.state, batch.embodiment, start)
        return quick.float(), euler(anew, start, steps).float()


def test_an_answer_in_float32(pair, small_config, make_batch):
    ours, theirs = answers(pair, small_config, make_batch(small_config), half=False)
    assert distance(ours, theirs) < FLOAT32


def test_an_answer_in_bfloat16(pair, small_config, make_batch):
    ratios = []
    for seed in range(12):
        batch = make_batch(small_config, seed=seed)
        _, exact = answers(pair, small_config, batch, half=False)
        ours, theirs = (distance(one, exact) for one in answers(pair, small_config, batch, half=True))
        assert 0 < theirs < 0.1
        ratios.append(ours / theirs)
    assert statistics.median(ratios) < 1.25


def test_fused_adamw(pair):
    torch.manual_seed(2)
    results = []
    for model, fused in zip(pair, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, fused=fused)
        generator = torch.Generator().manual_seed(5)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert distance(*results) < FLOAT32


def test_deterministic_mode_gives_the_same_bits(pair, small_config, make_batch):
    batch, threads = make_batch(small_config), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with joined(ParallelConfig(deterministic=True), "cpu"):
            assert torch.are_deterministic_algorithms_enabled()
            runs = [losses_and_gradients(pair[0], small_config, batch)[1] for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(run, runs[0]) for run in runs)
