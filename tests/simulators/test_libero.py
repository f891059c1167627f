"""The suites' numbers here; the worlds in their own environment: .venv-libero/bin/python -m pytest --noconftest FILE."""

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
def world():
    pytest.importorskip("libero")
    from agra.simulators.registry import make

    made = make("libero_object", frame_size=(64, 64))
    yield made
    made.close()


def test_trials(world):
    assert isinstance(world, Simulator)
    for regime in world.regimes:
        listed = world.trials(regime)
        assert len({trial.name for trial in listed}) == len(listed) == 500
    standard, language, task = (world.trials(r)[0].instruction for r in ("in_distribution", "language", "task"))
    assert standard == "pick up the alphabet soup and place it in the basket"
    assert language == "grab alphabet soup and put it into basket"
    assert "cream cheese" in task


def test_episode(world):
    """The official initial state, after which nothing moves; the same trial gives the same picture again."""
    trial = world.trials("in_distribution")[3]
    first = world.reset(trial)
    assert first.frame.shape == first.views["wrist"].shape == (64, 64, 3)
    assert first.state.shape == (8,)
    assert first.state[3] == pytest.approx(np.pi, abs=0.1)  # the hand points down
    step = world.step(np.array([0, 0, 1, 0, 0, 0, -1.0]), render=False)
    assert step.observation.frame.size == 0
    again = world.reset(trial)
    assert np.array_equal(again.frame, first.frame)
    assert np.array_equal(again.state, first.state)
    assert 0.002 < world.interaction_mask().mean() < 0.4
    with pytest.raises(ValueError, match="unknown regime 'env'"):
        world.trials("env")


def test_pictures_and_states_are_those_of_the_package_s_own_protocol(world):
    """An episode as openpi's evaluation has it: the package's environment with camera observations."""
    from libero.libero.envs import OffScreenRenderEnv

    from agra.simulators.libero.environment import _bddl, _suite

    first = world.reset(world.trials("in_distribution")[3])
    suite = _suite("libero_object")
    own = OffScreenRenderEnv(bddl_file_name=str(_bddl(suite.get_task(0))), camera_heights=64, camera_widths=64)
    own.seed(7)
    own.reset()
    seen = own.set_init_state(suite.get_task_init_states(0)[3])
    for _ in range(10):
        seen, *_ = own.step([0.0] * 6 + [-1.0])
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 7))
    ours = [first, *(world.step(action, render=index % 2 == 1).observation for index, action in enumerate(actions))]
    theirs = [seen, *(own.step(action)[0] for action in actions)]
    own.close()
    for step, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert np.allclose(wanted["robot0_eef_pos"], found.state[:3], atol=1e-6)
        if step % 2:
            assert found.frame.size == 0  # nobody looked
            continue
        assert np.array_equal(wanted["agentview_image"][::-1, ::-1], found.frame)
        assert np.array_equal(wanted["robot0_eye_in_hand_image"][::-1, ::-1], found.views["wrist"])


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

    world = make(name)
    trial = world.trials(regime)[0]
    episode = run_episode(Random(), world, trial, execute_steps=8, max_steps=16)
    world.close()
    assert len(episode) == 16
    assert episode.instruction == trial.instruction
    assert episode.frames[0].std() > 10
    assert not np.array_equal(episode.frames[0], episode.frames[-1])
    Image.fromarray(np.concatenate([episode.frames[0], episode.frames[-1]], axis=1)).save(tmp_path / "frames.png")


def test_axis_angle():
    pytest.importorskip("libero")
    from agra.simulators.libero.environment import axis_angle

    assert axis_angle(np.array([0, 0, 0, 1.0])).tolist() == [0, 0, 0]
    assert np.allclose(axis_angle(np.array([1.0, 0, 0, 0])), [np.pi, 0, 0])
    assert np.allclose(axis_angle(np.array([0, 0, np.sqrt(0.5), -np.sqrt(0.5)])), [0, 0, 1.5 * np.pi])
