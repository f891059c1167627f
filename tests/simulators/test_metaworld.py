"""The adapter with Meta-World, or with a stand-in if the package is not installed.

With the package: make env-metaworld, then .venv-metaworld/bin/python -m pytest --noconftest FILE.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agra.evaluation.results import read_results
from agra.evaluation.rollout import RecordedPolicy, run_episode
from agra.evaluation.task_groups import TASK_GROUPS
from agra.simulators.metaworld.metaworld_tasks import EPISODES, INSTRUCTIONS, training_trials, trials
from agra.simulators.registry import expert, make
from agra.types import ActionChunk, Simulator
from tests.support.outcomes import reproducible

COMMAND = [sys.executable, "-m", "agra.cli", "evaluate"]
INSTALLED = importlib.util.find_spec("metaworld") is not None
needs_metaworld = pytest.mark.skipif(not INSTALLED, reason="needs Meta-World itself: make env-metaworld")


@pytest.fixture(autouse=True)
def stand_in():
    """The stand-in, if Meta-World is not installed."""
    if INSTALLED:
        yield
        return
    pytest.importorskip("mujoco")
    import agra.simulators.tabletop  # noqa: F401  chooses how MuJoCo renders
    from tests.support.metaworld_stand_in import install

    modules = install()
    yield
    for name in (*modules, "agra.simulators.metaworld.metaworld_env"):
        sys.modules.pop(name, None)


def test_difficulties_cover_the_tasks():
    """The four groups of the SmolVLA paper: 28, 11, 6 and 5 tasks."""
    groups = TASK_GROUPS["metaworld"]
    assert [len(tasks) for tasks in groups.values()] == [28, 11, 6, 5]
    assert sorted(task for tasks in groups.values() for task in tasks) == sorted(INSTRUCTIONS)


def test_the_recipes_fit_the_rows():
    pytest.importorskip("torch")
    from agra.recipes import metaworld

    simulator, config = make("metaworld_20hz", render=False), metaworld()
    assert (simulator.embodiment.name,) == config.data.embodiments
    assert (config.data.crop_rows, config.data.crop_columns, simulator.frame_size) == ((48, 272), (96, 320), (320, 320))
    assert len(simulator.embodiment.action_names) == config.method.shapes.action_dim
    assert len(simulator.embodiment.state_names) == config.method.shapes.state_dim


def test_trials():
    listed = trials()
    assert len(INSTRUCTIONS) == 50
    assert len({trial.name for trial in listed}) == len(listed) == 50 * EPISODES
    assert {trial.simulator for trial in listed} == {"metaworld"}
    assert len({trial.seed for trial in listed}) == len(listed)  # no two trials share the policy's noise
    assert [trial.scene["seed"] for trial in listed] == [*range(EPISODES)] * 50
    demonstrated = training_trials(120, 0)
    assert [trial.task for trial in demonstrated[:50]] == list(INSTRUCTIONS)
    assert len({(trial.task, trial.seed) for trial in demonstrated}) == 120
    assert [trial.seed for trial in demonstrated] == [trial.scene["seed"] for trial in demonstrated]
    assert not {trial.seed for trial in demonstrated} & {trial.scene["seed"] for trial in listed}
    assert not {trial.seed for trial in demonstrated} & {trial.seed for trial in training_trials(120, 1)}


@pytest.fixture
def env():
    made = make("metaworld", frame_size=(96, 96))
    yield made
    made.close()


class Still:
    def reset(self, seed): ...

    def act(self, observation):
        return ActionChunk(actions=np.zeros((4, 4), np.float32))


def trial_of(task, episode=0):
    return next(trial for trial in trials() if (trial.task, trial.scene["seed"]) == (task, episode))


def test_contract(env):
    from agra.simulators.metaworld.metaworld_env import ENV_POLICY_MAP

    assert isinstance(env, Simulator)
    assert set(ENV_POLICY_MAP) == set(INSTRUCTIONS)
    first = env.reset(trial_of("drawer-open-v3"))
    assert first.frame.shape == (96, 96, 3)
    assert first.state.shape == (len(env.embodiment.state_names),) == (4,)
    assert first.instruction == "Open a drawer"
    step = env.step(np.array([0, 0, 1, -1.0]))
    assert step.observation.state[2] > first.state[2]
    assert not step.success
    mask = env.interaction_mask()
    assert mask.shape == (96, 96)
    assert 0.002 < mask.mean() < 0.4
    with pytest.raises(ValueError, match=r"action: expected \(4,\) finite numbers"):
        env.step(np.full(4, np.nan))


def test_settings_name_what_differs_from_the_suite(env):
    assert env.settings == {
        "camera": "corner2 at (0.75, 0.075, 0.7), both axes flipped",
        "frame_size": [96, 96],
        "render": True,
        "goal_in_state": False,
    }
    assert (env.fps, env.max_steps) == (80, 500)
    rows = registered_rows()
    assert rows.settings == env.settings | {
        "frame_size": [320, 320],
        "render": False,
        "control_stride": 4,
        "shadow_map": 1024,
    }
    assert (rows.name, rows.fps, rows.max_steps) == ("metaworld", 20, 125)


@pytest.mark.parametrize(
    ("options", "message"), [({"control_stride": 3}, "one of .*got 3"), ({"shadow_map": 0}, "1 texel")]
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: .*{message}"):
        make("metaworld", **options)


def registered_rows(**options):
    return make("metaworld_20hz", **{"render": False} | options)


def test_names_of_a_row():
    rows = registered_rows()
    names = rows.embodiment.action_names
    assert len(names) == 16
    assert names[:5] == ("hand_dx_step0", "hand_dy_step0", "hand_dz_step0", "gripper_effort_step0", "hand_dx_step1")
    assert names[-1] == "gripper_effort_step3"
    assert (rows.embodiment.name, len(rows.embodiment.state_names)) == ("sawyer_20hz", 4)


def test_a_row_is_four_steps(env):
    """The same actions one by one and four by four: the same states, and the same picture at the end of each row."""
    rows = registered_rows(render=True, frame_size=(96, 96), shadow_map=None)
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, (5, 16)).astype(np.float32)
    trial = trial_of("push-v3")
    first, again = env.reset(trial), rows.reset(trial)
    assert np.array_equal(first.frame, again.frame)
    for row in actions:
        steps = [env.step(action) for action in row.reshape(4, 4)]
        whole = rows.step(row)
        assert np.array_equal(env.full_observation, rows.full_observation)
        assert np.array_equal(steps[-1].observation.frame, whole.observation.frame)
        assert (whole.observation.state.shape, whole.observation.embodiment) == ((4,), "sawyer_20hz")
    rows.close()
    with pytest.raises(ValueError, match=r"action: expected \(16,\) finite numbers, got shape \(4,\)"):
        rows.step(np.zeros(4))


@pytest.mark.parametrize("task", ["reach-v3", "window-open-v3", "push-v3", "coffee-button-v3"])
def test_expert_in_rows_does_what_it_does_in_steps(env, task):
    """To the bit, and an episode ends at the same control step, wherever in its row that is."""
    env.render = False
    rows = registered_rows()
    steps = run_episode(expert(env), env, trial_of(task), execute_steps=1, record=False)
    whole = run_episode(expert(rows), rows, trial_of(task), execute_steps=1, record=False)
    assert steps.success
    assert whole.success
    assert len(whole) == -(-len(steps) // 4)
    assert np.array_equal(whole.states, steps.states[::4])
    assert np.array_equal(whole.actions.reshape(-1, 4)[: len(steps)], steps.actions)
    assert rows.env.curr_path_length == len(steps)  # what follows the success in its row is not executed
    assert np.array_equal(rows.full_observation, env.full_observation)


def test_these_experts_succeed_within_a_row():
    """The test before this one would prove little if every success were the last step of its row."""
    rows = registered_rows()
    ends = set()
    for task in ("reach-v3", "window-open-v3", "push-v3", "coffee-button-v3"):
        run_episode(expert(rows), rows, trial_of(task), execute_steps=1, record=False)
        ends.add(rows.env.curr_path_length % 4)
    assert len(ends) > 1


def test_a_rehearsal_leaves_no_trace():
    """Played with rehearsals between the rows and without, physics and success are the same."""
    rows, plain = registered_rows(), registered_rows()
    rng = np.random.default_rng(1)
    rows.reset(trial_of("pick-place-v3"))
    plain.reset(trial_of("pick-place-v3"))
    for _ in range(8):
        action = rng.uniform(-1, 1, 16).astype(np.float32)
        with rows.rehearsal() as env:
            for _ in range(7):
                env.step(rng.uniform(-1, 1, 4).astype(np.float32))
        assert rows.step(action).success == plain.step(action).success
        for name in ("qpos", "qvel", "qacc_warmstart", "mocap_pos", "time", "xpos"):
            assert np.array_equal(getattr(rows.env.data, name), getattr(plain.env.data, name)), name
        assert np.array_equal(rows.full_observation, plain.full_observation)
    assert rows.env.curr_path_length == 32


def test_an_episode_is_125_rows():
    rows = registered_rows()

    class Idle(Still):
        def act(self, observation):
            return ActionChunk(actions=np.zeros((4, 16), np.float32))

    played = run_episode(Idle(), rows, trial_of("assembly-v3"), execute_steps=4, record=False)
    assert (len(played), played.success, rows.env.curr_path_length) == (125, False, 500)


@needs_metaworld
def test_a_smaller_shadow_map_changes_next_to_nothing(env):
    small = make("metaworld", frame_size=(96, 96), shadow_map=1024)
    frames = [each.reset(trial_of("hammer-v3")).frame.astype(int) for each in (env, small)]
    small.close()
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 0.3


def test_noisy_demonstrations_keep_the_expert_s_actions(tmp_path):
    """Each row holds the expert's action in the noisy state, and the executed noise shows in the states."""
    from agra.cli.main import main
    from agra.data.lerobot.dataset import LeRobotDataset

    arguments = ["collect", "metaworld_20hz", "--per-task", "1", "--tasks", "reach-v3", "--workers", "1"]
    main([*arguments, "--output", str(tmp_path / "noisy"), "--noise", "hand_d*", "0.3"])
    dataset = LeRobotDataset(tmp_path / "noisy")
    episode = dataset.episode(0)
    assert episode.frames.shape[1:] == (320, 320, 3)
    assert (dataset.embodiment, dataset.fps) == ("sawyer_20hz", 20)
    rows = make("metaworld_20hz", render=False)
    clean = run_episode(expert(rows), rows, training_trials(50, 0)[40], execute_steps=1, record=False)
    assert clean.instruction == episode.instruction == "Reach a goal position"
    assert np.array_equal(episode.actions[0], clean.actions[0])
    assert not np.array_equal(episode.states[1], clean.states[1])
    assert set(np.unique(episode.actions[:, 3::4])) == set(np.unique(clean.actions[:, 3::4]))


