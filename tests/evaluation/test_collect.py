import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from agra import files
from agra.cli.main import main
from agra.data.lerobot.dataset import LeRobotDataset
from agra.evaluation.collect import ActionNoise, collect, scripted_demonstrator
from agra.types import Embodiment, SimulatorFailed
from tests.support.point_world import Expert, PointWorld, demonstrator, training_trials

ROOT = str(Path(__file__).parents[2])

NOISE = ActionNoise(std={"a_*": 0.02})


def run(output, **changes):
    options = {"episodes": 12, "seed": 1, "noise": NOISE, "spare": 0.5, "progress": False} | changes
    return collect("point", output, demonstrator=demonstrator, **options)


def task_trials(count, seed):
    """Two thirds `left`, one third `right`; a fifth cannot be solved."""
    trials = training_trials(count, seed)
    return [replace(trial, task="right" if i % 3 == 2 else "left") for i, trial in enumerate(trials)]


def task_demonstrator(name):
    return replace(demonstrator(name), trials=task_trials, tasks=("left", "right"))


def run_tasks(output, **changes):
    options = {"per_task": 4, "seed": 1, "noise": NOISE, "progress": False} | changes
    return collect("point", output, demonstrator=task_demonstrator, **options)


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_first_successes_in_order(tmp_path):
    collected = run(tmp_path / "set")
    # Every fifth scene (index 3, 8, 13 ...) cannot be solved: 12 successes take 15 attempts, the last one number 14.
    assert (collected.episodes, collected.attempts, collected.failed) == (12, 15, 3)
    dataset = LeRobotDataset(tmp_path / "set")
    assert (dataset.num_episodes, int(dataset.lengths.sum())) == (12, collected.frames)
    assert (dataset.embodiment, dataset.fps) == ("dot", 10)
    solvable = [trial for trial in training_trials(15, 1) if trial.scene["reachable"]]
    for index, trial in enumerate(solvable):
        episode = dataset.episode(index)
        assert episode.instruction == trial.instruction
        assert np.allclose(episode.states[0], trial.scene["dot"])
        assert np.allclose(episode.actions, trial.scene["square"])  # the expert's own command, without the noise
        assert episode.success
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_noise_moves_the_states(tmp_path):
    run(tmp_path / "noisy")
    run(tmp_path / "clean", noise=ActionNoise(std={}))
    noisy, clean = LeRobotDataset(tmp_path / "noisy"), LeRobotDataset(tmp_path / "clean")
    assert np.array_equal(noisy.states(0)[0], clean.states(0)[0])
    lengths = np.minimum(noisy.lengths, clean.lengths)
    ends = [np.abs(noisy.states(i)[n - 1] - clean.states(i)[n - 1]).max() for i, n in enumerate(lengths) if n > 2]
    assert 0.002 < np.median(ends) < 0.1


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    run(tmp_path / "one", episodes=6)
    run(tmp_path / "two", episodes=6, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    run(tmp_path / "other", episodes=6, seed=2)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_killed_collection_goes_on(tmp_path):
    run(tmp_path / "whole")
    script = textwrap.dedent(f"""
        import sys, time; sys.path.insert(0, {ROOT!r})
        from tests.evaluation.test_collect import run
        from agra.evaluation.attempts import Staging
        save = Staging.save
        Staging.save = staticmethod(lambda *a: (save(*a), time.sleep(0.1)))
        run({str(tmp_path / "set")!r})
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    staging = tmp_path / "set.staging"
    while process.poll() is None and len(list(staging.glob("*.safetensors"))) < 5:
        pass
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in staging.glob("*.safetensors")}
    assert 5 <= len(kept) < 15
    with pytest.raises(ValueError, match=r"set\.staging: holds an unfinished collection with seed 1 instead of 2"):
        run(tmp_path / "set", seed=2)
    assert {p.name: p.stat().st_mtime_ns for p in staging.glob("*.safetensors")} == kept
    (staging / "000099.tmp").write_bytes(b"half")
    collected = run(tmp_path / "set")
    assert (collected.episodes, collected.failed) == (12, 3)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert not staging.exists()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="episodes: expected at least 1"):
        run(tmp_path / "none", episodes=0)
    with pytest.raises(
        ValueError, match=r"demonstrations are missing: all tasks: 10 of 12 \(12 attempts\); lower the noise"
    ):
        run(tmp_path / "spare", spare=0.0)
    with pytest.raises(ValueError, match=r"noise: 'right_\*' matches no action of dot: a_x, a_y"):
        run(tmp_path / "noise", noise=ActionNoise(std={"right_*": 0.1}))
    with pytest.raises(ValueError, match="unknown simulator 'tabeltop'; did you mean 'tabletop'"):
        collect("tabeltop", tmp_path / "misspelt", episodes=1, seed=0)


def test_as_many_of_each_task(tmp_path):
    collected = run_tasks(tmp_path / "set")
    # Solvable: left 0, 1, 4, 6; right 2, 5, 11, 14, with the unsolvable 3 and 8 between them.
    assert (collected.episodes, collected.attempts_by_task) == (8, {"left": 5, "right": 5})
    listed = task_trials(15, 1)
    dataset = LeRobotDataset(tmp_path / "set")
    for episode, trial in enumerate([0, 2, 1, 5, 4, 11, 6, 14]):  # the first of each task, then the second
        assert np.allclose(dataset.states(episode)[0], listed[trial].scene["dot"])


def test_chosen_tasks(tmp_path):
    collected = run_tasks(tmp_path / "set", tasks=("right",), per_task=3)
    assert (collected.episodes, collected.attempts_by_task) == (3, {"right": 4})
    with pytest.raises(ValueError, match="unknown task 'rihgt'; did you mean 'right'"):
        run_tasks(tmp_path / "misspelt", tasks=("rihgt",))
    with pytest.raises(ValueError, match="tasks: give per_task too"):
        run(tmp_path / "episodes", tasks=("right",))
    with pytest.raises(ValueError, match="either episodes or per_task, got 3 and 4"):
        run_tasks(tmp_path / "both", episodes=3)
    with pytest.raises(ValueError, match=r"right: 3 of 4 \(4 attempts\)"):
        run_tasks(tmp_path / "spare", tasks=("right",), spare=0.0)


def test_every_task_without_enough_demonstrations_is_listed(tmp_path):
    """The other task is complete by then, so that a second call with more spare trials plays few."""
    with pytest.raises(ValueError, match=r"missing: left: 3 of 4 \(4 attempts\), right: 3 of 4 \(4 attempts\); lower"):
        run_tasks(tmp_path / "set", spare=0.0)
    assert len(list((tmp_path / "set.staging").glob("*.safetensors"))) == 8
    assert run_tasks(tmp_path / "set").attempts_by_task == {"left": 5, "right": 5}


class Diverges(PointWorld):
    """A simulator that fails in two of the scenes."""

    def reset(self, trial):
        if trial.name in ("train/2", "train/6"):
            raise SimulatorFailed("physics diverged")
        return super().reset(trial)


def diverging_demonstrator(name):
    env = Diverges()
    return replace(demonstrator(name), simulator=env, expert=Expert(env))


def test_failed_episodes_are_listed_with_exit_code_1(tmp_path, monkeypatch, capsys):
    """All other episodes are played first and kept. With a sound simulator, the same command completes the dataset."""
    arguments = ["collect", "point", "--output", str(tmp_path / "set"), "--episodes", "12", "--seed", "1"]
    arguments += ["--workers", "1", "--noise", "a_*", "0.02"]
    for maker, code in ((diverging_demonstrator, 1), (demonstrator, None)):
        monkeypatch.setattr("agra.evaluation.collect.collect", partial(collect, demonstrator=maker))
        if code is None:
            main(arguments)
            break
        with pytest.raises(SystemExit, match="1"):
            main(arguments)
        error = capsys.readouterr().err
        assert error == (
            "agra: error: the simulator failed 3 times in each of 2 of 12 episodes: train/2 (physics diverged), train/6 "
            "(physics diverged); run the same command again to retry them\n"
        )
        assert not (tmp_path / "set").exists()
        assert len(list((tmp_path / "set.staging").glob("*.safetensors"))) == 10
    run(tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_finished_collection_is_left_alone(tmp_path):
    first = run(tmp_path / "set")
    before = contents(tmp_path / "set")
    again = run(tmp_path / "set", workers=2)
    assert (first.already_there, again.already_there) == (False, True)
    assert replace(again, already_there=False) == first
    with pytest.raises(ValueError, match="set: holds a finished collection with seed 1 instead of 2; use the same"):
        run(tmp_path / "set", seed=2)
    with pytest.raises(ValueError, match="finished collection with episodes 12 instead of None"):
        run_tasks(tmp_path / "set")
    assert contents(tmp_path / "set") == before
    (tmp_path / "set/collection.json").unlink()
    with pytest.raises(ValueError, match=r"set: already exists, without collection\.json"):
        run(tmp_path / "set")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_record_names_what_decides_the_pictures(tmp_path):
    run(tmp_path / "set")
    record = json.loads((tmp_path / "set/collection.json").read_text())
    assert record["settings"] == {"frame_size": [32, 48]}
    assert record["noise"] == {"std": {"a_*": 0.02}, "correlation": 0.8}
    assert record["attempts"] == {"reach": 15}


def test_killed_before_the_record_is_written(tmp_path, monkeypatch):
    run(tmp_path / "whole")

    def killed(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("agra.evaluation.collect.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "set")
    assert (tmp_path / "set").exists()
    with pytest.raises(ValueError, match=r"set\.staging: holds an unfinished collection with seed 1 instead of 2"):
        run(tmp_path / "set", seed=2)
    with monkeypatch.context() as patch:
        patch.setattr("agra.evaluation.collect.run_episode", None)  # nothing is played again
        assert run(tmp_path / "set").attempts == 15
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "whole"]


def test_attempts_of_unknown_settings_are_dropped(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(ValueError, match="all tasks: 10 of 12"):
        run(tmp_path / "set", spare=0.0, seed=2)
    (tmp_path / "set.staging/collection.json").unlink()  # as an interrupted removal may leave it
    run(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_second_process_is_refused(tmp_path):
    with files.lock(tmp_path / "set.staging"):
        with pytest.raises(ValueError, match=rf"set: another process \(pid {os.getpid()}\) writes here"):
            run(tmp_path / "set")
    assert run(tmp_path / "set").episodes == 12


@pytest.mark.parametrize(("limit", "file"), [(1500, "set.staging/000000.safetensors"), (12000, "set")])
def test_a_full_disk_names_the_file_and_leaves_no_temporary_one(tmp_path, limit, file):
    """A limit on the size of files stands for a full disk: in an attempt, and in the dataset's own files."""
    script = textwrap.dedent(f"""
        import resource, sys; sys.path.insert(0, {ROOT!r})
        from tests.evaluation.test_collect import run
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            run({str(tmp_path / "set")!r})
        except OSError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[Errno 27] File too large: '{tmp_path / file}'"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".partial")]
    assert run(tmp_path / "set").episodes == 12


def test_progress_in_a_log_file(tmp_path, capsys):
    run(tmp_path / "set", episodes=101, progress=True)
    assert "100 of 101 demonstrations" in capsys.readouterr().out


def test_command_line(tmp_path, capsys):
    command = ["collect", "tabletop", "--per-task", "1", "--workers", "1", "--output", str(tmp_path / "set")]
    main([*command, "--tasks", "open_steamer_transfer_bun", "--noise", "*_x", "0.001"])
    assert "set: 1 demonstrations" in capsys.readouterr().out
    main([*command, "--tasks", "open_steamer_transfer_bun", "--noise", "*_x", "0.001"])
    assert capsys.readouterr().out == f"{tmp_path / 'set'}: complete, nothing to record\n"
    with pytest.raises(SystemExit, match="1"):
        main(command)
    error = capsys.readouterr().err
    assert "holds a finished collection with tasks ['open_steamer_transfer_bun'] instead of ['pick_and_place'," in error


def test_damaged_staging_is_named(tmp_path):
    with pytest.raises(ValueError, match="all tasks: 10 of 12"):
        run(tmp_path / "set", spare=0.0)
    file = tmp_path / "set.staging/000001.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"000001\.safetensors: damaged .*; remove this file and collect again"):
        run(tmp_path / "set")


def test_noise_is_autoregressive_with_the_given_spread():
    robot = Embodiment(name="r", state_names=(), action_names=("left_x", "left_z", "right_x"))
    noise = ActionNoise(std={"*_x": 0.5}, correlation=0.8)
    assert noise.scale(robot).tolist() == [0.5, 0, 0.5]
    clean = np.array([1, 2, 3], dtype=np.float32)
    runs = []
    for seed in range(400):
        perturb = noise.start(robot, seed)
        runs.append([perturb(clean) - clean for _ in range(30)])
    values = np.array(runs)
    assert values.dtype == np.float32
    assert (values[..., 1] == 0).all()
    for dimension in (0, 2):
        x = values[..., dimension]
        assert np.abs(x[:, [0, 10, 29]].std(0) - 0.5).max() < 0.06  # stationary from the first step on
        assert abs(np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1] - 0.8) < 0.03
    assert abs(np.corrcoef(values[..., 0].ravel(), values[..., 2].ravel())[0, 1]) < 0.05
    again = noise.start(robot, 7)
    assert np.array_equal(values[7, 0], again(clean) - clean)


@pytest.mark.parametrize("change", [{"correlation": 1.0}, {"std": {"*_x": -1.0}}])
def test_noise_is_checked(change):
    with pytest.raises(ValueError, match=f"ActionNoise.{next(iter(change))}"):
        ActionNoise(**change)


def test_imports_no_torch():
    code = "import sys, agra.evaluation.collect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_point_world_is_a_simulator():
    from agra.types import Simulator

    assert isinstance(PointWorld(), Simulator)


@pytest.mark.parametrize("name", ["tabletop", "tabletop_human"])
def test_the_registered_worlds_can_be_demonstrated(name, tmp_path):
    collected = collect(name, tmp_path / "set", episodes=3, seed=0, workers=1, progress=False)
    assert collected.episodes == 3
    dataset = LeRobotDataset(tmp_path / "set")
    assert (dataset.embodiment, dataset.fps) == (name, 10)
    demonstrator = scripted_demonstrator(name)
    trials = demonstrator.trials(collected.attempts, 0)
    assert {trial.simulator for trial in trials} == {name}
    episode = dataset.episode(0)
    assert episode.frames.shape[1:] == (128, 224, 3)
    first = demonstrator.simulator.reset(trials[0])
    demonstrator.simulator.close()
    np.testing.assert_allclose(episode.states[0], first.state, atol=1e-6)
    error = np.abs(episode.frames[0].astype(float) - first.frame).mean()
    assert error < 4, f"the recorded video differs from what was rendered by {error:.1f} of 255 a pixel"
