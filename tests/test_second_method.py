"""A second method in one file: a linear policy on the state. Everything around methods must take it as it is."""

import json
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from agra.api import diagnose, prepare, report, train
from agra.checkpoints.folder import newest, resolve
from agra.checkpoints.read import read_config
from agra.cli.main import main
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.diagnostics.record import read_diagnosis
from agra.evaluation.collect import collect
from agra.evaluation.results import read_results
from agra.methods.method import Losses, Method, MethodConfig, Needs, Shapes
from agra.methods.table import METHODS
from agra.policies.load import load_policy
from agra.serving.client import PolicyClient
from agra.simulators.registry import SUITES, Suite
from agra.stages import Stage, StageConfig
from agra.training.plan import Machines, plan
from tests.support.echo import running
from tests.support.point_world import Expert, PointWorld, demonstrator, make_trial
from tests.support.two_ranks import train_in_two_ranks


@dataclass(frozen=True, kw_only=True)
class LinearConfig(MethodConfig):
    """Actions as a linear function of the state."""

    kind: Literal["linear"] = "linear"
    state_dim: int = 2
    action_dim: int = 2
    horizon: int = 4

    @property
    def shapes(self):
        return Shapes(
            frame_size=(32, 48), horizon=self.horizon, state_dim=self.state_dim, action_dim=self.action_dim,
            num_embodiments=1,
        )  # fmt: skip

    def needs(self):
        return Needs(instruction=False)

    def needs_to_act(self):
        return Needs(instruction=False)

    @property
    def part_names(self):
        return ("head",)

    def build(self):
        return Linear(self)


class Linear(Method):
    """Least squares by gradient descent."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head = nn.Linear(config.state_dim, config.horizon * config.action_dim)

    def parts(self):
        return {"head": self.head}

    def blocks(self):
        return [self.head]

    def loss(self, batch, denominators=None):
        error = (self._actions(batch.state) - batch.actions).square() * batch.action_mask
        loss = error.sum() / (batch.action_mask.sum() if denominators is None else denominators["actions"])
        return Losses(total=loss, terms={"action": loss})

    def noise_shapes(self):
        return {}

    def act(self, inputs, noise, *, steps=None, continuation=None):
        return self._actions(inputs.state)

    def _actions(self, state):
        return self.head(state).unflatten(-1, (self.config.horizon, self.config.action_dim))


METHODS["linear"] = LinearConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 40 steps with a checkpoint every 20, and its config."""
    folder = tmp_path_factory.mktemp("linear")
    collect("point", folder / "demonstrations", episodes=12, seed=0, demonstrator=demonstrator, progress=False)
    config = RunConfig(
        method=LinearConfig(),
        data=DataConfig(path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",)),
        stage=StageConfig(steps=40, batch_size=64, learning_rate=0.05, save_every=20, validate_every=20, log_every=1),
    )
    assert prepare(config) == []  # it reads no frozen features
    assert train(config, output=folder / "run")
    return folder / "run", config


def weights(run):
    return load_file(resolve(run) / "head.safetensors")


def test_it_learns_and_its_checkpoint_describes_itself(trained):
    run, config = trained
    rows = map(json.loads, (run / "metrics.jsonl").open())
    losses = [row["action_loss"] for row in rows if "action_loss" in row]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * losses[0]  # the goal is not in the state, so the loss stays above 0
    assert read_config(resolve(run)) == config
    assert set(weights(run)) == {"head.weight", "head.bias"}


def test_it_resumes_bit_for_bit(trained, tmp_path):
    run, config = trained
    assert train(config, output=tmp_path / "a")
    last = newest(tmp_path / "a")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert newest(tmp_path / "a").name != last.name
    assert train(config, output=tmp_path / "a")
    whole = weights(run)
    assert all(torch.equal(whole[name], value) for name, value in weights(tmp_path / "a").items())


def test_two_ranks_train_what_one_process_trains(trained, tmp_path):
    run, config = trained
    train_in_two_ranks(config, tmp_path / "run", module="tests.test_second_method")
    sharded, whole = load_policy(tmp_path / "run"), load_policy(run)
    for name, value in whole.method.state_dict().items():
        torch.testing.assert_close(sharded.method.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_it_is_served(trained):
    run, _ = trained
    policy = load_policy(run)
    observation = PointWorld().reset(make_trial("t", "in_distribution", 3))
    with running(policy) as server:
        server.call(server.service.start())
        client = PolicyClient(server.address)
        assert client.spec.horizon == 4
        np.testing.assert_array_equal(client.act(observation).actions, policy.act(observation).actions)
        client.close()


def test_it_is_evaluated_by_name(trained, monkeypatch, capsys):
    run, _ = trained
    monkeypatch.setitem(SUITES, "point", Suite(make=PointWorld, install="", expert=Expert))
    main(["evaluate", str(run), "--simulator", "point", "--limit", "2", "--videos", "0"])
    results = read_results(run / "results.jsonl")
    assert len(results.trials) == 8
    assert "in_distribution" in capsys.readouterr().out


def test_it_is_planned(trained):
    _, config = trained
    assert plan(config, Machines(gpus=1, gpu_memory=80)).hours < 1


def test_instruments_do_not_apply(trained, monkeypatch, tmp_path):
    """An instrument that the method cannot offer is named as not applicable. It never reports zero."""
    run, config = trained
    monkeypatch.setitem(SUITES, "point", Suite(make=PointWorld, install="", expert=Expert))
    read = read_diagnosis(diagnose(run, simulator="point", samples=4))
    assert set(read.header["not_applicable"]) == {
        "attention", "interventions", "hidden_states", "text_attention", "imagination"
    }  # fmt: skip
    assert all(row["in_mask_ratio"] is row["deviation"] is row["psnr"] is None for row in read.rows)
    assert all(row["action_error"] > 0 for row in read.rows)
    assert "not applicable" in report([run], output=tmp_path / "report.html").read_text()
    monitored = replace(config, monitor=replace(config.monitor, probes=str(tmp_path)))
    with pytest.raises(ValueError, match=r"monitor\.probes: not applicable to the method linear"):
        train(monitored, output=tmp_path / "run")


def test_a_stage_that_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="linear: expected the joint stage, the only one of this method, got adapt"):
        RunConfig(method=LinearConfig(), data=DataConfig(), stage=StageConfig(name=Stage.ADAPT))
