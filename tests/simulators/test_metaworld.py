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


def test_settings_name_what_differs_from_the_suite(world):
    assert world.settings == {
        "camera": "corner2 at (0.75, 0.075, 0.7), both axes flipped",
        "frame_size": [96, 96],
        "blind": False,
        "goal_in_state": False,
    }
    assert (world.fps, world.max_steps) == (80, 500)
    rows = registered_rows()
    assert rows.settings == world.settings | {
        "frame_size": [320, 320],
        "blind": True,
        "control_stride": 4,
        "shadow_map": 1024,
    }
    assert (rows.name, rows.fps, rows.max_steps) == ("metaworld", 20, 125)


@pytest.mark.parametrize(
    ("options", "message"), [({"control_stride": 3}, "one of .*got 3"), ({"shadow_map": 0}, "1 texel")]
)
def test_refusals(options, message):
    pytest.importorskip("metaworld")
    from agra.simulators.registry import make

    with pytest.raises(ValueError, match=f"{next(iter(options))}: .*{message}"):
        make("metaworld", **options)


def registered_rows(**options):
    pytest.importorskip("metaworld")
    from agra.simulators.registry import make

    return make("metaworld_20hz", **{"blind": True} | options)


def test_names_of_a_row():
    rows = registered_rows()
    names = rows.embodiment.action_names
    assert len(names) == 16
    assert names[:5] == ("hand_dx_step0", "hand_dy_step0", "hand_dz_step0", "gripper_effort_step0", "hand_dx_step1")
    assert names[-1] == "gripper_effort_step3"
    assert (rows.embodiment.name, len(rows.embodiment.state_names)) == ("sawyer_20hz", 4)


def test_a_row_is_four_steps(world):
    """The same actions one by one and four by four: the same states, and the same picture at the end of each row."""
    rows = registered_rows(blind=False, frame_size=(96, 96), shadow_map=None)
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (5, 16)).astype(np.float32)
    trial = trial_of("push-v3")
    first, again = world.reset(trial), rows.reset(trial)
    assert np.array_equal(first.frame, again.frame)
    for row in actions:
        steps = [world.step(action) for action in row.reshape(4, 4)]
        whole = rows.step(row)
        assert np.array_equal(world.full_observation, rows.full_observation)
        assert np.array_equal(steps[-1].observation.frame, whole.observation.frame)
        assert (whole.observation.state.shape, whole.observation.embodiment) == ((4,), "sawyer_20hz")
    rows.close()
    with pytest.raises(ValueError, match=r"action: expected \(16,\) finite numbers, got shape \(4,\)"):
        rows.step(np.zeros(4))


@pytest.mark.parametrize("task", ["reach-v3", "window-open-v3", "push-v3", "coffee-button-v3"])
def test_expert_in_rows_does_what_it_does_in_steps(world, task):
    """To the bit, and an episode ends at the same control step, wherever in its row that is."""
    from agra.simulators.registry import expert

    world.blind = True
    rows = registered_rows()
    steps = run_episode(expert(world), world, trial_of(task), execute_steps=1, record=False)
    whole = run_episode(expert(rows), rows, trial_of(task), execute_steps=1, record=False)
    assert steps.success
    assert whole.success
    assert len(whole) == -(-len(steps) // 4)
    assert np.array_equal(whole.states, steps.states[::4])
    assert np.array_equal(whole.actions.reshape(-1, 4)[: len(steps)], steps.actions)
    assert rows.world.curr_path_length == len(steps)  # what follows the success in its row is not executed
    assert np.array_equal(rows.full_observation, world.full_observation)


def test_these_experts_succeed_within_a_row():
    """The test before this one would prove little if every success were the last step of its row."""
    from agra.simulators.registry import expert

    rows = registered_rows()
    ends = set()
    for task in ("reach-v3", "window-open-v3", "push-v3", "coffee-button-v3"):
        run_episode(expert(rows), rows, trial_of(task), execute_steps=1, record=False)
        ends.add(rows.world.curr_path_length % 4)
    assert len(ends) > 1


def test_a_rehearsal_leaves_no_trace():
    """Played with rehearsals between the rows and without, physics and success are the same."""
    rows, plain = registered_rows(), registered_rows()
    rng = np.random.default_rng(1)
    rows.reset(trial_of("pick-place-v3"))
    plain.reset(trial_of("pick-place-v3"))
    for _ in range(8):
        action = rng.uniform(-1, 1, 16).astype(np.float32)
        with rows.rehearsal() as world:
            for _ in range(7):
                world.step(rng.uniform(-1, 1, 4).astype(np.float32))
        assert rows.step(action).success == plain.step(action).success
        for name in ("qpos", "qvel", "qacc_warmstart", "mocap_pos", "time", "xpos"):
            assert np.array_equal(getattr(rows.world.data, name), getattr(plain.world.data, name)), name
        assert np.array_equal(rows.full_observation, plain.full_observation)
    assert rows.world.curr_path_length == 32


def test_an_episode_is_125_rows():
    rows = registered_rows()

    class Idle(Still):
        def act(self, observation):
            return ActionChunk(actions=np.zeros((4, 16), np.float32))

    played = run_episode(Idle(), rows, trial_of("assembly-v3"), execute_steps=4, record=False)
    assert (len(played), played.success, rows.world.curr_path_length) == (125, False, 500)


def test_a_smaller_shadow_map_changes_next_to_nothing(world):
    from agra.simulators.registry import make

    small = make("metaworld", frame_size=(96, 96), shadow_map=1024)
    frames = [each.reset(trial_of("hammer-v3")).frame.astype(int) for each in (world, small)]
    small.close()
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 0.3


def test_noisy_demonstrations_keep_the_expert_s_actions(tmp_path):
    """Each row holds what the expert would do from the noisy state, and the executed noise is in the states."""
    pytest.importorskip("metaworld")
    from agra.cli.main import main
    from agra.data.lerobot.dataset import LeRobotDataset
    from agra.simulators.registry import expert, make

    arguments = ["collect", "metaworld_20hz", "--per-task", "1", "--tasks", "reach-v3", "--workers", "1"]
    main([*arguments, "--output", str(tmp_path / "noisy"), "--noise", "hand_d*", "0.3"])
    dataset = LeRobotDataset(tmp_path / "noisy")
    episode = dataset.episode(0)
    assert episode.frames.shape[1:] == (320, 320, 3)
    assert (dataset.embodiment, dataset.fps) == ("sawyer_20hz", 20)
    rows = make("metaworld_20hz", blind=True)
    clean = run_episode(expert(rows), rows, training_trials(50, 0)[40], execute_steps=1, record=False)
    assert clean.instruction == episode.instruction == "Reach a goal position"
    assert np.array_equal(episode.actions[0], clean.actions[0])
    assert not np.array_equal(episode.states[1], clean.states[1])
    assert set(np.unique(episode.actions[:, 3::4])) == set(np.unique(clean.actions[:, 3::4]))


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
    arguments = ["expert", "--simulator", "metaworld", "--no-render", "--videos", "0", "--limit", "6", "--max-steps", "60"]
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
