import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pytest

from agra.collect import ActionNoise, collect, scripted_demonstrator
from agra.data.lerobot import LeRobotDataset
from agra.types import Embodiment
from point_world import PointWorld, demonstrator, training_trials

TESTS = str(Path(__file__).parent)

NOISE = ActionNoise(std={"a_*": 0.02})


def run(output, **changes):
    options = {"episodes": 12, "seed": 1, "noise": NOISE, "spare": 0.5, "progress": False} | changes
    return collect("point", output, demonstrator=demonstrator, **options)


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
    run(tmp_path / "one")
    run(tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    run(tmp_path / "other", seed=2)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_killed_collection_goes_on(tmp_path):
    run(tmp_path / "whole")
    script = textwrap.dedent(f"""
        import sys, time; sys.path.insert(0, {TESTS!r})
        from test_collect import run
        from agra.collect import _Staging
        save = _Staging.save
        _Staging.save = staticmethod(lambda *a: (save(*a), time.sleep(0.1)))
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
    run(tmp_path / "set")
    with pytest.raises(ValueError, match="set: already exists"):
        run(tmp_path / "set")
    with pytest.raises(ValueError, match="episodes: expected at least 1"):
        run(tmp_path / "none", episodes=0)
    with pytest.raises(ValueError, match="the expert succeeded in only 10 of 12 trials, 12 demonstrations"):
        run(tmp_path / "spare", spare=0.0)
    with pytest.raises(ValueError, match=r"noise: 'right_\*' names no action of dot: a_x, a_y"):
        run(tmp_path / "noise", noise=ActionNoise(std={"right_*": 0.1}))
    with pytest.raises(ValueError, match="unknown simulator 'tabeltop'; did you mean 'tabletop'"):
        collect("tabeltop", tmp_path / "misspelt", episodes=1, seed=0)


def test_damaged_staging_is_named(tmp_path):
    with pytest.raises(ValueError, match="only 10 of 12"):
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
    code = "import sys, agra.collect; sys.exit('torch' in sys.modules)"
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
