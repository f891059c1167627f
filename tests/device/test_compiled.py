"""Compiled policies: one graph for each part and batch size, and no compilation after the warm-up.

Dynamo captures as usual. Its graphs run eagerly here, which takes seconds. `test_gpu.py` compiles them for a GPU.
"""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agra import api
from agra.policies.load import load_policy
from agra.serving.server.config import Limits
from agra.serving.server.service import PolicyService
from agra.types import PolicyRequest
from agra.wam.fast import BATCH_SIZES, padded_size


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch):
    """Dynamo's capture without a compiler. Graph breaks still raise."""
    compile_ = torch.compile

    def capture(function, **options):
        assert options["fullgraph"]
        options.pop("mode")
        return compile_(function, backend="eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", capture)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def trained(prepared, recorded, tmp_path_factory):
    """A folder of two runs, which differ in their seed."""
    folder = tmp_path_factory.mktemp("compiled")
    for seed in (0, 1):
        config = replace(prepared, stage=replace(prepared.stage, seed=seed, steps=2))
        assert api.train(config, output=folder / f"run_{seed}", init_from=recorded / "cosmos")
    return folder


COUNTED_IN_THREADS = """
import threading
from agra.training.memory_estimate import flops_per_sample
from tests.support.small import make_small_config

counts = []
def count():
    counts.append(flops_per_sample(make_small_config()))
for _ in range(3):
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
count()
assert len(counts) == 4 and len(set(counts)) == 1
"""


def ask(policy, observation, instructions, seed=0):
    return policy.act_batch(
        [
            PolicyRequest(observation=replace(observation, instruction=text), episode=policy.episode(seed + row))
            for row, text in enumerate(instructions)
        ]
    )


def test_batch_sizes():
    assert [padded_size(count) for count in (1, 2, 3, 5, 9, 16, 17, 33)] == [1, 2, 4, 8, 16, 16, 32, 48]
    assert BATCH_SIZES == (1, 2, 4, 8, 16)


def test_nothing_is_compiled_after_the_warm_up(trained, observation):
    """One instruction or several, in every batch size, in the thread that acts. The chunks are those of the plain path."""
    compiled, plain = (load_policy(trained / "run_0", **o) for o in ({"compiled": True}, {"fast": False}))
    with ThreadPoolExecutor(1, thread_name_prefix="policy") as thread:
        thread.submit(compiled.warm_up, 2).result()
        assert compiled.recompiles == 0
        for instructions in (["go 0"], ["go 0", "go 1"], ["go 1"] * 2):
            ours = thread.submit(ask, compiled, observation, instructions).result()
            theirs = ask(plain, observation, instructions)
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)
        assert compiled.recompiles == 0
        thread.submit(ask, compiled, observation, ["go 0"] * 3).result()
        assert compiled.recompiles == 3  # a larger batch than announced is compiled late, and that is counted
    assert threading.active_count() >= 1


def test_newer_weights_are_adopted_without_compiling(trained, observation):
    first, second = (load_policy(trained / f"run_{seed}", compiled=True) for seed in (0, 1))
    reference = load_policy(trained / "run_1")
    first.warm_up(1)
    before = ask(first, observation, ["go 1"])
    first.lend_encoder(second)
    assert first.adopt(second)
    assert {weight.device.type for weight in second.method.parameters()} == {"meta"}, "no second copy stays"
    after, expected = (ask(policy, observation, ["go 1"]) for policy in (first, reference))
    for old, ours, theirs in zip(before, after, expected, strict=True):
        np.testing.assert_allclose(ours.actions, theirs.actions, atol=1e-5)
        assert not np.allclose(old.actions, ours.actions, atol=1e-4)
    assert first.recompiles == 0
    assert first.name == second.name
    assert first.instructions is second.instructions
    assert "encoder" in vars(first.instructions), "no later instruction waits for the text encoder"


def test_policies_of_other_options_are_not_adopted(trained, observation):
    first = load_policy(trained / "run_0", compiled=True)
    assert not first.adopt(load_policy(trained / "run_1"))
    assert not first.adopt(load_policy(trained / "run_1", compiled=True, action_steps=2))
    assert not load_policy(trained / "run_0").adopt(first)
    expected = load_policy(trained / "run_0").act(observation).actions
    np.testing.assert_allclose(first.act(observation).actions, expected, atol=1e-5)


@pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(), reason="needs a CUDA build of torch without a GPU"
)
def test_fake_tensors_outlive_the_thread_that_used_them_first():
    """In a process of its own, since torch 2.11 crashes. Tests above compile in a thread that ends, too."""
    repository = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (repository / "src", repository)))
    done = subprocess.run(
        [sys.executable, "-c", COUNTED_IN_THREADS], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0


def test_only_the_thread_that_compiles_marks_steps(trained, monkeypatch):
    """Below torch 2.13 the first mark of a process ties CUDA graphs to its thread, and the service tests in another."""
    threads, own = [], []
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: threads.append(threading.current_thread().name)
    )

    async def start() -> None:
        service = PolicyService(load_policy(trained / "run_0", compiled=True), Limits(max_batch=1))
        await service.start()
        await service._batcher.call(lambda: own.append(threading.current_thread().name))
        await service.close()

    asyncio.run(start())
    assert set(threads) == set(own)


def test_a_new_checkpoint_shares_the_text_encoder_before_it_is_tested(trained):
    first, second = (load_policy(trained / f"run_{seed}") for seed in (0, 1))
    loads = []
    for policy in (first, second):
        policy.instructions.known = {}  # so that the test itself needs the encoder
        load = policy.instructions._load
        policy.instructions._load = lambda load=load, policy=policy: loads.append(policy) or load()

    async def reload() -> None:
        service = PolicyService(first, Limits(max_batch=1))
        await service.start()
        await service.check(second)
        await service.swap(second)
        await service.close()

    asyncio.run(reload())
    assert loads == [first]
    assert second.instructions.encoder is first.instructions.encoder
