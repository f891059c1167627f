import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from agra import files
from agra.evaluation.protocols import Protocol, regime_trials
from agra.evaluation.results import read_results
from agra.evaluation.rollout import RecordedPolicy, evaluate, run_episode, side_by_side
from agra.types import ActionChunk, Policy, SimulatorFailed
from tests.support.outcomes import reproducible
from tests.support.point_world import Expert, PointWorld, Wanderer, make_trial, wanderer

ROOT = str(Path(__file__).parents[2])

TRIAL = make_trial("t", "semantic", 5)
PROTOCOL = Protocol(execute_steps=4)


class Scripted:
    """A policy with given chunks of targets that keeps its observations."""

    def __init__(self, *chunks: list[tuple[float, float]]) -> None:
        self.chunks = [np.array(chunk, dtype=np.float32) for chunk in chunks]

    def reset(self, seed: int) -> None:
        self.seed, self.observations = seed, []

    def act(self, observation) -> ActionChunk:
        self.observations.append(observation)
        return ActionChunk(actions=self.chunks[min(len(self.observations), len(self.chunks)) - 1])


def env_at(dot, square) -> tuple[PointWorld, object]:
    return PointWorld(), replace(TRIAL, scene={"dot": dot, "square": square, "reachable": True})


def test_rows_hold_the_observation_before_each_action():
    env, trial = env_at([0.1, 0.1], [0.9, 0.9])
    policy = Scripted([(0.2, 0.1), (0.3, 0.1), (0.4, 0.1)], [(0.4, 0.2), (0.4, 0.3), (0.4, 0.4)])
    episode = run_episode(policy, env, trial, execute_steps=2, max_steps=5, masks=True)
    assert policy.seed == trial.seed
    assert np.allclose(episode.actions, [(0.2, 0.1), (0.3, 0.1), (0.4, 0.2), (0.4, 0.3), (0.4, 0.2)])
    assert np.allclose(episode.states, [(0.1, 0.1), (0.2, 0.1), (0.3, 0.1), (0.4, 0.2), (0.4, 0.3)])
    assert [float(o.state[0]) for o in policy.observations] == pytest.approx([0.1, 0.3, 0.4])
    assert (episode.success, episode.progress, len(episode)) == (False, {"near": False}, 5)
    assert episode.frames.shape == (5, 32, 48, 3)
    assert episode.masks is not None
    assert episode.masks.shape == (5, 32, 48)
    for frame, mask in zip(episode.frames, episode.masks, strict=True):
        assert np.array_equal(mask, (frame != 120).any(-1))


def test_stops_at_the_first_success_and_at_the_simulator_s_limit():
    env, trial = env_at([0.1, 0.5], [0.3, 0.5])
    episode = run_episode(Scripted([(0.9, 0.5)] * 8), env, trial, execute_steps=8)
    assert (len(episode), episode.success, episode.progress) == (2, True, {"near": True})
    assert len(run_episode(Scripted([(0.1, 0.5)]), env, trial, execute_steps=8)) == env.max_steps


def test_chunk_termination_checks_only_after_the_chunk():
    """The dot runs through the square within a chunk: a success by the step, none by the chunk."""
    env, trial = env_at([0.1, 0.5], [0.3, 0.5])
    through = Scripted([(0.9, 0.5)] * 8)
    assert run_episode(through, env, trial, execute_steps=4, termination="step", max_steps=8).success
    assert not run_episode(through, env, trial, execute_steps=4, termination="chunk", max_steps=8).success
    assert run_episode(through, env, trial, execute_steps=2, termination="chunk", max_steps=8).success
    assert run_episode(through, env, trial, execute_steps=4, termination="chunk", max_steps=2).success


def test_noise_is_executed_and_the_clean_action_recorded():
    env, trial = env_at([0.1, 0.1], [0.9, 0.9])
    episode = run_episode(Scripted([(0.15, 0.1)]), env, trial, execute_steps=1, max_steps=3, perturb=lambda a: a + 0.03)
    assert np.allclose(episode.actions, (0.15, 0.1))
    assert np.allclose(episode.states[1], (0.18, 0.13))


