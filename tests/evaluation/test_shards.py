"""Four shards of an evaluation and of a collection, merged, equal a single one."""

import json
from dataclasses import replace

import pytest

from agra.cli.main import main
from agra.evaluation import rollout
from agra.evaluation.collect import ActionNoise, collect, merge_collection
from agra.evaluation.protocols import Protocol, Shard, parse_shard, regime_trials, shard_paths
from agra.evaluation.results import merge_results
from agra.evaluation.rollout import evaluate
from agra.evaluation.tables import summary_table, task_table
from tests.support.outcomes import reproducible
from tests.support.point_world import PointWorld, Wanderer, demonstrator, training_trials

FOUR = [Shard(index=index, count=4) for index in range(4)]
NOISE = ActionNoise(std={"a_*": 0.02})


def play(output, **options):
    env = PointWorld()
    settings = {"policy_name": "wanderer", "protocol": Protocol(execute_steps=4), "videos": 1, "progress": False}
    return evaluate(Wanderer(env), env, regime_trials(env, limit=6), output=output, **settings | options)


def record(output, **options):
    settings = {
        "episodes": 12,
        "seed": 1,
        "noise": NOISE,
        "spare": 2.0,
        "progress": False,
        "demonstrator": demonstrator,
    }
    return collect("point", output, **settings | options)


def contents(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_items_are_in_one_shard_each():
    items = list(range(10))
    assert [list(shard.of(items)) for shard in FOUR] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert parse_shard("3/4") == FOUR[3]
    for text in ("4/4", "-1/4", "1", "a/b", "0/0", "1/4/2", ""):
        with pytest.raises(ValueError, match="shard: expected I/N"):
            parse_shard(text)


def test_merged_results_equal_a_single_file_bit_for_bit(tmp_path, monkeypatch):
    """With a clock that stands still, since a results file also holds times."""
    monkeypatch.setattr(rollout.time, "perf_counter", lambda: 0.0)
    single = play(tmp_path / "single" / "r.jsonl")
    output = tmp_path / "shards" / "r.jsonl"
    sizes = [len(play(output, shard=shard).trials) for shard in FOUR]
    assert sizes == [6, 6, 6, 6]
    assert not output.exists()
    assert merge_results(output) == single
    assert output.read_bytes() == (tmp_path / "single" / "r.jsonl").read_bytes()
    videos = {path.name for path in (tmp_path / "shards" / "r-videos").iterdir()}
    assert len(videos) == 4
    assert videos == {path.name for path in (tmp_path / "single" / "r-videos").iterdir()}
    assert merge_results(output) == play(output) == single  # a second time, and nothing is left to play


def test_incomplete_or_different_shards_are_not_merged(tmp_path):
    output = tmp_path / "r.jsonl"
    with pytest.raises(FileNotFoundError, match="no shards beside it"):
        merge_results(output)
    for shard in FOUR[:3]:
        play(output, shard=shard)
    with pytest.raises(ValueError, match=r"18 of 24 trials \(r.shard-0-of-4.jsonl 6, .*run the unfinished ones again"):
        merge_results(output)
    assert not output.exists()
    last = FOUR[3].path(output)
    play(output, shard=FOUR[3], policy_name="another")
    with pytest.raises(ValueError, match=r"shard-3-of-4.jsonl: policy is 'another', but 'wanderer'"):
        merge_results(output)
    last.unlink()
    play(output, shard=Shard(index=0, count=2))
    with pytest.raises(ValueError, match=r"trial 'attribute/00' is in two shards"):
        merge_results(output)
    assert len(shard_paths(output)) == 4


@pytest.mark.parametrize("key", ["checkpoint_sha256", "computed_on"])
def test_shards_of_different_checkpoints_or_devices_are_not_merged(key, tmp_path):
    output = tmp_path / "r.jsonl"
    for shard, value in zip(FOUR, (None, "abc", "abc", "def"), strict=True):  # the first one is of an earlier version
        play(output, shard=shard, **{key: value})
    with pytest.raises(ValueError, match=rf"shard-3-of-4.jsonl: {key} is 'def', but 'abc' in r.shard-1-of-4"):
        merge_results(output)
    for shard in (FOUR[0], FOUR[3]):
        shard.path(output).unlink()
        play(output, shard=shard, **{key: "abc"})
    assert merge_results(output).header[key] == "abc"


def test_shards_of_earlier_versions_are_merged_with_others(tmp_path):
    """They name no checkpoint, and then neither does the merged file."""
    output = tmp_path / "r.jsonl"
    for shard, checkpoint in zip(FOUR, (None, "abc", "abc", "abc"), strict=True):
        play(output, shard=shard, checkpoint_sha256=checkpoint)
    assert "checkpoint_sha256" not in merge_results(output).header


def test_a_shard_without_trials(tmp_path):
    """Five shards of four trials."""
    output, env = tmp_path / "r.jsonl", PointWorld()
    parts = [Shard(index=index, count=5) for index in range(5)]
    results = [
        evaluate(Wanderer(env), env, regime_trials(env, limit=1), policy_name="wanderer", protocol=Protocol(), output=output,
                 shard=shard, progress=False)
        for shard in parts
    ]  # fmt: skip
    assert [len(result.trials) for result in results] == [1, 1, 1, 1, 0]
    table = summary_table(results[-1])
    assert (table.row_count, table.caption) == (0, "no trials: there are more shards than trials")
    assert task_table(results[-1]).row_count == 0
    assert len(merge_results(output).trials) == 4


def test_an_interrupted_shard_goes_on(tmp_path):
    output, shard = tmp_path / "r.jsonl", FOUR[1]
    whole = play(output, shard=shard)
    path = shard.path(output)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])
    again = play(output, shard=shard)
    assert [reproducible(trial) for trial in again.trials] == [reproducible(trial) for trial in whole.trials]


