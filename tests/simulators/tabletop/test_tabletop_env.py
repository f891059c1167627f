import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import agra.simulators.tabletop.gymnasium_env  # noqa: F401 (registers the environments)
from agra.evaluation.rollout import run_episode
from agra.simulators.registry import expert, make
from agra.simulators.tabletop.tabletop_env import Tabletop
from agra.simulators.tabletop.tabletop_tasks import OPEN_STEAMER, PICK_AND_PLACE, training_trials


@pytest.fixture(scope="module")
def env():
    made = Tabletop()
    yield made
    made.close()


def first(env, regime):
    return env.trials(regime)[0]


def test_same_trial_same_states_and_pixels(env):
    trial = first(env, "semantic")
    first_run = run_episode(expert(env), env, trial, execute_steps=1, masks=True)
    run_episode(expert(env), env, first(env, "attribute"), execute_steps=1)  # something else in between
    with_new = Tabletop()
    new_simulator = run_episode(expert(with_new), with_new, trial, execute_steps=1, masks=True)
    with_new.close()
    again = run_episode(expert(env), env, trial, execute_steps=1, masks=True)
    for other in (new_simulator, again):
        np.testing.assert_array_equal(first_run.frames, other.frames)
        np.testing.assert_array_equal(first_run.states, other.states)
        np.testing.assert_array_equal(first_run.masks, other.masks)


def test_what_was_drawn_before_leaves_no_trace(env):
    """A slot's last user must not decide in which order discs are blended: it moved a pixel by 1, once in a while."""
    env.reset(first(env, "semantic"))
    renderer, view = env._renderer, env._renderer._view

    def drawn():
        frame = renderer.frame(env.scene)
        used = view.geoms[: view.ngeom]
        return frame, [(g.objtype, g.objid, g.segid, g.camdist, g.modelrbound, g.transparent) for g in used]

    frame, fields = drawn()
    for index, geom in enumerate(view.geoms):
        geom.objtype, geom.objid, geom.segid, geom.transparent = 5, index, index, index % 2
        geom.camdist, geom.modelrbound = -float(index), 9.0
    again, same = drawn()
    np.testing.assert_array_equal(frame, again)
    assert fields == same


@pytest.mark.parametrize("name", ["tabletop", "tabletop_human"])
@pytest.mark.parametrize("regime", ["in_distribution", "semantic", "instance", "attribute"])
def test_expert_solves_a_share_of_every_regime(name, regime):
    env = make(name, frame_size=(16, 28))
    for trial in env.trials(regime)[::6]:
        episode = run_episode(expert(env), env, trial, execute_steps=1)
        assert episode.success, trial.name
        assert all(episode.progress.values()), (trial.name, episode.progress)
        assert len(episode) <= {PICK_AND_PLACE: 30, OPEN_STEAMER: env.max_steps / 2}[trial.task]
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tabletop", "tabletop_human"])
def test_expert_solves_at_least_95_percent_of_every_regime(name):
    env = make(name, frame_size=(16, 28))
    for regime in ("in_distribution", "semantic", "instance", "attribute"):
        outcomes = [run_episode(expert(env), env, trial, execute_steps=1).success for trial in env.trials(regime)]
        assert np.mean(outcomes) >= 0.95
    outcomes = [run_episode(expert(env), env, t, execute_steps=1).success for t in training_trials(100, 7)]
    assert np.mean(outcomes) >= 0.95
    env.close()


def test_hands_that_rest_move_nothing_and_succeed_at_nothing(env):
    observation = env.reset(first(env, "in_distribution"))
    name = env.trial.scene["target"]["name"]
    before = env.scene.position(name)
    for _ in range(20):
        step = env.step(observation.state)
    np.testing.assert_allclose(env.scene.position(name), before, atol=1e-3)
    assert not step.success
    assert not any(step.progress.values())


def test_taking_the_wrong_thing_is_no_progress(env):
    trial = next(t for t in env.trials("semantic") if t.name.startswith("semantic/pick"))
    env.reset(trial)
    wrong = trial.scene["distractors"][0]["name"]
    env.goal.target = wrong  # what the expert reads
    acting = expert(env)
    observation, goal = env.reset(trial), env.goal
    goal_target = goal.target
    for _ in range(40):
        goal.target = wrong
        action = acting.act(observation).actions[0]
        goal.target = goal_target
        step = env.step(action)
        observation = step.observation
    assert env.scene.within(wrong, goal.goal)
    assert not step.success
    assert step.progress == {"approached": False, "grasped": False, "placed": False}


def test_holding_is_not_placing(env):
    """Success needs an open hand: at no step of the expert's way does it come while the hand touches the thing."""
    trial = first(env, "in_distribution")
    observation = env.reset(trial)
    acting, success = expert(env), False
    for _ in range(60):
        step = env.step(acting.act(observation).actions[0])
        observation = step.observation
        if step.success:
            assert not env.scene.touched_by_hand(env.goal.target)
            success = True
            break
    assert success


