"""Objects moved by hand: pixels and points of the table agree with what is rendered, and no move goes into something."""

import numpy as np
import pytest

from agra.simulators.tabletop.placement import moved, pixels, table_point
from agra.simulators.tabletop.tabletop_env import Tabletop
from agra.simulators.tabletop.tabletop_tasks import tasks_of, trials


@pytest.fixture(scope="module")
def env():
    simulator = Tabletop()
    yield simulator
    simulator.close()


@pytest.fixture
def scene(env):
    """A banana, an apple, a can and a box."""
    env.reset(trials("semantic")[0])
    return env.scene


def test_the_camera_sees_objects_where_they_are_projected(env, scene):
    for name in scene.items:
        mask = env._mask(name)
        column, row = pixels(scene, scene.position(name)[None], env.frame_size)[0].round().astype(int)
        assert mask[row, column]
        assert env.object_at(column, row) == name
    assert env.object_at(0, 0) is None


def test_a_pixel_and_its_point_of_the_table_are_inverse(env, scene):
    for column, row in ((3.0, 5.0), (112.0, 64.0), (200.5, 100.25)):
        point = table_point(scene, column, row, env.frame_size)
        back = pixels(scene, np.array([[*point, 0.0]]), env.frame_size)
        np.testing.assert_allclose(back[0], (column, row), atol=1e-9)


def test_a_moved_object_is_there_and_the_scene_is_as_it_was(env, scene):
    before = scene.data.qpos.copy(), scene.data.mocap_pos.copy(), scene.data.qacc_warmstart.copy()
    after = moved(scene, "can", (0.0, 0.02))
    for old, new in zip(before, (scene.data.qpos, scene.data.mocap_pos, scene.data.qacc_warmstart), strict=True):
        np.testing.assert_array_equal(old, new)
    scene.data = after
    env.step(env.hands.rest)
    np.testing.assert_allclose(scene.position("can")[:2], (0.0, 0.02), atol=0.003)
    assert scene.touching("can") == {"world"}
    scene.data = moved(scene, "box", (-0.05, 0.12))
    np.testing.assert_allclose(scene.position("box")[:2], (-0.05, 0.12))


def test_moves_into_things_and_off_the_table_are_refused(env, scene):
    apple, hand = scene.position("apple")[:2], scene.state()[env.hands.dims("right")][:2]
    box = scene.position("box")[:2]
    for name, place, message in (
        ("can", apple, "the apple is there"),
        ("box", apple, "the apple is there"),
        ("can", box, "the box is there"),
        ("can", (0.3, 0.0), "out of the hands' reach"),
        ("pear", (0.0, 0.0), "unknown object 'pear'; on the table: banana, apple, can, box"),
    ):
        with pytest.raises(ValueError, match=message):
            moved(scene, name, place)
    down = env.hands.rest.copy()
    down[env.hands.dims("right")][2] = 0.006
    for _ in range(10):
        env.step(down)
    with pytest.raises(ValueError, match=r"the right (inner|outer|hand) is there"):
        moved(scene, "can", hand + np.array((0.044, 0.0)))


def test_containers_in_use_and_the_steamer_stay(env, scene):
    scene.place_item("can", scene.position("box")[:2], 0.0, scene.containers["box"].floor)
    for _ in range(5):
        env.step(env.hands.rest)
    with pytest.raises(ValueError, match="the box touches the can; move the can first"):
        moved(scene, "box", (0.0, 0.0))
    env.reset(trials("attribute")[0])
    with pytest.raises(ValueError, match="the steamer cannot be moved"):
        moved(env.scene, "steamer", (0.0, 0.0))
    moved(env.scene, "lid", (-0.12, -0.05))


def test_two_containers_keep_apart(env):
    trial = next(trial for trial in trials("semantic") if "place-" in trial.name)
    env.reset(trial)
    one, other = env.scene.containers
    with pytest.raises(ValueError, match=f"no room for the {one}.*: the {other} is there"):
        moved(env.scene, one, env.scene.position(other)[:2] + np.array((0.03, 0.0)))


def test_tasks_of_a_scene_contain_its_own():
    for trial in (*trials("semantic"), trials("attribute")[0]):
        tasks = tasks_of(trial.scene)
        assert tasks[trial.instruction] == trial.scene
        items = 1 + len(trial.scene["distractors"])
        assert len(tasks) == (1 if "steamer" in trial.scene else items * len(trial.scene["containers"]))
        for instruction, scene in tasks.items():
            assert scene["target"]["name"] in instruction or "steamer" in instruction


def test_another_instruction_changes_the_goal_and_nothing_on_the_table(env):
    trial = trials("semantic")[0]
    env.reset(trial)
    before = env.scene.data.qpos.copy()
    other = trials("semantic")[1]
    env.instruct(other)
    np.testing.assert_array_equal(env.scene.data.qpos, before)
    assert env.observe().instruction == other.instruction == "put the apple in the box"
    assert env.goal.target == "apple"
