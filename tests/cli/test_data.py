"""Datasets from the command line: conversion, mixtures from a file, estimates, and errors in one line."""

import json
from dataclasses import replace

import pytest

from agra.cli.main import main
from agra.data.features.cache import estimate_cost
from agra.data.lerobot.dataset import LeRobotDataset
from agra.evaluation.collect import collect
from tests.support.layouts import CAMERAS, write_hdf5, write_v2
from tests.support.point_world import demonstrator

SMALL = ["--data.embodiments", "dot", "--method.alignment.teacher.input-size", "28", "42"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli_data")
    for name, seed in (("one", 0), ("two", 1)):
        collect("point", root / name, episodes=4, seed=seed, demonstrator=demonstrator, progress=False)
    return root


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_convert(tmp_path, capsys):
    main(["convert", str(write_v2(tmp_path / "set")), "--output", str(tmp_path / "v3")])
    assert LeRobotDataset(tmp_path / "v3", camera=CAMERAS[0]).layout.version == "v3.0"
    write_hdf5(tmp_path / "hdf5/a.hdf5", "libero")
    main(["convert", str(tmp_path / "hdf5"), "--output", str(tmp_path / "libero"), "--kind", "libero"])
    assert LeRobotDataset(tmp_path / "libero", camera="observation.images.agentview").num_episodes == 2
    capsys.readouterr()
    line = fails(capsys, "convert", tmp_path / "set", "--output", tmp_path / "v3")
    assert "v3: already exists" in line
    line = fails(capsys, "convert", tmp_path, "--output", tmp_path / "x", "--kind", "egodex")
    assert "no EgoDex trajectories here" in line or "no group 'transforms'" in line


def test_prepare_opens_the_networks_that_training_will_need(folder, tmp_path, monkeypatch):
    """Those of features that are not cached, since the machines of the training may have no network connection."""
    opened = []
    monkeypatch.setattr("agra.data.features.online.open_codec", lambda *arguments, **options: opened.append("codec"))
    monkeypatch.setattr(
        "agra.data.features.online.open_teacher", lambda *arguments, **options: opened.append("teacher")
    )
    flags = ["--data.path", str(folder / "one"), "--data.cache", str(tmp_path), *SMALL, "--data.cached", "frames"]
    main(["prepare", "tiny", *flags])
    assert opened == ["codec", "teacher"]


def test_mixture_by_file(folder, tmp_path, capsys):
    sources = [{"path": "one", "embodiment": "dot"}, {"path": "two", "embodiment": "dot", "weight": 3.0}]
    (tmp_path / "mix.json").write_text(json.dumps(sources))
    flags = ["--mixture", str(tmp_path / "mix.json"), "--data.path", str(folder)]
    flags += ["--data.cache", str(tmp_path / "cache"), *SMALL]
    main(["prepare", "tiny", *flags, "--estimate", "True"])
    said = capsys.readouterr().err
    assert said.count("4 episodes to prepare") == 2
    assert not list((tmp_path / "cache").glob("latents-*"))
    main(["prepare", "tiny", *flags])
    steps = ["--stage.steps", "1", "--stage.batch-size", "2"]
    main(["train", "tiny", "--output", str(tmp_path / "run"), *flags, *steps])
    config = json.loads((tmp_path / "run/step_000001/config.json").read_text())
    assert [source["weight"] for source in config["data"]["mixture"]] == [1.0, 3.0]


def test_features_of_all_datasets_together_have_to_fit_on_the_disk(folder, tmp_path, capsys, monkeypatch):
    """Those of each dataset alone would fit."""
    sources = [{"path": "one", "embodiment": "dot"}, {"path": "two", "embodiment": "dot"}]
    (tmp_path / "mix.json").write_text(json.dumps(sources))
    flags = ["--mixture", str(tmp_path / "mix.json"), "--data.path", str(folder)]
    flags += ["--data.cache", str(tmp_path / "cache"), *SMALL]
    sizes = []

    def estimate(*args, **options):
        estimate = estimate_cost(*args, **options)
        sizes.append(estimate.bytes)
        return replace(estimate, free_bytes=estimate.bytes * 3 // 2)

    monkeypatch.setattr("agra.data.features.cache.estimate_cost", estimate)
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", "tiny", *flags])
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert f"the features need about {sum(sizes) / 2**20:,.1f} MiB, but" in line
    assert len(sizes) == 2


def test_a_wrong_mixture_is_named(folder, tmp_path, capsys):
    path = tmp_path / "mix.json"
    for content, message in (
        ('[{"path": "one", "wieght": 2.0}]', "the closest known key is 'weight'"),
        ('[{"path": "one"}]', "source 'one' has no embodiment; set it for every source of a mixture"),
        ("[", "mix.json: not JSON"),
        ('[{"path": "none", "embodiment": "dot"}]', "none: not a LeRobot dataset"),
    ):
        path.write_text(content)
        line = fails(capsys, "prepare", "tiny", "--mixture", path, "--data.path", folder, *SMALL)
        assert message in line
    path.write_text('[{"path": "one", "embodiment": "dot"}]')
    for flag in (["--data.past-end", "mask"], ["--data.frame_stride=2"], ["--data.normalization", "mean_std"]):
        line = fails(capsys, "prepare", "tiny", "--mixture", path, "--data.path", folder, *SMALL, *flag)
        name = flag[0].split("=")[0]
        assert f"{name}: sets a single dataset, but each source of a mixture has its own settings" in line
    line = fails(capsys, "prepare", "tiny", "--data.path", folder / "one", "--rank", "2", "--world-size", "2", *SMALL)
    assert "--rank 2: expected 0 to 1" in line
    line = fails(capsys, "prepare", "tiny", "--data.path", folder / "one", "--shard", "2/2", *SMALL)
    assert "shard: expected I/N with I from 0 to N - 1, got 2/2" in line


def test_a_shard_of_prepare_is_one_of_several_processes(folder, monkeypatch):
    calls = []

    class Recorded:
        def estimate(self):
            return ()

        def run(self, *, rank, world_size):
            calls.append((rank, world_size))
            return []

        def open_uncached(self):
            calls.append("opened")

    monkeypatch.setattr("agra.api.preparation", lambda config, device: Recorded())
    for shard in (("--shard", "3/4"), ("--rank", "1", "--world-size", "2"), ()):
        main(["prepare", "tiny", "--data.path", str(folder / "one"), *shard])
    assert calls == [(3, 4), (1, 2), (0, 1), "opened"]