def test_mask_covers_the_acting_hand_and_its_object_only(env):
    trial = next(t for t in env.trials("semantic") if t.name.startswith("semantic/pick"))
    env.reset(trial)
    mask = env.interaction_mask()
    scene = env.scene
    alone = {
        name: env._renderer.mask(scene, scene.geoms_of(name))
        for name in (*scene.items, *scene.containers, "right_hand", "left_hand")
    }
    np.testing.assert_array_equal(mask, alone["right_hand"] | alone[trial.scene["target"]["name"]])
    for name, pixels in alone.items():
        assert pixels.any(), name
        if name not in ("right_hand", trial.scene["target"]["name"]):
            assert not (mask & pixels).any(), name


def test_steamer_mask_begins_with_the_left_hand_and_the_lid(env):
    trial = first(env, "attribute")
    observation = env.reset(trial)
    acting = expert(env)
    assert (env.goal.acting_hand, env.goal.acting_target) == ("left", "lid")
    while not env.goal.progress["lid_set_aside"]:
        observation = env.step(acting.act(observation).actions[0]).observation
    assert (env.goal.acting_hand, env.goal.acting_target) == ("right", trial.scene["target"]["name"])


def test_bad_actions_and_orders_are_named(env):
    env.reset(first(env, "instance"))
    with pytest.raises(ValueError, match=r"action: expected \(10,\) finite numbers, got shape \(3,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.full(10, np.nan))
    with pytest.raises(ValueError, match=r"call reset\(trial\) first"):
        _ = Tabletop().scene
    with pytest.raises(ValueError, match="unknown hands 'claw'; available: tabletop, tabletop_human"):
        Tabletop(hands="claw")


@pytest.mark.parametrize("name", ["agra/Tabletop-v0", "agra/TabletopHuman-v0"])
@pytest.mark.filterwarnings(
    "error", "ignore:.*symmetric and normalized space.*", "ignore:.*space (minimum|maximum) value is -?infinity.*"
)
def test_gymnasium_checker(name):
    env = gymnasium.make(name, frame_size=(32, 56), render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_gymnasium_episode_ends():
    env = gymnasium.make("agra/Tabletop-v0", frame_size=(32, 56)).unwrapped
    trial = env.simulator.trials("in_distribution")[0]
    observation, info = env.reset(seed=3, options={"trial": trial})
    assert (info["trial"], observation["instruction"]) == (trial.name, trial.instruction)
    acting, rewards = expert(env.simulator), []
    terminated = truncated = False
    while not (terminated or truncated):
        observation, reward, terminated, truncated, info = env.step(acting.act(env._last).actions[0])
        rewards.append(reward)
    assert terminated
    assert (sum(rewards), rewards[-1], info["success"]) == (1.0, 1.0, True)
    env.reset(options={"trial": trial})
    count, truncated = 0, False
    while not truncated:
        *_, terminated, truncated, info = env.step(env.simulator.hands.rest)
        count += 1
    assert (count, terminated, info["success"], info["is_success"]) == (Tabletop.max_steps, False, False, False)
    env.close()


def test_gymnasium_plays_the_trials_of_a_regime():
    env = gymnasium.make("agra/Tabletop-v0", frame_size=(32, 56), regime="semantic", max_steps=2).unwrapped
    trials = env.simulator.trials("semantic")
    for seed, index in ((2000, 0), (2039, 39), (3, 3), (2041, 1)):
        observation, info = env.reset(seed=seed, options={"lerobot_new_rollout": True})
        assert (info["trial"], observation["instruction"]) == (trials[index].name, trials[index].instruction)
    _, info = env.reset(options={"trial": trials[7].name})
    assert info["trial"] == trials[7].name
    assert [env.step(env.simulator.hands.rest)[3] for _ in range(2)] == [False, True]
    assert env.reset()[1]["trial"] in {trial.name for trial in trials}
    with pytest.raises(ValueError, match="no trial of that name; for example 'in_distribution/"):
        env.reset(options={"trial": "semantic/none"})
    with pytest.raises(ValueError, match="unknown regime 'easy'"):
        gymnasium.make("agra/Tabletop-v0", regime="easy")
    env.close()


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_no_opengl_is_one_line(backend, tmp_path):
    """As on a machine without the library: every attempt to load it fails."""
    code = f"""
import ctypes, ctypes.util
missing = lambda name: any(library in str(name) for library in ("EGL", "OSMesa", "libGL"))
find, load = ctypes.util.find_library, ctypes.CDLL.__init__
def load_or_fail(self, name, *rest, **more):
    if missing(name):
        raise OSError(f"{{name}}: cannot open shared object file")
    load(self, name, *rest, **more)
ctypes.util.find_library = lambda name: None if missing(name) or name == "GL" else find(name)
ctypes.CDLL.__init__ = load_or_fail
from agra.cli.main import main
main(["evaluate", "expert", "--output", {str(tmp_path / "results.jsonl")!r}, "--limit", "1"])
"""
    environment = {"MUJOCO_GL": backend, "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        f"agra: error: no usable OpenGL library for MUJOCO_GL={backend}: install the Debian packages"
    )
    assert not list(tmp_path.iterdir())


def test_a_world_that_nobody_closed_leaves_quietly():
    code = "from agra.simulators.registry import make\nenv = make('tabletop')\nenv.reset(env.trials('instance')[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
