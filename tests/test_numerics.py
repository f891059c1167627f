"""Faster training and inference against the stock computation (benchmarks/stock.py).

In float32 the two agree up to rounding. In bfloat16 both are compared with the stock computation in float32. The error of
ours may exceed the error of the stock computation by a quarter at most.
"""

import statistics
from copy import deepcopy

import pytest
import torch

from agra.flow import euler
from agra.rng import sharded_rng
from agra.training.distributed import distributed_context
from agra.training.parallelize import ParallelConfig, apply
from agra.wam.fast import FastWAM
from benchmarks.stock import StockMethod

FLOAT32 = 2e-5
"""Largest relative difference in float32, as a ratio of norms."""


@pytest.fixture
def pair(small_config):
    """Ours and the stock computation, as methods with the same weights."""
    torch.manual_seed(0)
    ours = small_config.method.build()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return ours, StockMethod(deepcopy(ours))


def distance(ours, reference):
    """Norm of the difference relative to the norm of the reference."""
    return float((ours.float() - reference.float()).norm() / reference.float().norm())


def losses_and_gradients(method, batch, *, half=False):
    method.zero_grad(set_to_none=True)
    with sharded_rng(0, 0, samples=len(batch)), torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = method(batch)
    losses.total.backward()
    gradient = torch.cat([p.grad.flatten() for _, p in sorted(method.named_parameters()) if p.grad is not None])
    return torch.stack([losses.terms[name] for name in ("video", "action", "alignment")]).detach(), gradient


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_training_step_in_float32(pair, small_config, make_batch, checkpointed):
    batch = make_batch(small_config)
    apply(pair[0], ParallelConfig(activation_checkpointing=float(checkpointed)))
    ours, stock = (losses_and_gradients(method, batch) for method in pair)
    for values, reference in zip(ours, stock, strict=True):
        assert distance(values, reference) < FLOAT32


def test_a_training_step_in_bfloat16(pair, small_config, make_batch):
    ratios, distances = [], []
    for seed in range(60):  # the medians, because single gradients of a small model jump when a ReLU switches
        batch = make_batch(small_config, seed=seed)
        _, exact = losses_and_gradients(pair[1], batch)
        ours, stock = (distance(losses_and_gradients(method, batch, half=True)[1], exact) for method in pair)
        assert stock > 0
        distances.append(stock)
        ratios.append(ours / stock)
    assert statistics.median(distances) < 0.1
    assert statistics.median(ratios) < 1.25


@torch.no_grad()
def answers(pair, batch, *, half):
    """A chunk of actions from the fast path and from the stock computation."""
    torch.manual_seed(1)
    noise, start, steps = torch.randn_like(batch.latents), torch.randn_like(batch.actions), 4
    ours, stock = (method.eval().wam for method in pair)
    observed = batch.latents[:, :, :1]

    def predict(actions, level):
        guidance = stock.guide(stock.condition(observed, noise, batch.instruction))
        return stock.action_dit(actions, batch.state, level, guidance, batch.embodiment).velocity

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        fast = FastWAM(ours, action_steps=steps)
        hidden = fast.condition(observed, noise, [fast.instruction(tokens) for tokens in batch.instruction])
        actions = fast.act(ours.guide(hidden), batch.state, batch.embodiment, start)
        return actions.float(), euler(predict, start, steps).float()


def test_an_answer_in_float32(pair, small_config, make_batch):
    ours, stock = answers(pair, make_batch(small_config), half=False)
    assert distance(ours, stock) < FLOAT32


def test_an_answer_in_bfloat16(pair, small_config, make_batch):
    ratios = []
    for seed in range(12):
        batch = make_batch(small_config, seed=seed)
        _, exact = answers(pair, batch, half=False)
        ours, stock = (distance(actions, exact) for actions in answers(pair, batch, half=True))
        assert 0 < stock < 0.1
        ratios.append(ours / stock)
    assert statistics.median(ratios) < 1.25


def test_fused_adamw(pair):
    torch.manual_seed(2)
    results = []
    for method, fused in zip(pair, (True, False), strict=True):
        parameters = [parameter for _, parameter in sorted(method.named_parameters())]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=fused)
        generator = torch.Generator().manual_seed(5)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    assert distance(*results) < FLOAT32


def test_deterministic_mode_gives_the_same_bits(pair, small_config, make_batch):
    batch, threads = make_batch(small_config), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with distributed_context("cpu", shard_degree=None, deterministic=True):
            assert torch.are_deterministic_algorithms_enabled()
            runs = [losses_and_gradients(pair[0], batch)[1] for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(run, runs[0]) for run in runs)
