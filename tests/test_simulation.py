import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import agra
from agra import files
from agra.checkpoints.folder import BUNDLED
from agra.cli.main import main
from agra.evaluation.protocols import Protocol
from agra.evaluation.remote import served
from agra.evaluation.results import read_results
from agra.simulation import open_policy, results_file, usual_protocol
from agra.types import Policy, SimulatorFailed
from tests.support.outcomes import reproducible
from tests.support.point_world import Expert, PointWorld


@pytest.mark.parametrize("name", agra.__all__)
def test_every_public_name_is_importable(name):
    assert getattr(agra, name).__doc__


def test_a_simulator_by_name():
    env = agra.make_simulator("tabletop", frame_size=(32, 56))
    assert env.reset(env.trials("instance")[0]).frame.shape == (32, 56, 3)
    assert isinstance(open_policy("expert", env), Policy)
    env.close()
    with pytest.raises(ValueError, match="unknown simulator 'tabeltop'; did you mean 'tabletop'"):
        agra.make_simulator("tabeltop")


def test_objects_are_evaluated(tmp_path):
    env = PointWorld()
    options = {
        "output": tmp_path / "results.jsonl",
        "name": "mine",
        "regimes": ["instance"],
        "limit": 3,
        "progress": False,
    }
    results = agra.evaluate(Expert(env), env, **options)
    assert [trial.success for trial in results.trials] == [True] * 3
    assert results.header["protocol"]["execute_steps"] == 8
    assert read_results(tmp_path / "results.jsonl") == results
    with pytest.raises(ValueError, match="workers: 2 processes open their own policy and simulator; give both by name"):
        agra.evaluate(Expert(env), env, workers=2, **options)


def test_the_checksum_of_a_checkpoint_is_for_servers(tmp_path):
    for policy in ("expert", "tabletop-agra"):
        for given in ("checkpoint_sha256", "computed_on"):
            with pytest.raises(ValueError, match=f"{given}: expected none for {policy}"):
                agra.evaluate(policy, output=tmp_path / "r.jsonl", **{given: "abc"})


def test_names_are_evaluated(tmp_path):
    """From Python and on the command line: the same episodes, and a second call plays nothing again."""
    options = {"regimes": ["in_distribution"], "limit": 1, "protocol": Protocol(execute_steps=1, max_steps=3)}
    results = agra.evaluate("expert", "tabletop", output=tmp_path / "api.jsonl", progress=False, **options)
    assert (results.policy, results.trials[0].steps) == ("expert", 3)
    arguments = [
        "evaluate",
        "expert",
        "--regimes",
        "in_distribution",
        "--limit",
        "1",
        "--max-steps",
        "3",
        "--videos",
        "0",
    ]
    for _ in range(2):
        main([*arguments, "--output", str(tmp_path / "cli.jsonl")])
    (trial,) = read_results(tmp_path / "cli.jsonl").trials
    assert reproducible(trial) == reproducible(results.trials[0])


def test_results_name_where_the_answers_start(tmp_path):
    """The recipe's choice, another one, and a server's, which an evaluation cannot change."""

    def settings(policy, name, **options):
        chosen = {"regimes": ["in_distribution"], "limit": 1, "protocol": Protocol(execute_steps=1, max_steps=1)}
        output = tmp_path / f"{name}.jsonl"
        results = agra.evaluate(policy, output=output, name=name, progress=False, **chosen, **options)
        return results.header["policy_settings"]

    zero = {"action_noise": "zero"}
    assert settings("tabletop-agra", "recipe") == zero
    assert settings("tabletop-agra", "random", action_noise="random") == {}
    assert settings("tabletop-agra", "fixed", video_noise="fixed") == zero | {"video_noise": "fixed"}
    assert settings(agra.load_policy("tabletop-agra"), "object") == zero
    assert settings(agra.load_policy("tabletop-agra", action_noise="random"), "random_object") == {}
    with served("tabletop-agra") as address:
        assert settings(address, "server") == zero
        with pytest.raises(ValueError, match=r"action_noise: ws://.* has zero noise; choose random where it is loaded"):
            settings(address, "other", action_noise="random")
    with served("tabletop-agra", ["--video-noise", "zero"]) as address:
        assert settings(address, "both") == zero | {"video_noise": "zero"}
    with pytest.raises(ValueError, match="action_noise: the expert has none, got zero"):
        settings("expert", "expert", action_noise="zero")


