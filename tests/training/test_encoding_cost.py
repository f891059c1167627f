"""Sizes of caches and shares of encoding at the paper's size, on synthetic GR1 episodes of real length."""

import re
from dataclasses import replace

import pytest

from agra import api
from agra.cli.main import main
from agra.data.gr1 import TASKS, task_folder
from agra.data.source import open_sources
from agra.recipes import agra_dino_l8, gr1, gr1_few_shot
from agra.training.encoding_cost import encoding_costs
from agra.training.memory_estimate import encoding_flops_per_sample
from tests.support import layouts

EPISODES, REDUCED = 1000, 20
"""Episodes of a GR1 task, and those of the synthetic one. Sizes are those of the synthetic tasks times 50."""
LENGTHS = (250,) * REDUCED
"""Control steps. GR1's episodes have 200 to 300."""
SCALE = EPISODES // REDUCED


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The 24 task folders, all of them one synthetic dataset whose videos hold nothing."""
    folder = tmp_path_factory.mktemp("gr1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "encode", lambda frames, fps: b"no video")
        layouts.write_gr1(folder / "task", LENGTHS)
    for task in TASKS:
        (folder / task_folder(task)).symlink_to(folder / "task")
    return folder


def config_of(preset, tasks):
    config = preset(agra_dino_l8())
    mixture = tuple(
        source if source.training_episodes is None
        else replace(source, training_episodes=source.training_episodes // SCALE)
        for source in config.data.mixture
    )  # fmt: skip
    return replace(config, data=replace(config.data, path=str(tasks), mixture=mixture))


def test_flops_of_encoding_a_window():
    """Wan's VAE over 17 frames, and DINOv2-B over five."""
    flops = encoding_flops_per_sample(agra_dino_l8().method)
    tokens, width = 32 * 32, 768
    assert flops["targets"] == 5 * 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert 1e12 < flops["latents"] < 1e13


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "episodes", "latents", "targets"), [(gr1, 1000, 968, 2322), (gr1_few_shot, 150, 145, 348)]
)
def test_gr1_needs_no_cache(tasks, preset, episodes, latents, targets):
    """Latents and targets would take terabytes. Encoding them while training takes at most 15 % of a step's FLOPs.

    Of each task, 50 episodes are held out. Of the few-shot setting's, these and 100 others are used.
    """
    config = config_of(preset, tasks)
    sources = open_sources(config.data)
    used = sum(len(source.used) for source in sources)
    assert used * SCALE == 24 * episodes
    costs = {cost.feature: cost for cost in encoding_costs(config, sources)}
    assert costs["latents"].bytes_per_step == 2 * 16 * 5 * 24 * 42 + 4
    assert costs["targets"].bytes_per_step == 2 * 12 * 21 * 768 + 4
    sizes = {name: SCALE * cost.bytes / 1e9 for name, cost in costs.items()}
    assert sizes == pytest.approx({"latents": latents, "targets": targets}, rel=0.02)
    assert not any(cost.cached for cost in costs.values())
    assert sum(cost.fraction for cost in costs.values()) <= 0.15


@pytest.mark.slow
def test_the_command_says_which_and_why(tasks, tmp_path, capsys):
    arguments = ["--with", "gr1", "--data.path", str(tasks), "--data.cache", str(tmp_path), "--estimate", "True"]
    main(["prepare", "agra_dino_l8", *arguments])
    lines = capsys.readouterr().err.splitlines()
    numbers = {
        match[1]: (float(match[2].replace(",", "")), int(match[3]), match[4])
        for line in lines
        if (match := re.match(r"(\w+): cached ([\d,.]+) GB .* (\d+)% of a step's FLOPs; this config: (.+)", line))
    }
    assert set(numbers) == {"latents", "targets"}
    assert {where for _, _, where in numbers.values()} == {"while training"}
    assert SCALE * sum(size for size, _, _ in numbers.values()) == pytest.approx(3290, rel=0.02)


def test_the_size_of_a_cache_is_that_of_its_files(small_cache):
    """Counted from shapes alone, within the files' headers."""
    config, folders = small_cache
    sources = open_sources(config.data)
    for cost in encoding_costs(config, sources):
        files = [
            path for folder in folders if folder.name.startswith(cost.feature) for path in folder.glob("episode-*")
        ]
        assert len(files) == len(sources[0].used)
        whole = sum(path.stat().st_size for path in files)
        assert 0 <= whole - cost.bytes <= 512 * len(files)


@pytest.fixture
def small_cache(tmp_path):
    """A prepared cache of the point world, by tiny public models."""
    from agra.evaluation.collect import collect
    from tests.support import small_cosmos
    from tests.support.point_world import demonstrator

    collect("point", tmp_path / "set", episodes=4, seed=0, demonstrator=demonstrator, progress=False)
    small_cosmos.save_public_models(tmp_path)
    settings = {"path": str(tmp_path / "set"), "cache": str(tmp_path / "cache"), "embodiments": ("dot",)}
    config = small_cosmos.paper_config(tmp_path, **settings)
    return config, api.prepare(config)
