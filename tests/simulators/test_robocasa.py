"""The trial lists of the GR1 tabletop benchmark, and with the package the adapter against it.

With the package: make env-robocasa, then .venv-robocasa/bin/python -m pytest --noconftest FILE.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from agra.simulators.robocasa.robocasa_tasks import TASKS, environment_id, trials


def test_counts_are_the_benchmark_s():
    assert {regime: len(tasks) for regime, tasks in TASKS.items()} == {
        "in_distribution": 24,
        "unseen_appearance": 18,
        "unseen_object_types": 32,
        "unseen_combinations": 14,
    }
    every = [task for tasks in TASKS.values() for task in tasks]
    assert len(set(every)) == len(every) == 88
    assert len(trials("in_distribution")) == 24 * 50
    with pytest.raises(ValueError, match="unknown regime 'semantic'"):
        trials("semantic")


def test_combinations_complete_the_grid():
    """18 trained pairs and 14 unseen ones are the whole grid of four sources and eight targets, without repetition."""

    def pairs(regime):
        return {t.split("From")[1].removesuffix("SplitA").removesuffix("SplitB") for t in TASKS[regime] if "From" in t}

    assert not pairs("in_distribution") & pairs("unseen_combinations")
    grid = pairs("in_distribution") | pairs("unseen_combinations")
    assert len(grid) == 32
    assert pairs("unseen_appearance") == pairs("in_distribution")


def test_names():
    assert environment_id("PnPCanToDrawerClose") == "gr1_unified/PnPCanToDrawerClose_GR1ArmsAndWaistFourierHands_Env"
    first = trials("unseen_appearance")[0]
    assert first.task == "EvalPnPNovelFromCuttingboardToBasketSplitB"
    assert first.scene["seed"] == 0
    seeds = {trial.seed for regime in TASKS for trial in trials(regime)}
    assert len(seeds) == 88 * 50  # no two trials share the policy's noise


def test_the_package_registers_every_task():
    pytest.importorskip("robocasa_gr1")
    import gymnasium

    import agra.simulators.robocasa.robocasa_env  # noqa: F401

    ids = {trial.scene["environment"] for regime in TASKS for trial in trials(regime)}
    assert len(ids) == 88
    assert not ids - set(gymnasium.registry)


def test_keys_are_the_package_s():
    """Every part of our state and action is one that the package's converter maps, with its names both ways."""
    pytest.importorskip("robocasa_gr1")
    from robocasa_gr1.models.robots import make_key_converter

    from agra.simulators.robocasa.robocasa_env import PARTS, split
    from agra.simulators.robocasa.robocasa_tasks import ROBOT

    converter = make_key_converter(ROBOT)
    raw = {f"robot0_{name}": name for name in ("left", "right", "left_gripper", "right_gripper", "torso")}
    assert {key.split(".")[1] for key in converter.map_obs(raw)} == set(PARTS)
    action = split(np.arange(29.0))
    sent = converter.unmap_action(action)
    assert sent["robot0_right"].tolist() == list(range(7, 14))
    assert sent["robot0_left_gripper"].tolist() == list(range(14, 20))
    assert sent["robot0_torso"].tolist() == [26, 27, 28]
    assert converter.get_camera_config()[0] == ["video.ego_view_pad_res256_freq20"]


def test_observations_are_put_together():
    pytest.importorskip("robocasa_gr1")
    from agra.simulators.robocasa.robocasa_env import PARTS, VIEW, observation

    raw = {f"state.{part}": np.full(size, i) for i, (part, size) in enumerate(PARTS.items())}
    raw |= {VIEW: np.zeros((256, 256, 3), np.uint8), "annotation.human.coarse_action": "unlocked_waist: pick the cup"}
    ours = observation(raw)
    assert ours.instruction == "pick the cup"
    assert ours.state.tolist() == [0] * 7 + [1] * 7 + [2] * 6 + [3] * 6 + [4] * 3
    with pytest.raises(ValueError, match=r"state.waist: expected \(3,\) joint angles, got shape \(2,\)"):
        observation(raw | {"state.waist": np.zeros(2)})


PLAY = """
    import json, sys
    import numpy as np
    from agra.evaluation.rollout import RecordedPolicy, run_episode
    from agra.simulators.registry import make
    from agra.simulators.robocasa.robocasa_env import NAMES
    from agra.simulators.robocasa.robocasa_tasks import trials
    from agra.types import ActionChunk

    class BendsTheRightElbow:
        def reset(self, seed):
            self.target = None

        def act(self, observation):
            if self.target is None:
                self.first = observation
                self.target = observation.state.copy()
                self.target[NAMES.index("right_arm_3")] -= 0.4
            return ActionChunk(actions=np.tile(self.target, (4, 1)))

    env, policy = make("robocasa_gr1"), RecordedPolicy(BendsTheRightElbow())
    trial = next(t for t in trials("in_distribution") if t.task == "PosttrainPnPNovelFromTrayToPotSplitA")
    episode = run_episode(policy, env, trial, execute_steps=4, max_steps=9, record=sys.argv[1] == "record")
    env.close()
    first = policy.policy.first
    print(json.dumps({
        "instruction": first.instruction, "digest": policy.digest(episode),
        "rows": first.frame.reshape(256, -1).any(1).nonzero()[0][[0, -1]].tolist(),
        "moved": NAMES[np.abs(episode.states[-1] - episode.states[0]).argmax()],
    }))
"""


def play(package, record):
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", textwrap.dedent(PLAY), record]
    return json.loads(subprocess.check_output(command, env=environment, text=True).splitlines()[-1])


@pytest.mark.slow
def test_an_episode_on_stand_ins(tmp_path):
    """The package's own scene, robot, camera and keys; its missing files replaced. Twice, in processes of their own, once
    with every step drawn and once only where the policy looks."""
    pytest.importorskip("robocasa_gr1")
    subprocess.run([sys.executable, Path(__file__).parents[1] / "support/robocasa_stand_ins.py", tmp_path], check=True)
    played = play(tmp_path, "record")
    assert played["instruction"].startswith("pick the ")
    assert played["instruction"].endswith(" from the tray and place it in the pot")
    assert played["rows"] == [42, 213]  # what is above and below is padding
    assert played["moved"] == "right_arm_3"
    assert play(tmp_path, "only where needed") == played


def test_one_hash_seed():
    pytest.importorskip("robocasa_gr1")
    code = "from agra.simulators.registry import make; make('robocasa_gr1')"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    refused = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: robocasa_gr1: start Python with PYTHONHASHSEED=0" in refused.stderr