@needs_metaworld
def test_frames_are_the_suite_s_own(env):
    """The frame of the suite's own renderer from that camera, turned upright."""
    env.reset(trial_of("reach-v3"))
    frame = env.step(np.zeros(4)).observation.frame
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    own = MujocoRenderer(env.env.model, env.env.data, width=96, height=96, camera_name="corner2")
    assert np.abs(frame.astype(int) - own.render("rgb_array")[::-1, ::-1]).max() <= 2
    own.close()


def test_same_trial_same_episode(env):
    """After another task and after another episode of its own."""
    digests = []
    for task, episode in (("push-v3", 3), ("drawer-open-v3", 0), ("push-v3", 4), ("push-v3", 3)):
        policy = RecordedPolicy(Still())
        played = run_episode(policy, env, trial_of(task, episode), execute_steps=4, max_steps=8, record=False)
        digests.append(policy.digest(played))
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("task", ["reach-v3", "window-open-v3"])
def test_expert(env, task):
    black = make("metaworld", render=False)
    assert run_episode(expert(black), black, trial_of(task), execute_steps=1, record=False).success


def evaluation(output, *, workers=1):
    """The command that plays six experts for 60 steps each."""
    arguments = [
        "expert",
        "--simulator",
        "metaworld",
        "--no-render",
        "--videos",
        "0",
        "--limit",
        "6",
        "--max-steps",
        "60",
    ]
    return [*COMMAND, *arguments, "--workers", str(workers), "--output", str(output)]


def outcomes(path):
    return [reproducible(trial) for trial in read_results(path).trials]


@needs_metaworld
def test_workers_and_kills_change_nothing(tmp_path):
    """One process; two, of which one is killed in an episode; and one that is killed and resumed."""
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
