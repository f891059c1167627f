"""Compiled answers of every batch size, and of two policies in one process: padded sizes, and room for all their graphs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agra import api
from agra.policies.load import load_policy
from agra.types import PolicyRequest

pytestmark = pytest.mark.slow  # thirty graphs are captured


@pytest.fixture
def capture_alone(monkeypatch):
    """Dynamo's capture without the compiler behind it."""
    original = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda part, mode, **options: original(part, backend="eager", **options))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    yield
    torch._dynamo.reset()


@pytest.fixture
def trained(prepared, recorded, tmp_path):
    config = replace(prepared, stage=replace(prepared.stage, steps=1))
    assert api.train(config, output=tmp_path, init_from=recorded / "cosmos")
    return tmp_path


@pytest.mark.usefixtures("capture_alone")
def test_no_batch_is_compiled_late_by_either_of_two_policies(trained, observation):
    """A hot swap loads the second one beside the first. With 80 robots a part has nine sizes, and Dynamo's default limit is 8."""

    def ask(policy, count):
        observations = [replace(observation, instruction=f"go {row % 2}") for row in range(count)]
        requests = [PolicyRequest(observation=o, episode=policy.episode(row)) for row, o in enumerate(observations)]
        return np.stack([chunk.actions for chunk in policy.act_batch(requests)])

    plain = load_policy(trained, fast=False)
    for policy in (load_policy(trained, compiled=True) for _ in range(2)):
        policy.warm_up(16)
        for count in (1, 3, 5, 9, 16):
            np.testing.assert_allclose(ask(policy, count), ask(plain, count), atol=1e-5)
        assert policy.recompiles == 0
    policy.warm_up(80)
    np.testing.assert_allclose(ask(policy, 70), ask(plain, 70), atol=1e-5)
    assert policy.recompiles == 0
