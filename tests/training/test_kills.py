"""Fifty times SIGKILL, at random moments and often while a checkpoint is written, and the weights are the same bits.

AGRA_KILLS changes the number, AGRA_KILL_SEED the moments (by default they are different every time).
"""

import contextlib
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from agra.checkpoints.folder import newest, verify
from tests.support.ranks import Launcher

KILLS = int(os.environ.get("AGRA_KILLS", "50"))
STEPS = 16
STAGE = {"steps": STEPS, "save_every": 1, "validate_every": 100, "log_every": 1}


def weights(run):
    """Every tensor of the last checkpoint's shards, by file."""
    folder = newest(run)
    assert folder.name == f"step_{STEPS:06d}"
    return {path.name: load_file(path) for path in sorted((folder / "sharded").glob("*.safetensors"))}


def kill(launcher, output, rng, whole):
    """Start two processes and kill both at some moment of the `whole` seconds that they would take, or while they write;
    False where they had ended by then."""
    ranks = launcher.start(2, output, stage=STAGE)
    time.sleep(rng.uniform(0.05, 1) * whole)
    if rng.random() < 0.5:
        until = time.monotonic() + 10
        while not any(output.glob(".step_*.writing")) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
    return launcher.wait() != [0, 0]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_change_no_bit(tmp_path):
    seed = int(os.environ.get("AGRA_KILL_SEED", random.SystemRandom().randrange(10**6)))
    rng = random.Random(seed)
    launcher = Launcher(tmp_path / "errors")
    begun = time.monotonic()
    assert launcher.run(2, tmp_path / "whole", stage=STAGE) == [0, 0], launcher.errors
    whole = time.monotonic() - begun
    expected = weights(tmp_path / "whole")
    kills = writing = runs = resumes = 0
    while kills < KILLS:
        runs += 1
        run, reached = tmp_path / f"run_{runs}", 0
        while kills < KILLS and kill(launcher, run, rng, whole):
            kills += 1
            writing += any(run.glob(".step_*.writing"))
            found = newest(run) if run.is_dir() else None
            if found is not None:
                verify(found)
                assert int(found.name[5:]) >= reached, f"seed {seed}: a checkpoint was lost"
                reached = int(found.name[5:])
                resumes += 1
        assert launcher.run(2, run, stage=STAGE) == [0, 0], launcher.errors
        ours = weights(run)
        assert ours.keys() == expected.keys()
        for name, tensors in expected.items():
            for key, value in tensors.items():
                assert torch.equal(ours[name][key], value), f"seed {seed}: {name}: {key}"
        assert not [*run.glob(".step_*")], "what killed runs left is cleared"
    launcher.close()
    print(f"seed {seed}: {kills} kills in {runs} runs, {writing} while writing, {resumes} after the first checkpoint")
    assert kills >= KILLS
    assert writing > 0 or KILLS < 10
