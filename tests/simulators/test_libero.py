"""The numbers of LIBERO's suites, and with the package the suites: .venv-libero/bin/python -m pytest --noconftest FILE."""

import numpy as np
import pytest

from agra.evaluation.rollout import run_episode
from agra.simulators.libero.suites import MAX_STEPS, PERTURBATIONS, regimes
from agra.types import ActionChunk, Simulator


def test_suites():
    assert MAX_STEPS == {
        "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
    }  # fmt: skip
    assert regimes("libero_90") == ("in_distribution",)
    assert (
        regimes("libero_object")
        == tuple(PERTURBATIONS)
        == ("in_distribution", "language", "object", "position", "task")
    )


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("libero")
    from agra.simulators.registry import make

    made = make("libero_object", frame_size=(64, 64))
    yield made
    made.close()


def test_trials(env):
    assert isinstance(env, Simulator)
    for regime in env.regimes:
        listed = env.trials(regime)
        assert len({trial.name for trial in listed}) == len(listed) == 500
        assert len({trial.seed for trial in listed}) == 500  # no two trials share the policy's noise
    standard, language, task = (env.trials(r)[0].instruction for r in ("in_distribution", "language", "task"))
    assert standard == "pick up the alphabet soup and place it in the basket"
    assert language == "grab alphabet soup and put it into basket"
    assert "cream cheese" in task


def test_episode(env):
    """The official initial state, after which nothing moves; the same trial gives the same picture again."""
    trial = env.trials("in_distribution")[3]
    first = env.reset(trial)
    assert first.frame.shape == first.views["wrist"].shape == (64, 64, 3)
    assert first.state.shape == (8,)
    assert first.state[3] == pytest.approx(np.pi, abs=0.1)  # the hand points down
    step = env.step(np.array([0, 0, 1, 0, 0, 0, -1.0]), render=False)
    assert step.observation.frame.size == 0
    again = env.reset(trial)
    assert np.array_equal(again.frame, first.frame)
    assert np.array_equal(again.state, first.state)
    assert 0.002 < env.interaction_mask().mean() < 0.4
    with pytest.raises(ValueError, match="unknown regime 'env'"):
        env.trials("env")


def test_pictures_and_states_are_those_of_the_package_s_own_protocol(env):
    """An episode as openpi's evaluation has it: the package's environment with camera observations."""
    from libero.libero.envs import OffScreenRenderEnv

    from agra.simulators.libero.libero_env import _bddl, _suite

    first = env.reset(env.trials("in_distribution")[3])
    suite = _suite("libero_object")
    own = OffScreenRenderEnv(bddl_file_name=str(_bddl(suite.get_task(0))), camera_heights=64, camera_widths=64)
    own.seed(7)
    own.reset()
    raw = own.set_init_state(suite.get_task_init_states(0)[3])
    for _ in range(10):
        raw, *_ = own.step([0.0] * 6 + [-1.0])
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 7))
    ours = [first, *(env.step(action, render=index % 2 == 1).observation for index, action in enumerate(actions))]
    theirs = [raw, *(own.step(action)[0] for action in actions)]
    own.close()
    for step, (ours_at, theirs_at) in enumerate(zip(ours, theirs, strict=True)):
        assert np.allclose(theirs_at["robot0_eef_pos"], ours_at.state[:3], atol=1e-6)
        if step % 2:
            assert ours_at.frame.size == 0  # not rendered
            continue
        assert np.array_equal(theirs_at["agentview_image"][::-1, ::-1], ours_at.frame)
        assert np.array_equal(theirs_at["robot0_eye_in_hand_image"][::-1, ::-1], ours_at.views["wrist"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "regime"),
    [(name, "in_distribution") for name in MAX_STEPS]
    + [("libero_goal", regime) for regime in tuple(PERTURBATIONS)[1:]],
)
def test_every_suite_and_axis_plays(name, regime, tmp_path):
    """A short episode of random actions; the pictures are kept, to be looked at."""
    pytest.importorskip("libero")
    from PIL import Image

    from agra.simulators.registry import make

    class Random:
        def reset(self, seed):
            self.rng = np.random.default_rng(seed)

        def act(self, observation):
            return ActionChunk(actions=self.rng.uniform(-1, 1, (8, 7)).astype(np.float32))

    env = make(name)
    trial = env.trials(regime)[0]
    episode = run_episode(Random(), env, trial, execute_steps=8, max_steps=16)
    env.close()
    assert len(episode) == 16
    assert episode.instruction == trial.instruction
    assert episode.frames[0].std() > 10
    assert not np.array_equal(episode.frames[0], episode.frames[-1])
    Image.fromarray(np.concatenate([episode.frames[0], episode.frames[-1]], axis=1)).save(tmp_path / "frames.png")


def test_axis_angle():
    pytest.importorskip("libero")
    from agra.simulators.libero.libero_env import axis_angle

    assert axis_angle(np.array([0, 0, 0, 1.0])).tolist() == [0, 0, 0]
    assert np.allclose(axis_angle(np.array([1.0, 0, 0, 0])), [np.pi, 0, 0])
    assert np.allclose(axis_angle(np.array([0, 0, np.sqrt(0.5), -np.sqrt(0.5)])), [0, 0, 1.5 * np.pi])
