"""The trial lists here; the worlds in their own environment: .venv-metaworld/bin/python -m pytest --noconftest FILE."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agra.evaluation.results import read_results
from agra.evaluation.rollout import WatchedPolicy, run_episode
from agra.simulators.metaworld.tasks import EPISODES, INSTRUCTIONS, training_trials, trials
from agra.types import ActionChunk, Simulator

COMMAND = [sys.executable, "-m", "agra.cli", "evaluate"]


def test_trials():
    listed = trials()
    assert len(INSTRUCTIONS) == 50
    assert len({trial.name for trial in listed}) == len(listed) == 50 * EPISODES
    assert {trial.simulator for trial in listed} == {"metaworld"}
    demonstrated = training_trials(120, 0)
    assert [trial.task for trial in demonstrated[:50]] == list(INSTRUCTIONS)
    assert len({(trial.task, trial.seed) for trial in demonstrated}) == 120
    assert not {trial.seed for trial in demonstrated} & {trial.seed for trial in listed}
    assert not {trial.seed for trial in demonstrated} & {trial.seed for trial in training_trials(120, 1)}


@pytest.fixture
def world():
    pytest.importorskip("metaworld")
    from agra.simulators.registry import make

    made = make("metaworld", frame_size=(96, 96))
    yield made
    made.close()


class Still:
    def reset(self, seed): ...

    def act(self, observation):
        return ActionChunk(actions=np.zeros((4, 4), np.float32))


def trial_of(task, episode=0):
    return next(trial for trial in trials() if (trial.task, trial.seed) == (task, episode))


def test_contract(world):
    from agra.simulators.metaworld.environment import ENV_POLICY_MAP

    assert isinstance(world, Simulator)
    assert set(ENV_POLICY_MAP) == set(INSTRUCTIONS)
    first = world.reset(trial_of("drawer-open-v3"))
    assert first.frame.shape == (96, 96, 3)
    assert first.state.shape == (len(world.embodiment.state_names),) == (4,)
    assert first.instruction == "Open a drawer"
    step = world.step(np.array([0, 0, 1, -1.0]))
    assert step.observation.state[2] > first.state[2]
    assert not step.success
    mask = world.interaction_mask()
    assert mask.shape == (96, 96)
    assert 0.002 < mask.mean() < 0.4
    with pytest.raises(ValueError, match=r"action: expected \(4,\) finite numbers"):
        world.step(np.full(4, np.nan))


def test_frames_are_the_suite_s_own(world):
    """What the suite's own renderer shows from that camera, turned upright."""
    world.reset(trial_of("reach-v3"))
    frame = world.step(np.zeros(4)).observation.frame
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    own = MujocoRenderer(world.world.model, world.world.data, width=96, height=96, camera_name="corner2")
    assert np.abs(frame.astype(int) - own.render("rgb_array")[::-1, ::-1]).max() <= 2
    own.close()


def test_same_trial_same_episode(world):
    """After another task and after another episode of its own."""
    digests = []
    for task, episode in (("push-v3", 3), ("drawer-open-v3", 0), ("push-v3", 4), ("push-v3", 3)):
        policy = WatchedPolicy(Still())
        played = run_episode(policy, world, trial_of(task, episode), execute_steps=4, max_steps=8, record=False)
        digests.append(policy.digest(played))
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("task", ["reach-v3", "window-open-v3"])
def test_expert(world, task):
    from agra.simulators.registry import expert, make

    blind = make("metaworld", blind=True)
    assert run_episode(expert(blind), blind, trial_of(task), execute_steps=1, record=False).success


def evaluation(output, *, workers=1):
    """The command that plays six experts for 60 steps each."""
    arguments = ["expert", "--simulator", "metaworld", "--blind", "--videos", "0", "--limit", "6", "--max-steps", "60"]
    return [*COMMAND, *arguments, "--workers", str(workers), "--output", str(output)]


def outcomes(path):
    return [trial.same_outcome() for trial in read_results(path).trials]


def test_workers_and_kills_change_nothing(tmp_path):
    """One process; two, of which one is killed in an episode; and one killed as a whole, then resumed."""
    pytest.importorskip("metaworld")
    subprocess.run(evaluation(tmp_path / "one"), check=True)

    run = subprocess.Popen(evaluation(tmp_path / "two", workers=2))
    kill_after_a_line(tmp_path / "two", run, worker_of(run))
    assert run.wait() == 0
    assert [why for trial in read_results(tmp_path / "two").trials for why in trial.failures] == ["its process died"]

    run = subprocess.Popen(evaluation(tmp_path / "three"))
    kill_after_a_line(tmp_path / "three", run, lambda: run.pid)
    assert run.wait() == -signal.SIGKILL
    assert 1 <= len(read_results(tmp_path / "three", partial=True).trials) < 6
    subprocess.run(evaluation(tmp_path / "three"), check=True)

    assert outcomes(tmp_path / "one") == outcomes(tmp_path / "two") == outcomes(tmp_path / "three")


def kill_after_a_line(path, run, victim):
    while run.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 1):
        time.sleep(0.02)
    os.kill(victim(), signal.SIGKILL)


def worker_of(run):
    def find():
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())

    return find
