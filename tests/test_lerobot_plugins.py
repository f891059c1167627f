"""The two LeRobot plugins of `packages/`. What needs LeRobot runs in its own environment, `make env-lerobot`."""

import ast
import importlib.util
import json
import os
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from agra.data.config import EGO_VIEW
from agra.evaluation.protocols import Protocol
from agra.evaluation.remote import served
from agra.evaluation.rollout import evaluate, run_episode
from agra.serving.client import PolicyClient
from agra.simulators.registry import make
from tests.support.echo import ACTION, HORIZON, STATE, Echo, expected, observation, running

ROOT = Path(__file__).parent.parent
SUPPORT = Path(__file__).parent / "support"
PACKAGES = {name: ROOT / "packages" / name / "src" / name for name in ("lerobot_policy_agra", "lerobot_env_agra")}
LEROBOT = ROOT / ".venv-lerobot" / "bin"
needs_lerobot = pytest.mark.skipif(not LEROBOT.is_dir(), reason="no .venv-lerobot: make env-lerobot")


def constant(package, module, name):
    """A constant of a module that cannot be imported without LeRobot."""
    for node in ast.parse((PACKAGES[package] / f"{module}.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return eval(compile(ast.Expression(node.value), module, "eval"))
    raise AssertionError(f"{package}.{module} has no {name}")


def run(script, *arguments, timeout=500):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(script), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=timeout
    )


# --- without LeRobot --------------------------------------------------------------------------------------------------


@pytest.fixture
def remaining():
    path = PACKAGES["lerobot_policy_agra"] / "continuation.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("continuation", path))
    spec.loader.exec_module(module)
    return module.remaining


def handed_over(chunk, executed, horizon):
    """The rest of a chunk, cut or padded as LeRobot hands it over."""
    rest = chunk[executed:][:horizon]
    return np.concatenate([rest, np.zeros((horizon - len(rest), chunk.shape[1]), np.float32)])


@pytest.mark.parametrize("horizon", [1, 4, 10, 16, 30])
def test_the_rest_of_a_chunk_is_found_again(remaining, horizon):
    chunk = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    for executed in range(17):
        assert np.array_equal(remaining(chunk, handed_over(chunk, executed, horizon)), chunk[executed:])


def test_the_rest_of_another_chunk_is_none(remaining):
    chunk = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    assert remaining(chunk, chunk[1:] + np.float32(1e-6)) is None
    assert remaining(chunk, np.concatenate([chunk[2:], chunk[:1]])) is None  # not zero after the end
    still = np.ones((6, 2), np.float32)
    assert len(remaining(still, still[:3])) == 3  # ambiguous: the shortest rest that fits


def test_names_that_lerobot_and_both_packages_rely_on():
    for name, folder in PACKAGES.items():
        project = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text())["project"]
        assert project["name"] == name == folder.name
    assert f"observation.images.{constant('lerobot_env_agra', 'configuration', 'CAMERA')}" == EGO_VIEW
    base = constant("lerobot_policy_agra", "modeling_agra", "SEED_BASE")
    assert base == constant("lerobot_env_agra", "environment", "_SEED_BASE") == 2**24
    high, low = np.float32(divmod(123_456_789_012, base))
    assert int(high) * base + int(low) == 123_456_789_012


@pytest.mark.parametrize(
    ("package", "module"), [("lerobot_policy_agra", "configuration_agra"), ("lerobot_env_agra", "configuration")]
)
def test_a_plugin_loads_no_simulator_and_no_server(package, module):
    """LeRobot imports a plugin in a try. A missing library would only show as an unknown policy or environment."""
    roots = set()
    for name in ("__init__", module):
        for node in ast.parse((PACKAGES[package] / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(node.module.split(".")[0])
    assert roots <= {"dataclasses", "functools", "typing", "gymnasium", "lerobot", package}


# --- in LeRobot's environment -----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_lerobot
def test_the_policy_asks_as_lerobot_does(tmp_path):
    seen = [observation(seed) for seed in range(9)]
    np.savez(tmp_path / "seen.npz", frames=[o.frame for o in seen], states=[o.state for o in seen])
    policy = Echo()
    with running(policy) as server:
        done = run(
            LEROBOT / "python",
            SUPPORT / "lerobot_policy.py",
            server.address,
            tmp_path / "seen.npz",
            tmp_path / "a.json",
        )
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "a.json").read_text())
    first, second, third, fourth = (expected(seen[i]) for i in (0, 1, 4, 5))
    wanted = [[first[0], second[0]], [first[1], second[1]], [third[0], fourth[0]]]
    assert np.array_equal(answers["steps"], wanted)
    assert sorted(policy.seeds[:2]) == [6, 2**24 + 5]
    assert sorted(policy.seeds[2:4]) == [72, 73]  # without the environment's seeds: counted on from the first two rows
    assert policy.seeds[4] == 74
    assert answers["wrong rows"] == "batch: expected 2 rows until the next reset, got 1"
    chunk = expected(seen[0])
    assert np.array_equal(answers["chunk"], chunk)
    continued = [c for c in policy.continuations if c is not None]
    assert [(c.delay, len(c.actions)) for c in continued] == [(3, 3), (1, 4)]
    assert np.array_equal(continued[0].actions, chunk[2:])
    assert np.array_equal(continued[1].actions, chunk[1:])
    assert answers["rtc"] is True
    assert answers["ambiguous"] == (
        "camera: the observation has several; choose with --policy.camera, available: top, other"
    )
    assert np.array_equal(answers["only"], [chunk[0]])
    row = observation(0)
    object.__setattr__(row, "frame", np.concatenate([seen[0].frame, seen[3].frame], axis=1))
    assert np.array_equal(answers["both"], [expected(row)[0]])
    assert answers["features"] == {"observation.state": [STATE], "action": [ACTION]}
    assert f"echo at {server.address} has {ACTION} dimensions for robot, but here there are (12,)" in answers["width"]
    assert "has no 'so101'; choose with --policy.embodiment, available: robot" in answers["robot"]
    assert "run agra train RECIPE --data.path DATASET" in answers["training"]
    assert answers["saved"] == ["config.json"]
    assert answers["reread"] == "top,other"
    assert len(chunk) == HORIZON


