"""Probe samples of the scripted expert, made in this process and in the environment of a simulator, which has no torch."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agra.cli.main import main
from agra.diagnostics.samples.expert_samples import SampleSteps, expert_samples, in_environment
from agra.diagnostics.samples.probe_sample import load_samples
from agra.diagnostics.samples.sources import check_cameras, probe_samples, sample_steps
from agra.recipes import tiny
from agra.simulation import make_simulator
from agra.types import SimulatorFailed


@pytest.fixture
def tabletop():
    simulator = make_simulator("tabletop")
    yield simulator
    simulator.close()


def test_an_environment_without_torch_gives_the_samples_of_this_process(tabletop, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text('raise ImportError("the simulator\'s environment has no torch")\n')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    output = tmp_path / "probes"
    where = ["--simulator", "tabletop", "--simulator-python", sys.executable]
    main(["probes", "tiny", *where, "--samples", "4", "--output", str(output)])
    written, made = load_samples(output), probe_samples(tabletop, 4, tiny())
    assert len(written) == len(made) == 4
    for theirs, ours in zip(written, made, strict=True):
        assert (theirs.trial, theirs.step, theirs.instruction) == (ours.trial, ours.step, ours.instruction)
        for name in ("frames", "masks", "video", "state", "actions", "position"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
        assert theirs.masks.any()
    assert len(list((output / "pictures").glob("*.png"))) == 4 * len(written[0].frames)


def test_the_samples_are_spread_over_the_regimes_that_a_simulator_has(tabletop):
    steps = sample_steps(tiny(), ["tabletop"])
    samples = expert_samples(tabletop, 5, steps)
    assert [sample.regime for sample in samples] == [name for name in tabletop.regimes for _ in range(2)]
    tabletop.regimes = ("in_distribution",)
    assert len(expert_samples(tabletop, 3, steps)) == 3
    with pytest.raises(ValueError, match="unknown task 'fold_towel' of regime 'in_distribution'"):
        expert_samples(tabletop, 3, steps, tasks=["fold_towel"])


@pytest.mark.parametrize("flags", [["--tasks", "pick_and_place"], ["--simulator-python", sys.executable]])
def test_flags_of_a_simulator_need_one(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["probes", "tiny", *flags, "--output", str(tmp_path)])
    assert "--tasks and --simulator-python need --simulator NAME" in capsys.readouterr().err


def test_recipes_that_read_further_cameras():
    """A simulator's samples hold one camera, and joined cameras cannot be cropped one by one."""
    config = tiny()
    several = replace(config, data=replace(config.data, extra_cameras=("wrist",)))
    with pytest.raises(ValueError, match="samples of a simulator hold one camera, but the recipe also reads wrist"):
        sample_steps(several, ["tabletop"])
    cropped = replace(several, data=replace(several.data, path="x", crop_rows=(0, 8)))
    with pytest.raises(ValueError, match="samples need a recipe without extra cameras or without a crop"):
        check_cameras(cropped)


def test_invalid_requests(tabletop, tmp_path):
    steps = {"gr1": SampleSteps(grid=(0,), window=(0,))}
    with pytest.raises(ValueError, match="tabletop: its embodiment tabletop is none of the config's, gr1"):
        expert_samples(tabletop, 1, steps)
    with pytest.raises(FileNotFoundError, match=r"python: no such interpreter; make env-NAME installs"):
        in_environment(tmp_path / "python", "tabletop", 1, steps)
    with pytest.raises(SimulatorFailed, match="its process ended with status 1; the reason is above"):
        in_environment(Path(sys.executable), "no_such_simulator", 1, steps)