def test_results_belong_to_one_checkpoint_and_one_kind_of_device(tmp_path, monkeypatch):
    """A run that trained on between two calls: the second one is refused, and a file of its own names the other one."""

    def evaluate(output):
        chosen = {"regimes": ["in_distribution"], "limit": 1, "protocol": Protocol(execute_steps=1, max_steps=1)}
        return agra.evaluate(run, output=tmp_path / output, progress=False, **chosen)

    run = tmp_path / "run"
    shutil.copytree(BUNDLED / "tabletop-agra", run / "step_000001")
    first = evaluate("r.jsonl")
    assert first.policy == "run"
    assert first.header["checkpoint_sha256"] == files.sha256(run / "step_000001" / "manifest.json")
    assert evaluate("r.jsonl") == first
    assert first.header["computed_on"] == "cpu, float32"
    with monkeypatch.context() as patch:
        patch.setattr("agra.simulation.device_and_precision", lambda checkpoint, device: "cuda, bfloat16")
        with pytest.raises(ValueError, match="computed_on 'cpu, float32' instead of 'cuda, bfloat16'; choose another"):
            evaluate("r.jsonl")
    shutil.copytree(run / "step_000001", run / "step_000002")
    with (run / "step_000002" / "manifest.json").open("a") as file:
        file.write("\n")
    with pytest.raises(
        ValueError, match=r"r\.jsonl: holds results with checkpoint_sha256 .* choose another --output or"
    ):
        evaluate("r.jsonl")
    assert read_results(tmp_path / "r.jsonl") == first
    assert evaluate("other.jsonl").header["checkpoint_sha256"] != first.header["checkpoint_sha256"]


def test_a_checkpoint_is_resolved_once(tmp_path, monkeypatch):
    """A checkpoint that training adds after the start is not opened."""
    run, opened = tmp_path / "run", []
    shutil.copytree(BUNDLED / "tabletop-agra", run / "step_000001")

    def open_later(policy, simulator, **settings):
        shutil.copytree(run / "step_000001", run / "step_000002")
        opened.append(policy)
        return open_policy(policy, simulator, **settings)

    monkeypatch.setattr("agra.simulation.open_policy", open_later)
    chosen = {"regimes": ["in_distribution"], "limit": 1, "protocol": Protocol(execute_steps=1, max_steps=1)}
    results = agra.evaluate(run, progress=False, **chosen)
    assert opened == [run / "step_000001"]
    assert (results.policy, (run / "results.jsonl").is_file()) == ("run", True)


def test_usual_protocols():
    """RoboCasa's policies execute 16 actions of each chunk, others 8. An expert is called at every step."""
    steps = [usual_protocol("runs/x", name).execute_steps for name in ("robocasa_gr1", "tabletop", "metaworld")]
    assert steps == [16, 8, 8]
    assert usual_protocol("expert", "robocasa_gr1").execute_steps == 1


def test_where_results_are_written():
    assert results_file("tabletop-wam", None, None) == (Path("outputs/tabletop-wam/results.jsonl"), "tabletop-wam")
    assert results_file("expert", "r.jsonl", None) == (Path("r.jsonl"), "expert")
    with pytest.raises(ValueError, match="output: give a results file"):
        results_file("expert", None, None)
    with pytest.raises(ValueError, match="name: give the name of the policy ws://localhost:1"):
        results_file("ws://localhost:1", "r.jsonl", None)
    with pytest.raises(ValueError, match="key mapping: tcp://localhost:1 needs the keys of its messages"):
        results_file("tcp://localhost:1", "r.jsonl", "other")


def error_of(capsys, *arguments):
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit, match="1"):
        main(list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_second_evaluation_of_one_file_names_the_first(tmp_path, capsys):
    with files.lock(tmp_path, ".r.jsonl.lock"):
        line = error_of(capsys, "evaluate", "expert", "--output", str(tmp_path / "r.jsonl"), "--limit", "1")
    assert line.startswith(f"agra: error: {tmp_path}/r.jsonl: another process (pid {os.getpid()}) writes here")


def test_a_failing_simulator_is_one_line(tmp_path, capsys, monkeypatch):
    from agra.simulators.tabletop.tabletop_env import Tabletop

    def reset(self, trial):
        raise SimulatorFailed("no picture can be drawn")

    monkeypatch.setattr(Tabletop, "reset", reset)
    arguments = ["--output", str(tmp_path / "r.jsonl"), "--regimes", "instance", "--limit", "2", "--videos", "0"]
    line = error_of(capsys, "evaluate", "expert", *arguments)
    assert line.startswith("agra: error: the simulator failed 3 times in each of 2 of 2 episodes: instance/")
    assert line.endswith("(no picture can be drawn); run the same command again to retry them")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".r.jsonl.lock", "r.jsonl"]


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    """The device takes the header and no line after it."""
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    monkeypatch.setattr("agra.evaluation.rollout._open_results", lambda path, header: {})
    (tmp_path / "r.jsonl").symlink_to("/dev/full")
    arguments = ["--output", str(tmp_path / "r.jsonl"), "--regimes", "instance", "--limit", "1", "--max-steps", "2"]
    line = error_of(capsys, "evaluate", "expert", *arguments, "--videos", "0")
    assert line == f"agra: error: [Errno 28] No space left on device: '{tmp_path / 'r.jsonl'}'"
    assert not list(tmp_path.glob("*.tmp"))


def test_imports_no_torch():
    code = "import sys, agra.simulation, agra.cli.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