def play(tmp_path, name, *flags):
    """Play three trials with lerobot-eval. Return their names, successes and digests, and its own successes."""
    output = tmp_path / name
    flags = ["--policy.type=agra", *flags, "--env.type=agra_tabletop", "--eval.n_episodes=3", "--eval.batch_size=1"]
    done = run(LEROBOT / "python", SUPPORT / "lerobot_eval.py", f"{output}.json", *flags, f"--output_dir={output}")
    assert done.returncode == 0, done.stderr
    info = json.loads((output / "eval_info.json").read_text())
    return [tuple(row) for row in json.loads(Path(f"{output}.json").read_text())], info["per_task"][0]["metrics"]


@pytest.mark.slow
@needs_lerobot
def test_lerobot_eval_plays_the_episodes_of_agra_evaluate(tmp_path):
    simulator = make("tabletop")
    trials = simulator.trials("in_distribution")[:3]
    with served("tabletop-agra") as address:
        client = PolicyClient(address)
        results = evaluate(
            client,
            simulator,
            trials,
            policy_name="agra",
            protocol=Protocol(execute_steps=8),
            output=tmp_path / "results.jsonl",
            progress=False,
        )
        client.close()
        digests, metrics = play(tmp_path, "served", f"--policy.server={address}")
    by_name = {result.trial: result for result in results.trials}
    assert digests == [(t.name, by_name[t.name].success, by_name[t.name].digest) for t in trials]
    assert metrics["successes"] == [by_name[t.name].success for t in trials]

    # Without a server: torch 2.11 in LeRobot's process instead of the newest, so bits of the actions may differ.
    in_process, _ = play(tmp_path, "in_process", "--policy.checkpoint=tabletop-agra")
    assert [row[:2] for row in in_process] == [row[:2] for row in digests]


@pytest.mark.slow
@needs_lerobot
def test_a_robot_of_lerobot_waits_for_chunks_or_continues_them(tmp_path):
    trial = make("tabletop").trials("in_distribution")[0]
    assert trial.seed == 1000  # the policy's default
    folder, played = tmp_path / "policy", {}
    flags = [f"--policy.path={folder}", "--fps=10", "--duration=60", "--return_to_initial_position=false"]
    inference = {"sync": ["--inference.type=sync"], "rtc": ["--inference.type=rtc", "--inference.queue_threshold=8"]}
    with served("tabletop-agra") as address:
        written = run(LEROBOT / "python", "-m", "lerobot_policy_agra", folder, f"--server={address}")
        assert written.returncode == 0, written.stderr
        client = PolicyClient(address)
        expected_steps = len(run_episode(client, make("tabletop"), trial, execute_steps=8, record=False))
        client.close()
        for kind, options in inference.items():
            record = tmp_path / f"{kind}.json"
            done = run(LEROBOT / "python", SUPPORT / "lerobot_rollout.py", record, trial.name, *flags, *options)
            assert done.returncode == 0, done.stderr
            played[kind] = json.loads(record.read_text())
    assert played["sync"] == {"success": True, "steps": expected_steps, "rests": []}
    assert played["rtc"]["rests"]
    assert None not in played["rtc"]["rests"]


@pytest.mark.slow
@needs_lerobot
def test_lerobot_train_is_refused(tmp_path):
    flags = ["--policy.type=agra", "--dataset.repo_id=none/none", f"--output_dir={tmp_path / 'run'}"]
    done = run(LEROBOT / "lerobot-train", *flags)
    assert done.returncode != 0
    assert "ValueError: the policy agra is not trained by lerobot-train" in done.stderr