def test_a_merged_collection_equals_a_single_one_bit_for_bit(tmp_path):
    """Some of the first twelve attempts fail. The merge replaces them."""
    single = record(tmp_path / "single" / "set")
    assert single.failed > 0
    output = tmp_path / "shards" / "set"
    shards = [record(output, shard=shard) for shard in FOUR]
    assert sum(shard.attempts for shard in shards) == 12
    assert sum(shard.episodes for shard in shards) < 12
    assert not output.exists()
    merged = merge_collection(output, demonstrator=demonstrator, progress=False)
    assert contents(output) == contents(tmp_path / "single" / "set")
    assert replace(merged, path=single.path) == single
    assert [path.name for path in output.parent.iterdir()] == ["set"]
    assert merge_collection(output, demonstrator=demonstrator, progress=False).already_there


def test_a_collection_of_tasks_plays_nothing_again(tmp_path):
    def tasks(count, seed):
        return [replace(trial, task=("left", "right")[i % 2]) for i, trial in enumerate(training_trials(count, seed))]

    def make(name):
        return replace(demonstrator(name), trials=tasks, tasks=("left", "right"))

    settings = {"episodes": None, "per_task": 3, "demonstrator": make}
    record(tmp_path / "single", **settings)
    output, shards = tmp_path / "set", [Shard(index=index, count=2) for index in range(2)]
    for shard in shards:
        record(output, shard=shard, **settings)
    kept = {path: path.stat().st_mtime_ns for shard in shards for path in shard.path(output).iterdir()}
    for shard in shards:
        record(output, shard=shard, **settings)
    attempts = {path: time for path, time in kept.items() if path.suffix == ".safetensors"}
    assert len(attempts) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in attempts.items())
    merge_collection(output, demonstrator=make, progress=False)
    assert contents(output) == contents(tmp_path / "single")


def test_a_shard_of_another_collection_is_refused(tmp_path):
    output = tmp_path / "set"
    record(output, shard=FOUR[0])
    with pytest.raises(ValueError, match=r"set.shard-0-of-4: holds a shard with seed 1 instead of 2"):
        record(output, seed=2)
    with pytest.raises(FileNotFoundError, match="no shards beside it"):
        merge_collection(tmp_path / "other")


def test_the_command_line(tmp_path, capsys):
    output = tmp_path / "r.jsonl"
    for index in range(2):
        main(["evaluate", "expert", "--output", str(output), "--limit", "1", "--shard", f"{index}/2", "--videos", "0"])
    capsys.readouterr()
    main(["merge", str(output)])
    assert "expert on tabletop" in capsys.readouterr().out
    assert json.loads(output.read_text().splitlines()[0])["num_trials"] == 4
    with pytest.raises(SystemExit):
        main(["collect", "tabletop", "--output", str(tmp_path / "d"), "--episodes", "1", "--shard", "2/2"])
    assert "shard: expected I/N with I from 0 to N - 1, got 2/2" in capsys.readouterr().err
