"""The adapter for XPolicyLab: its Model behind the calls of its server, with the action checks of its debug client."""

import importlib.util
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agra.types import EmbodimentSpec, Observation
from tests.support import xpolicylab_stand_in as lab
from tests.support.echo import Echo, running, spec

FOLDER = Path(__file__).parents[2] / "integrations/xpolicylab"
JOINT = ("left_arm_joint_state", "left_ee_joint_state", "right_arm_joint_state", "right_ee_joint_state")


def config(address, **changes):
    settings = {}
    for line in (FOLDER / "deploy.yml").read_text().splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition(": ")
            settings[key] = {"null": None, "false": False}.get(value, int(value) if value.isdigit() else value)
    filled = {"bench_name": "RoboDojo", "task_name": "stack_bowls", "ckpt_name": "demo", "env_cfg_type": "arx_x5"}
    return {**settings, **filled, "action_type": "joint", "seed": 0, "policy": address, **changes}


@pytest.fixture
def adapter(monkeypatch):
    lab.install(monkeypatch)
    module_spec = importlib.util.spec_from_file_location("agra_xpolicylab_model", FOLDER / "model.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


class Mean(Echo):
    """Answers the state itself, plus the row in the chunk, and records requests."""

    def __init__(self, *, width=14, horizon=5, **changes):
        robot = EmbodimentSpec(state={"all": (0, width)}, action={"all": (0, width)})
        super().__init__(replace(spec(horizon=horizon), embodiments={"robot": robot}, **changes))
        self.seen = []

    def act_batch(self, requests):
        self.seen += [request.observation for request in requests]
        chunks = super().act_batch(requests)
        steps = np.arange(self.spec.horizon, dtype=np.float32)[:, None]
        return [replace(c, actions=r.observation.state + steps) for c, r in zip(chunks, requests, strict=True)]


def joined(obs, keys):
    return np.concatenate([obs["state"][key] for key in keys])


def test_a_chunk_has_the_keys_and_sizes_that_the_debug_client_checks(adapter):
    with running(Mean()) as server:
        model = adapter.Model(config(server.address, execute_steps=3))
        obs = lab.observation("arx_x5")
        model.reset()
        assert model.update_obs(obs) is None
        actions = model.get_action()
    assert len(actions) == 3
    for step, action in enumerate(actions):
        lab.check_action(action, "arx_x5")
        assert tuple(action) == JOINT
        for key in JOINT:
            assert np.array_equal(action[key], obs["state"][key] + step)
            assert action[key].dtype == np.float32
    (seen,) = server.policy.seen
    assert np.array_equal(seen.frame, obs["vision"]["cam_head"]["color"])
    assert seen.instruction == "stack the bowls"


def test_end_effector_poses_and_a_single_arm(adapter):
    with running(Mean(width=8)) as server:
        model = adapter.Model(config(server.address, env_cfg_type="one_arm", action_type="ee"))
        obs = lab.observation("one_arm")
        model.update_obs(obs)
        action = model.get_action()[0]
    lab.check_action(action, "one_arm")
    assert np.array_equal(action["ee_pose"], obs["state"]["ee_pose"])
    assert np.array_equal(action["ee_joint_state"], obs["state"]["ee_joint_state"])


def test_other_orders_and_cameras_by_settings(adapter):
    order = [JOINT[0], JOINT[2], JOINT[1], JOINT[3]]
    with running(Mean()) as server:
        settings = {"state_keys": order, "action_keys": order, "camera": "cam_right_wrist"}
        model = adapter.Model(config(server.address, **settings))
        obs = lab.observation("arx_x5")
        obs["instructions"] = [obs.pop("instruction"), "another wording"]
        model.update_obs(obs)
        action = model.get_action()[0]
        (seen,) = server.policy.seen
    assert np.array_equal(seen.state, joined(obs, order))
    assert np.array_equal(seen.frame, obs["vision"]["cam_right_wrist"]["color"])
    assert seen.instruction == "stack the bowls"
    assert all(np.array_equal(action[key], obs["state"][key]) for key in JOINT)


def test_environments_are_episodes_of_their_own_in_both_ways_of_the_server(adapter):
    """Over websocket one observation and one request at a time, over the older protocol lists of them."""
    with running(Mean()) as server:
        model = adapter.Model(config(server.address))
        one_by_one = []
        for env in (0, 1):
            model.update_obs(lab.observation("arx_x5", env))
            one_by_one.append(model.get_action()[0])
        seeds = [*server.policy.seeds]
        model.reset()
        model.reset()  # the debug client resets twice
        model.update_obs_batch([lab.observation("arx_x5", env) for env in (0, 1, 2)])
        together = model.get_action_batch([2, 0])
        assert len(model.get_action_batch()) == 3
        later = server.policy.seeds[len(seeds) :]
    for env, action in enumerate(one_by_one):
        assert np.array_equal(action[JOINT[0]], lab.observation("arx_x5", env)["state"][JOINT[0]])
    for env, chunk in zip((2, 0), together, strict=True):
        assert np.array_equal(chunk[0][JOINT[0]], lab.observation("arx_x5", env)["state"][JOINT[0]])
    assert len(seeds) == 2
    assert len(set(seeds + later)) == 5


def test_a_reset_before_the_first_chunk_changes_no_seed(adapter):
    with running(Mean()) as server:
        for resets in (0, 2):
            model = adapter.Model(config(server.address))
            for _ in range(resets):
                model.reset()
            model.update_obs(lab.observation("arx_x5"))
            model.get_action()
        first, second = server.policy.seeds
    assert first == second


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"action_type": "ee"}, "its actions have 14 numbers.*have 16"),
        ({"action_type": "torque"}, "expected joint or ee, got 'torque'"),
        ({"action_keys": ["left_arm_joint_state"]}, "action_keys: expected"),
        ({"embodiment": "so101"}, r"expected one of \['robot'\], got 'so101'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_the_start(adapter, changes, text):
    with running(Mean()) as server, pytest.raises(ValueError, match=text):
        adapter.Model(config(server.address, **changes))


def test_a_policy_that_reads_past_observations_is_refused(adapter):
    with running(Mean(past=(-1,))) as server, pytest.raises(ValueError, match="reads past observations"):
        adapter.Model(config(server.address))


def test_observations_that_do_not_fit_are_named(adapter):
    with running(Mean()) as server:
        model = adapter.Model(config(server.address))
        with pytest.raises(ValueError, match="call update_obs first"):
            model.get_action_batch([0])
        obs = lab.observation("arx_x5")
        with pytest.raises(ValueError, match=r"vision/cam_head/color: missing.*cam_left_wrist"):
            model.update_obs({**obs, "vision": {"cam_left_wrist": obs["vision"]["cam_left_wrist"]}})
        with pytest.raises(ValueError, match=r"'left_arm_joint_state'.* are missing"):
            model.update_obs({**obs, "state": {}})
        with pytest.raises(ValueError, match="instruction: expected a string"):
            model.update_obs({**obs, "instruction": None})


def test_a_missing_checkpoint_is_reported_with_the_folders_tried(adapter):
    with pytest.raises(FileNotFoundError, match="RoboDojo-demo-arx_x5-joint-0"):
        adapter.Model(config(None))


def test_the_eval_script_starts_server_and_client_with_their_arguments(tmp_path):
    """eval.sh in a copy of XPolicyLab's layout whose scripts record what they were called with."""
    root = tmp_path / "XPolicyLab"
    policy, python = root / "policy/agra", tmp_path / "env/bin/python"
    for folder in (policy, root / "utils", python.parent):
        folder.mkdir(parents=True)
    for name in ("eval.sh", "deploy.yml"):
        shutil.copy(FOLDER / name, policy)
    log = tmp_path / "log"
    scripts = {
        root / "utils/get_free_port.sh": "echo 4321",
        root / "utils/wait_for_policy_server.sh": f'echo "wait $1 $2" >> {log}',
        policy / "setup_eval_env_client.sh": f'sleep 0.3; echo "client $@" >> {log}',
        python: f'echo "server $CUDA_VISIBLE_DEVICES $@" >> {log}; exec sleep 60',
    }
    for path, body in scripts.items():
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    arguments = ["RoboDojo", "stack_bowls", "demo", "arx_x5", "joint", "0", "3", "1", str(tmp_path / "env"), "robodojo"]
    command = ["bash", str(policy / "eval.sh"), *arguments]
    subprocess.run([*command, "policy=ws://127.0.0.1:8000"], check=True, timeout=30, capture_output=True)
    lines = sorted(log.read_text().splitlines())
    assert lines[0] == (
        "client RoboDojo stack_bowls demo arx_x5 joint 0 1 robodojo ckpt_name=demo,action_type=joint 4321 localhost"
    )
    server = lines[1].split()
    assert server[:3] == ["server", "3", str(root / "setup_policy_server.py")]
    overrides = dict(pair.split("=", 1) for pair in server[server.index("--overrides") + 1 :])
    assert overrides["policy"] == "ws://127.0.0.1:8000"
    assert overrides["port"] == "4321"
    assert overrides["policy_name"] == "agra"
    assert lines[2] == "wait localhost 4321"
    usage = subprocess.run(command[:5], capture_output=True, text=True, check=False, timeout=30)
    assert usage.returncode == 2
    assert "Usage: bash eval.sh" in usage.stderr


def test_a_checkpoint_in_this_process_answers_as_it_does_by_itself(adapter):
    pytest.importorskip("torch")  # the other tests need none
    from agra.policies.load import load_policy

    policy = load_policy("tabletop-agra")
    (robot,) = policy.spec.embodiments
    obs = lab.observation("tabletop")
    mean = np.asarray(policy.stats[robot].state["mean"])
    for key, part in zip(JOINT, np.split(mean, [4, 5, 9]), strict=True):
        obs["state"][key] = part
    model = adapter.Model(config("tabletop-agra", env_cfg_type="tabletop", device="cpu", execute_steps=4, seed=3))
    model.update_obs(obs)
    actions = model.get_action()
    policy.reset(zlib.crc32(b"[3, 0, 0]"))
    frame = obs["vision"]["cam_head"]["color"]
    chunk = policy.act(Observation(frame=frame, state=mean, instruction="stack the bowls", embodiment=robot))
    assert len(actions) == 4
    for action, wanted in zip(actions, chunk.actions[:4], strict=True):
        lab.check_action(action, "tabletop")
        np.testing.assert_allclose(np.concatenate([action[key] for key in JOINT]), wanted, rtol=1e-4, atol=1e-6)
