"""Checks of a trained method that hold for every method: resumed, served, and evaluated in the world of points."""

import numpy as np
import torch
from safetensors.torch import load_file

from agra.api import train
from agra.checkpoints.folder import newest
from agra.cli.main import main
from agra.evaluation.results import read_results
from agra.evaluation.rollout import RecordedPolicy, run_episode
from agra.serving.client import PolicyClient
from agra.simulators.registry import SUITES, Suite
from tests.support.echo import running
from tests.support.point_world import Expert, PointWorld, make_trial


def check_resumed(run, config, folder, *, step, parts):
    """A run that continues from the checkpoint of `step` ends with the same bits in `parts` and in the optimiser."""
    folder.mkdir()
    middle = run / f"step_{step:06d}"
    (folder / middle.name).symlink_to(middle)
    assert train(config, output=folder)
    for name in (*parts, "optimizer"):
        whole, resumed = (load_file(newest(place) / f"{name}.safetensors") for place in (run, folder))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def check_served_chunk(policy):
    """A client of the websocket gets the policy's own first chunk."""
    observation = PointWorld().reset(make_trial("t", "in_distribution", 3))
    with running(policy) as server:
        server.call(server.service.start())
        client = PolicyClient(server.address)
        np.testing.assert_array_equal(client.act(observation).actions, policy.act(observation).actions)
        client.close()


def check_served_episode(policy):
    """An episode through the websocket has the digest of one with the policy itself."""
    trial, digests = make_trial("t", "in_distribution", 3, reachable=False), []
    with running(policy) as server:
        server.call(server.service.start())
        client = PolicyClient(server.address)
        for player in (policy, client):
            recorded = RecordedPolicy(player)
            episode = run_episode(recorded, PointWorld(), trial, execute_steps=2, max_steps=8, record=False)
            digests.append(recorded.digest(episode))
        client.close()
    assert digests[0] == digests[1]


def check_evaluated_by_name(run, monkeypatch, capsys):
    """`agra evaluate` plays a run's policy in a simulator that it opens by name."""
    monkeypatch.setitem(SUITES, "point", Suite(make=PointWorld, install="", expert=Expert))
    main(["evaluate", str(run), "--simulator", "point", "--limit", "2", "--videos", "0"])
    assert len(read_results(run / "results.jsonl").trials) == 8
    assert "in_distribution" in capsys.readouterr().out