def test_without_record_there_are_no_pixels():
    episode = run_episode(Wanderer(env := PointWorld()), env, TRIAL, execute_steps=4, record=False)
    assert episode.frames.shape == (len(episode), 0, 0, 3)


def test_only_frames_that_the_policy_receives_are_rendered():
    class Counting(PointWorld):
        rendered = 0

        def _observe(self, render=True):
            self.rendered += render
            return super()._observe(render)

    counts, digests = [], []
    _, trial = env_at([0.1, 0.1], [0.9, 0.9])
    for record in (True, False):
        policy, env = RecordedPolicy(Scripted([(0.2, 0.3)] * 8)), Counting()
        digests.append(policy.digest(run_episode(policy, env, trial, execute_steps=4, max_steps=14, record=record)))
        counts.append(env.rendered)
    assert counts == [15, 5]  # with the reset's; of the short last chunk too
    assert digests[0] == digests[1]


class CountingWorld(PointWorld):
    """Counts what it renders."""

    rendered = 0

    def _observe(self, render=True):
        self.rendered += render
        return super()._observe(render)


class ReadingPast(Scripted):
    """Reads past observations."""

    past: tuple[int, ...] = (-1,)


@pytest.mark.parametrize(("past", "rendered"), [((), 5), ((-1,), 9), ((-4,), 5), ((-6, -3), 12)])
def test_past_observations_are_rendered_and_given(past, rendered):
    """Chunks of 4 in 14 steps: calls at steps 0, 4, 8 and 12, and a short last chunk. The first observation repeats before it."""
    _, trial = env_at([0.1, 0.1], [0.9, 0.9])
    policies, episodes, worlds = [], [], []
    for record in (True, False):
        policy, world = ReadingPast([(0.9, 0.3), (0.9, 0.3), (0.2, 0.3), (0.2, 0.3)]), CountingWorld()
        policy.past = past
        episodes.append(run_episode(policy, world, trial, execute_steps=4, max_steps=14, record=record))
        policies.append(policy)
        worlds.append(world)
    episode = episodes[0]
    assert [world.rendered for world in worlds] == [15, rendered]
    for policy in policies:
        assert len(policy.observations) == 4
        for call, observation in zip((0, 4, 8, 12), policy.observations, strict=True):
            assert len(observation.past) == len(past)
            for step, moment in zip(past, observation.past, strict=True):
                assert np.array_equal(moment.frame, episode.frames[max(0, call + step)])
                assert np.array_equal(moment.state, episode.states[max(0, call + step)])
    plain = run_episode(
        Scripted([(0.9, 0.3), (0.9, 0.3), (0.2, 0.3), (0.2, 0.3)]), PointWorld(), trial, execute_steps=4, max_steps=14
    )
    assert np.array_equal(plain.frames, episode.frames)


def test_a_digest_holds_the_past():
    digests = []
    for past in ((), (-1,), (-2,)):
        policy = ReadingPast([(0.2, 0.3)] * 4)
        policy.past = past
        recorded = RecordedPolicy(policy)
        digests.append(recorded.digest(run_episode(recorded, PointWorld(), TRIAL, execute_steps=4, max_steps=8)))
    assert len(set(digests)) == 3


def test_past_observations_need_chunks_of_one_length():
    policy = ReadingPast([(0.2, 0.3)] * 4, [(0.2, 0.3)])
    policy.past = (-3,)
    with pytest.raises(ValueError, match="control step -3, whose frame was not rendered"):
        run_episode(policy, PointWorld(), TRIAL, execute_steps=4, max_steps=14, record=False)


