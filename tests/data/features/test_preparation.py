"""`agra prepare` in several processes, on a full disk, and under torchrun."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agra import api
from agra.cli.main import main
from agra.data.config import DataConfig
from agra.data.features import preparation
from agra.data.features.cache import CachedFeature
from agra.data.features.encoders import open_codec
from agra.data.features.preparation import Preparation
from agra.data.lerobot.writer import write_dataset
from agra.data.source import open_sources
from agra.recipes import tiny
from agra.types import Embodiment, Episode
from tests.support.full_disk import file_size_limit

ROBOT = Embodiment(name="tabletop", state_names=tuple("abcdefghijkl"), action_names=tuple("abcdefghijkl"))
FLAGS = (
    *("--method.model.frame-size", "32", "48", "--method.model.bridge.position-grid", "2", "2", "3"),
    *("--method.alignment.teacher.input-size", "28", "42"),
)


def make_episode(index: int, length: int) -> Episode:
    rng = np.random.default_rng(index)
    return Episode(
        frames=rng.integers(0, 255, (length, 32, 48, 3), dtype=np.uint8),
        states=rng.normal(size=(length, 12)),
        actions=rng.normal(size=(length, 12)),
        instruction=f"task {index % 3}",
        embodiment="tabletop",
        fps=10,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preparation") / "set"
    write_dataset(path, (make_episode(i, n) for i, n in enumerate((18, 9, 21, 7, 12))), embodiment=ROBOT, fps=10)
    return path


def config_of(dataset: Path, cache: Path):
    config = tiny()
    method = config.method
    teacher = replace(method.alignment.teacher, input_size=(28, 42))
    method = replace(
        method,
        model=replace(method.model, frame_size=(32, 48), bridge=replace(method.model.bridge, position_grid=(2, 2, 3))),
        alignment=replace(method.alignment, teacher=teacher),
    )
    data = DataConfig(path=str(dataset), cache=str(cache), frame_stride=4, target_steps=4)
    return replace(config, method=method, data=data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def one_process(dataset, tmp_path_factory) -> dict[str, bytes]:
    """The cache of one process."""
    cache = tmp_path_factory.mktemp("preparation") / "cache"
    api.prepare(config_of(dataset, cache))
    files = contents(cache)
    for kind in ("codec", "latents", "targets", "instructions"):
        assert any(name.startswith(kind) for name in files), kind
    return files


def test_whether_features_are_missing_is_answered_without_reading_them(dataset, tmp_path, monkeypatch):
    config = config_of(dataset, tmp_path / "cache")
    assert Preparation(config.method, config.data, open_sources(config.data)).missing
    api.prepare(config)
    monkeypatch.setattr(CachedFeature, "_load", lambda *arguments: pytest.fail("read an episode"))
    assert not Preparation(config.method, config.data, open_sources(config.data)).missing


@pytest.mark.parametrize(("order", "few"), [((0, 1), 16), ((1, 0), 0)])
def test_two_ranks_give_the_cache_of_one_process(dataset, one_process, tmp_path, monkeypatch, order, few):
    """Byte for byte, in either order, with instructions of the first rank alone or of both ranks."""
    monkeypatch.setattr(preparation, "_FEW", few)
    config = config_of(dataset, tmp_path / "cache")
    for rank in order:
        Preparation(config.method, config.data, open_sources(config.data)).run(rank=rank, world_size=2)
    assert contents(tmp_path / "cache") == one_process


@pytest.mark.slow
def test_torchrun_gives_the_cache_of_one_process(dataset, one_process, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    recipe = ["tiny", *FLAGS, "--data.path", str(dataset), "--data.cache", str(tmp_path / "cache")]
    subprocess.run([*torchrun, "-m", "agra.cli", "prepare", *recipe], check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "cache") == one_process


def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(dataset, tmp_path, capsys):
    """The limit stops the codec, the first file."""
    arguments = ["prepare", "tiny", *FLAGS, "--data.path", str(dataset), "--data.cache", str(tmp_path / "cache")]
    with file_size_limit(2000), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"agra: error: {tmp_path / 'cache'}")
    assert "codec" in line
    assert "File too large" in line
    assert contents(tmp_path / "cache") == {}


def test_a_full_disk_leaves_no_codec(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "cache")
    sources = open_sources(config.data)
    with file_size_limit(2000), pytest.raises(OSError, match=r"codec-[0-9a-f]+\.safetensors"):
        open_codec(config.method, config.data, sources)
    assert list((tmp_path / "cache").iterdir()) == []
    open_codec(config.method, config.data, sources)
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["codec"]
