"""The expert's decisions in a scene without dynamics, and with the package in the suite itself."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from agra.evaluation.rollout import run_episode
from agra.simulators import registry
from agra.simulators.libero.libero_expert import OPEN, GraspScene, decide, grasp

DOWN = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
UNIT = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), axis=-1).reshape(1, 8, 3)


class Floor:
    """A hand that goes a third of the way that it is told, fingers that stop at what is between them, a box, a basket."""

    def __init__(self, half, at, yaw):
        self.half = np.array(half)
        self.hand, self.rotation, self.opening = np.array([-0.15, 0.0, 0.25]), DOWN.copy(), 0.079
        self.thing, self.turned = np.array([*at, half[2]]), Rotation.from_rotvec([0, 0, yaw])
        self.held = False

    def scene(self):
        return GraspScene(
            hand=self.hand.copy(),
            rotation=self.rotation,
            opening=self.opening,
            held=self.held,
            position=self.thing.copy(),
            corners=self.thing + self.turned.apply((UNIT * self.half)[0])[None],
            obstacles=0.12,
            basket=np.array([0.0, 0.26]),
            rim=0.14,
        )

    def between(self):
        """Width of the thing between the fingers, None where it is not there or does not fit."""
        axis = self.turned.inv().apply(self.rotation[:, 0])
        offset = self.turned.inv().apply(self.hand - self.thing)
        width = 2 * float(np.abs(axis) @ self.half)
        inside = np.all(np.abs(offset) < self.half) and abs(offset @ axis) < 0.04 - width / 2
        return width if inside else None

    def step(self, action):
        assert action.shape == (7,)
        assert np.all(np.abs(action) <= 1)
        move = action[:3] * 0.05 / 3
        self.hand += move
        self.thing += move if self.held else 0
        self.rotation = Rotation.from_rotvec(action[3:6] * 0.5 / 3).as_matrix() @ self.rotation
        assert self.hand[2] > 0.01  # never into the floor
        width = self.between()
        stop = 0.0 if width is None else width
        if action[6] == OPEN:
            self.opening, self.held = min(self.opening + 0.02, 0.079), False
        else:
            self.opening = max(self.opening - 0.02, stop)
            self.held = width is not None and self.opening == stop
        if not self.held:
            self.thing[2] = max(self.thing[2] - 0.05, self.half[2])

    @property
    def in_basket(self):
        return bool(np.all(np.abs(self.thing[:2] - [0, 0.26]) < 0.06) and self.thing[2] < 0.14)


@pytest.mark.parametrize("yaw", [0.0, 0.8, -1.3])
@pytest.mark.parametrize("half", [(0.02, 0.03, 0.07), (0.05, 0.025, 0.015), (0.03, 0.03, 0.038)])
def test_into_the_basket(half, yaw):
    env = Floor(half, at=(0.05, -0.2), yaw=yaw)
    lifted = False
    for _ in range(200):
        env.step(decide(env.scene()))
        lifted = lifted or env.thing[2] - half[2] > 0.14
        if env.in_basket and not env.held:
            break
    assert env.in_basket
    assert lifted
    assert env.opening > 0.07 or env.opening > 2 * min(half[:2])  # it let go


def test_it_does_not_close_again_on_what_it_let_go():
    env = Floor((0.02, 0.03, 0.07), at=(0.0, 0.26), yaw=0.0)
    env.thing[2], env.hand, env.opening = 0.19, np.array([0.0, 0.26, 0.23]), 0.05
    assert not env.held
    assert decide(env.scene())[6] == OPEN
    assert np.allclose(decide(env.scene())[:3], 0)


def test_it_recovers_when_the_thing_slips_out():
    env = Floor((0.02, 0.03, 0.07), at=(0.05, -0.2), yaw=0.3)
    slipped = False
    for _ in range(260):
        env.step(decide(env.scene()))
        if not slipped and env.held and env.thing[2] > 0.15:
            slipped, env.held = True, False
            env.opening, env.thing = 0.0, np.array([0.1, -0.1, 0.07])
        if env.in_basket:
            break
    assert slipped
    assert env.in_basket


def test_grasp_is_across_the_narrow_side_below_the_top_and_above_the_floor():
    for half, yaw in [((0.05, 0.02, 0.07), 0.5), ((0.05, 0.02, 0.01), -0.9)]:
        point, axis, width = grasp(Floor(half, at=(0.1, 0.1), yaw=yaw).scene())
        narrow = np.array([-np.sin(yaw), np.cos(yaw), 0])
        assert abs(axis @ narrow) > np.cos(np.deg2rad(5))
        assert width == pytest.approx(0.04, abs=0.01)
        assert np.allclose(point[:2], 0.1)
        assert point[2] == pytest.approx(max(2 * half[2] - 0.03, half[2], 0.014))


def test_only_libero_object_has_one():
    assert registry.suite("libero_object").expert is not None
    assert registry.suite("libero_object").demonstrations is not None
    for name in ("libero_spatial", "libero_goal", "libero_10", "libero_90"):
        assert registry.suite(name).expert is None
        assert registry.suite(name).demonstrations is None


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("libero")
    made = registry.make("libero_object", render=False)
    yield made
    made.close()


def test_it_sees_the_scene(env):
    from agra.simulators.libero.libero_expert import read_scene

    env.reset(env.trials("in_distribution")[0])
    scene = read_scene(env)
    pads = [env.env.sim.data.get_geom_xpos(f"gripper0_finger{i}_pad_collision") for i in (1, 2)]
    apart = pads[1] - pads[0]
    assert abs(scene.rotation[:, 0] @ apart) > 0.99 * np.linalg.norm(apart)
    assert scene.rotation[2, 2] < -0.99
    assert not scene.held
    assert abs(scene.corners[..., 2].min()) < 0.003  # the thing stands on the floor
    assert np.all(scene.corners.reshape(-1, 3).min(0) < scene.position)
    assert np.all(scene.position < scene.corners.reshape(-1, 3).max(0))
    assert 0.13 < scene.rim < 0.15


def test_an_official_trial_and_a_demonstration(env):
    training = registry.suite("libero_object").demonstrations.trials(12, 0)
    assert [trial.task for trial in training[:10]] == [t.task for t in env.trials("in_distribution")[::50]]
    assert len({(trial.task, trial.seed) for trial in training}) == 12
    for trial in (env.trials("in_distribution")[7], training[0], training[10]):
        episode = run_episode(registry.expert(env), env, trial, execute_steps=1, record=False)
        assert episode.success
        assert episode.actions[-1, 6] == OPEN
    states = [env.reset(training[index]).state for index in (0, 10, 0)]
    assert np.array_equal(states[0], states[2])


def test_another_goal(env):
    from agra.simulators.libero.libero_expert import read_scene

    env.reset(env.trials("in_distribution")[0])
    env.env.env.parsed_problem["goal_state"].append(["open", "basket_1"])
    with pytest.raises(ValueError, match="puts one object into a container"):
        read_scene(env)