def test_same_trial_same_episode():
    policy, env = wanderer()
    first = run_episode(policy, env, TRIAL, execute_steps=4)
    run_episode(policy, env, make_trial("u", "semantic", 6), execute_steps=4)
    again = run_episode(policy, env, TRIAL, execute_steps=4)
    for name in ("frames", "states", "actions"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    with pytest.raises(ValueError, match="execute_steps and max_steps must be at least 1"):
        run_episode(policy, env, TRIAL, execute_steps=0)


def test_recorded_policy():
    policy = RecordedPolicy(Scripted([(0.0, 0.0)]))
    assert isinstance(policy, Policy)
    run_episode(policy, PointWorld(), TRIAL, execute_steps=1, max_steps=7)
    assert len(policy.seconds) == 7
    assert min(policy.seconds) > 0
    policy.reset(0)
    assert policy.seconds == []


def test_the_digest_depends_on_every_bit():
    def digest(env=None, **changes):
        policy = RecordedPolicy(Scripted([(0.9, 0.9)]))
        return policy.digest(run_episode(policy, env or PointWorld(), replace(TRIAL, **changes), execute_steps=1))

    class Brighter(PointWorld):
        def _observe(self, render=True):
            observation = super()._observe()
            return replace(observation, frame=observation.frame + np.eye(32, 48, dtype=np.uint8)[..., None])

    assert digest() == digest()
    assert len({digest(), digest(seed=6), digest(instruction="go on"), digest(Brighter())}) == 4


class Dreamer(Wanderer):
    """Predicts frames of grey 0, 100, 200, of another size than the simulator's."""

    def act_and_imagine(self, observation) -> ActionChunk:
        chunk = self.act(observation)
        frames = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.full((16, 20, 3), 100, np.uint8)
        return replace(chunk, imagined=frames, timings={"imagine": 0.0})


def test_the_predicted_video_is_beside_the_recorded_one(tmp_path):
    frames = np.full((7, 32, 48, 3), 7, np.uint8)
    chunk = ActionChunk(
        actions=np.zeros((8, 2), np.float32),
        imagined=np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((4, 6, 3), np.uint8),
    )
    both = side_by_side(frames, [chunk, chunk], 4)
    assert both.shape == (7, 32, 96, 3)
    assert (both[:, :, :48] == 7).all()
    assert [row.max() for row in both[:, :, 48:]] == [0, 0, 1, 2, 0, 0, 1]  # eight steps are five frames
    assert side_by_side(frames, [ActionChunk(actions=np.zeros((8, 2)))], 4) is frames
    recorded = play(tmp_path / "recorded.jsonl", videos=1, limit=1, env=(env := PointWorld()), policy=Dreamer(env))
    plain = play(tmp_path / "plain.jsonl", videos=0, limit=1)
    assert [trial.digest for trial in recorded.trials] == [trial.digest for trial in plain.trials]
    with av.open(str(tmp_path / recorded.trials[0].video)) as video:
        assert (video.streams.video[0].width, video.streams.video[0].height) == (48 + 40, 32)


def play(output, *, env=None, limit=6, **changes):
    env = env or PointWorld()
    options = {"policy_name": "wanderer", "protocol": PROTOCOL, "output": output, "progress": False} | changes
    policy = options.pop("policy", Wanderer(env))
    trials = options.pop("trials", regime_trials(env, limit=limit))
    return evaluate(policy, env, trials, **options)


def outcomes(path):
    return [reproducible(trial) for trial in read_results(path).trials]


def test_videos_without_pyav_are_refused_before_the_first_trial(tmp_path, monkeypatch):
    monkeypatch.setattr("agra.evaluation.rollout.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="need PyAV: pip install av, or choose --videos 0"):
        play(tmp_path / "r.jsonl", videos=1)
    assert len(play(tmp_path / "r.jsonl", videos=0).trials) == 24


def test_evaluation_writes_header_lines_and_videos(tmp_path):
    results = play(tmp_path / "r.jsonl", videos=1)
    assert results == read_results(tmp_path / "r.jsonl")
    header = results.header
    assert (header["policy"], header["simulator"], header["embodiment"]) == ("wanderer", "point", "dot")
    assert header["protocol"] == {"execute_steps": 4, "max_steps": None, "termination": "step"}
    assert (header["max_steps"], header["fps"], header["settings"]) == (30, 10, {"frame_size": [32, 48]})
    assert header["regimes"]["semantic"] == {"played": 6, "full": 40}
    assert {"agra", "numpy"} <= set(header["versions"])
    assert len(results.trials) == header["num_trials"] == 24
    names = [trial.trial for trial in results.trials]
    assert names == sorted(names)
    assert 0 < sum(trial.success for trial in results.trials) < 24
    for trial in results.trials:
        assert trial.calls == -(-trial.steps // 4)
        assert 0 < trial.policy_ms["p50"] <= trial.policy_ms["p95"]
        if trial.video:
            assert (tmp_path / trial.video).stat().st_size > 500
    filmed = [trial.trial for trial in results.trials if trial.video]
    assert filmed == ["attribute/00", "in_distribution/00", "instance/00", "semantic/00"]


def test_episodes_do_not_depend_on_the_workers(tmp_path):
    play(tmp_path / "one.jsonl", limit=1)
    play(tmp_path / "two.jsonl", limit=1, policy=None, workers=2, make_player=wanderer)
    assert outcomes(tmp_path / "one.jsonl") == outcomes(tmp_path / "two.jsonl")
    assert len({trial["digest"] for trial in outcomes(tmp_path / "one.jsonl")}) == 4
    with pytest.raises(ValueError, match="more than one worker needs make_player"):
        play(tmp_path / "three.jsonl", policy=None, workers=2)


class Breaks(PointWorld):
    """Fails in the third step of every second attempt, and of every attempt of one trial."""

    attempts = 0

    def reset(self, trial):
        self.attempts += 1
        self.steps = 0
        return super().reset(trial)

    def step(self, action, *, render=True):
        self.steps += 1
        if self.steps == 3 and (self.attempts % 2 or self.trial.name == "semantic/00"):
            raise SimulatorFailed("physics diverged")
        return super().step(action, render=render)


def test_a_failed_simulator_is_tried_again_and_reported(tmp_path):
    """The episode equals that of a sound simulator. Trials that cannot be played are missing and retried by the next call."""
    play(tmp_path / "whole.jsonl", limit=2)
    path = tmp_path / "r.jsonl"
    env = Breaks()
    with pytest.raises(
        SimulatorFailed, match=r"failed 3 times in each of 1 of 8 episodes: semantic/00 .physics diverged"
    ):
        play(path, env=env, limit=2)
    done = read_results(path, partial=True)
    assert len(done.trials) == 7
    assert {trial.failures for trial in done.trials} == {(), ("physics diverged",)}
    with pytest.raises(ValueError, match="interrupted after 7 of 8 trials"):
        read_results(path)
    play(path, limit=2)
    assert outcomes(path) == outcomes(tmp_path / "whole.jsonl")
    assert sum(len(trial.failures) for trial in read_results(path).trials) >= 3


class Broken(PointWorld):
    """Fails in every trial."""

    def reset(self, trial):
        raise SimulatorFailed("the renderer is gone")


def test_a_fresh_simulator_takes_the_place_of_a_broken_one(tmp_path):
    """In this process too, if a player can be made. The first trial's line gives the reason."""

    def fresh():
        env = PointWorld()
        return Wanderer(env), env

    whole = play(tmp_path / "whole.jsonl", limit=2)
    results = play(tmp_path / "r.jsonl", env=Broken(), limit=2, make_player=fresh)
    assert outcomes(tmp_path / "r.jsonl") == outcomes(tmp_path / "whole.jsonl")
    assert sorted(trial.failures for trial in results.trials)[-2:] == [(), ("the renderer is gone",)]
    assert len(results.trials) == len(whole.trials)


class Dies(Wanderer):
    """Interrupts the process in its 60th call."""

    calls = 0

    def act(self, observation) -> ActionChunk:
        Dies.calls += 1
        if Dies.calls == 60:
            raise KeyboardInterrupt
        return super().act(observation)


def test_an_interrupted_evaluation_goes_on(tmp_path):
    play(tmp_path / "whole.jsonl")
    env = PointWorld()
    path = tmp_path / "r.jsonl"
    Dies.calls = 0
    options = {"policy_name": "wanderer", "protocol": PROTOCOL, "output": path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(env), env, regime_trials(env, limit=6), **options)
    finished = read_results(path, partial=True).trials
    assert 3 < len(finished) < 24
    with path.open("a") as file:
        file.write('{"trial": "attribute/0')  # a kill during a write leaves half a line
    play(path)
    assert outcomes(path) == outcomes(tmp_path / "whole.jsonl")
    kept = {trial.trial: trial for trial in read_results(path).trials}
    assert all(kept[trial.trial] == trial for trial in finished)  # times too: they were not played again


def test_a_killed_evaluation_goes_on(tmp_path):
    """SIGKILL from outside after some lines. At most the running trial is lost."""
    play(tmp_path / "whole.jsonl")
    path = tmp_path / "r.jsonl"
    script = textwrap.dedent(f"""
        import sys, time; sys.path.insert(0, {ROOT!r})
        from tests.support.point_world import PointWorld, Wanderer
        from agra.evaluation.protocols import Protocol, regime_trials
        from agra.evaluation.rollout import evaluate
        class Slow(PointWorld):
            def reset(self, trial):
                time.sleep(0.05)
                return super().reset(trial)
        env = Slow()
        evaluate(Wanderer(env), env, regime_trials(env, limit=6), policy_name="wanderer",
                 protocol=Protocol(execute_steps=4), output={str(path)!r}, progress=False)
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 5):
        pass
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= len(read_results(path, partial=True).trials) < 24
    play(path)
    assert outcomes(path) == outcomes(tmp_path / "whole.jsonl")


def test_another_header_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    play(path)
    before = path.read_bytes()
    trials = regime_trials(PointWorld(), limit=6)
    moved = [replace(trials[0], scene={**trials[0].scene, "dot": [0.5, 0.5]}), *trials[1:]]
    for key, change in {
        "policy": {"policy_name": "other"},
        "protocol": {"protocol": Protocol(execute_steps=8)},
        "trials_sha256": {"trials": moved},
    }.items():
        with pytest.raises(ValueError, match=rf"r\.jsonl: holds results with {key} .* instead of .*; choose another"):
            play(path, **change)
    assert path.read_bytes() == before
    play(path)  # finished: nothing is played, nothing changes
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="expected trials of one simulator, got no trials"):
        play(tmp_path / "none.jsonl", trials=[])


@pytest.mark.parametrize("key", ["checkpoint_sha256", "computed_on"])
def test_results_name_their_checkpoint_and_device(key, tmp_path):
    """Another one is refused, also that of a server, which is unknown. A file of an earlier version goes on as it is."""
    path = tmp_path / "r.jsonl"
    whole = play(path, **{key: "abc"})
    assert whole.header[key] == "abc"
    for other in ("def", None):
        with pytest.raises(ValueError, match=rf"holds results with {key} 'abc' instead of {other!r}; choose"):
            play(path, **{key: other})
    assert read_results(path) == whole
    earlier = tmp_path / "earlier.jsonl"
    assert key not in play(earlier).header
    lines = earlier.read_text().splitlines(keepends=True)
    earlier.write_text("".join(lines[:-2]))
    again = play(earlier, **{key: "abc"})
    assert len(again.trials) == len(whole.trials)
    assert again == read_results(earlier)
    assert key not in again.header


def test_expert_is_a_policy(tmp_path):
    env = PointWorld()
    results = evaluate(
        Expert(env),
        env,
        regime_trials(env, ["instance"]),
        policy_name="expert",
        protocol=Protocol(execute_steps=1),
        output=tmp_path / "expert.jsonl",
        progress=False,
    )
    assert sum(trial.success for trial in results.trials) == 50


def test_imports_no_torch():
    code = "import sys, agra.evaluation.rollout; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_second_evaluation_into_the_same_file_is_refused(tmp_path):
    env = PointWorld()
    trials = regime_trials(env, limit=2)
    settings = {"policy_name": "expert", "protocol": PROTOCOL, "progress": False}
    with files.lock(tmp_path, ".results.jsonl.lock"):
        with pytest.raises(ValueError, match=rf"results.jsonl: another process \(pid {os.getpid()}\) writes here"):
            evaluate(Expert(env), env, trials, output=tmp_path / "results.jsonl", **settings)
        evaluate(Expert(env), env, trials, output=tmp_path / "others.jsonl", **settings)
    assert len(evaluate(Expert(env), env, trials, output=tmp_path / "results.jsonl", **settings).trials) == len(trials)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    """A results file on a device without room: the error names it."""
    env = PointWorld()
    monkeypatch.setattr("agra.evaluation.rollout._open_results", lambda path, header: {})
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*results\.jsonl"):
        evaluate(
            Expert(env), env, regime_trials(env, limit=2), policy_name="expert", protocol=PROTOCOL,
            output=tmp_path / "results.jsonl", progress=False,
        )  # fmt: skip
