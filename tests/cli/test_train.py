"""Errors of the command line: one line with the problem and the remedy, and an exit code other than 0."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from agra.checkpoints.folder import newest
from agra.cli.arguments import recipe_arguments
from agra.cli.main import main
from agra.evaluation.collect import collect
from agra.policies.load import load_policy
from agra.recipes import PRESETS, RECIPES, compose
from agra.stages import Stage
from tests.support.point_world import demonstrator

SMALL = ["--data.embodiments", "dot", "--data.frame-stride", "1", "--method.alignment.teacher.input-size", "28", "42"]
TRAIN = [
    "--stage.steps",
    "9",
    "--stage.batch-size",
    "2",
    "--stage.save-every",
    "2",
    "--stage.log-every",
    "1",
    "--stage.validate-every",
    "4",
]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A command without flags of its own."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Demonstrations and their frozen features."""
    folder = tmp_path_factory.mktemp("cli")
    collect("point", folder / "set", episodes=6, seed=0, demonstrator=demonstrator, progress=False)
    main(["prepare", "tiny", *data(folder), *SMALL])
    return folder


def data(folder):
    return ["--data.path", str(folder / "set"), "--data.cache", str(folder / "cache")]


def train(folder, output):
    return ["train", "tiny", "--stage", "joint", "--output", str(output), *data(folder), *SMALL, *TRAIN]


def fails(capsys, *arguments):
    """Run a failing command and return its line of error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("agra: error: ")
    return line.removeprefix("agra: error: ")


def misused(capsys, *arguments):
    """Run a command with invalid flags and return tyro's message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_unknown_names_suggest_the_closest(capsys):
    assert "unknown command 'trian'; did you mean 'train'?" in fails(capsys, "trian")
    assert "unknown recipe 'agra_dino_8'; did you mean 'agra_dino_l8'?" in fails(capsys, "train", "agra_dino_8")
    assert "unknown stage 'jiont'; did you mean 'joint'?" in fails(capsys, "train", "tiny", "--stage", "jiont")
    assert "unknown preset 'egodx'; did you mean 'egodex'?" in fails(capsys, "train", "wam", "--with", "egodx")
    assert "did you mean 'tabletop'?" in fails(capsys, "evaluate", "expert", "--simulator", "tabeltop", "--output", "x")


@pytest.mark.parametrize(
    "flags",
    [
        ["--stage=adapt", "--with=gr1_few_shot", "--with=egodex"],
        ["--stage", "adapt", "--with", "gr1_few_shot", "--with", "egodex"],
        ["--with", "gr1_few_shot", "egodex", "--stage", "adapt"],
    ],
)
def test_stage_and_presets_in_every_form_of_a_flag(flags):
    _, config = recipe_arguments("train", ["tiny_wam", *flags, "--stage.steps=7"], NoOptions)
    presets = compose("tiny_wam", Stage.ADAPT, ["gr1_few_shot", "egodex"])
    assert config == replace(presets, stage=replace(presets.stage, steps=7))


def test_a_batch_that_does_not_divide_is_refused_before_training(capsys, prepared, tmp_path):
    command = train(prepared, tmp_path / "run")
    assert "batch_size: 2 does not divide into 1 processes with 3 micro-batches each" in fails(
        capsys, *command, "--parallel.gradient-accumulation-steps", "3"
    )
    assert "is 1 samples in a micro-batch; the method needs a multiple of 4" in fails(
        capsys, *command, "--parallel.gradient-accumulation-steps", "2"
    )
    assert "8 processes are to share the model, but there is 1" in fails(
        capsys, *command, "--parallel.shard-degree", "8"
    )
    assert "agra_dino_l8" not in fails(capsys, *command, "--init-from", tmp_path / "nowhere")
    assert not list((tmp_path / "run").glob("*step*"))


@pytest.mark.parametrize(
    ("flag", "named", "closest"),
    [
        (["--stage.step", "3"], "--stage.step", "--stage.steps"),
        (["--data.pth", "x"], "--data.pth", "--data.path"),
    ],
)
def test_unknown_flag(capsys, tmp_path, flag, named, closest):
    printed = misused(capsys, "train", "tiny", "--output", tmp_path / "run", "--data.path", "x", *flag)
    assert f"Unrecognized options: {named}" in printed
    assert closest in printed.split("Perhaps you meant:")[1]


def test_a_value_of_the_wrong_kind_and_one_out_of_range(capsys, tmp_path):
    base = ["train", "tiny", "--output", tmp_path / "run", "--data.path", "x"]
    assert "Error parsing --stage.steps: invalid literal for int() with base 10: 'many'" in misused(
        capsys, *base, "--stage.steps", "many"
    )
    assert "stage.steps: expected at least 1, got 0" in misused(capsys, *base, "--stage.steps", "0")


def test_missing_dataset(capsys, tmp_path):
    line = fails(capsys, "prepare", "tiny", "--data.path", tmp_path / "nothing")
    assert str(tmp_path / "nothing") in line
    assert "LeRobot" in line


def test_missing_features(capsys, prepared, tmp_path):
    line = fails(
        capsys,
        "train",
        "tiny",
        "--output",
        tmp_path / "run",
        "--data.path",
        prepared / "set",
        "--data.cache",
        tmp_path / "cache",
        "--prepare",
        "False",
        *SMALL,
    )
    assert "run agra prepare" in line


def damaged(prepared, tmp_path, pattern, damage):
    """A copy of the dataset with one file changed by `damage`."""
    shutil.copytree(prepared / "set", tmp_path / "set")
    (path,) = (tmp_path / "set").glob(pattern)
    path.write_bytes(damage(path.read_bytes()))
    return path


def test_truncated_parquet(capsys, prepared, tmp_path):
    path = damaged(prepared, tmp_path, "data/*/*.parquet", lambda content: content[: len(content) // 2])
    line = fails(capsys, "prepare", "tiny", *data(tmp_path), *SMALL)
    assert str(path) in line
    assert "again" in line


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:200] + np.random.default_rng(0).bytes(len(content) - 200),
    ],
    ids=["truncated", "noise"],
)
def test_corrupt_video(capsys, prepared, tmp_path, damage):
    path = damaged(prepared, tmp_path, "videos/*/*/*.mp4", damage)
    line = fails(capsys, "prepare", "tiny", *data(tmp_path), *SMALL)
    assert str(path) in line


def test_interrupted_by_kill_resumes_to_the_same_bits(prepared, tmp_path, capsys):
    """SIGKILL at a random moment. Weights, moments and log are those of a run without it (fifty kills: test_kills)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(train(prepared, whole))
    rng = np.random.default_rng()
    command = [sys.executable, "-m", "agra.cli", *train(prepared, killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log = killed / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.2))
    process.kill()
    process.wait()
    steps = len(log.read_text().splitlines())
    assert newest(killed).name != "step_000009", f"killed too late to test anything: {steps} rows of the log"
    main(train(prepared, killed))
    for name in (
        "video_dit.safetensors",
        "bridge.safetensors",
        "action_dit.safetensors",
        "projectors.safetensors",
        "optimizer.safetensors",
        "norm_stats.json",
        "config.json",
    ):
        assert (killed / "step_000009" / name).read_bytes() == (whole / "step_000009" / name).read_bytes(), (
            name,
            steps,
        )
    assert rows(killed) == rows(whole)


@pytest.mark.slow
def test_torchrun_is_one_process_and_its_policy_acts(prepared, tmp_path, capsys):
    """Two processes under torchrun give the losses of one process. One process resumes their run."""
    eight = ["--stage.batch-size", "8"]
    main([*train(prepared, tmp_path / "one"), *eight])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "agra.cli",
    ]
    first = [*train(prepared, tmp_path / "two"), *eight, "--parallel.activation-checkpointing", "0.5"]
    subprocess.run([*torchrun, *first], check=True, stdout=subprocess.DEVNULL)
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("loss", "video_loss", "action_loss", "alignment_loss"):
            if name in theirs:
                # Adam's first steps divide rounding by itself: what starts as 1e-7 grows with every step.
                assert ours[name] == pytest.approx(theirs[name], rel=2e-6 if ours["step"] == 1 else 2e-3, abs=2e-6)
    last = tmp_path / "two" / "step_000009"
    assert (last / "sharded").is_dir()
    shutil.rmtree(last)  # as if the run had been cut short: one process goes on from step 8
    main([*train(prepared, tmp_path / "two"), *eight])
    assert (last / "video_dit.safetensors").is_file()
    capsys.readouterr()
    main(["export", str(tmp_path / "two" / "step_000008"), "--output", str(tmp_path / "policy")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert sum(p.numel() for p in policy.method.parameters()) > 1e6


@pytest.mark.slow
def test_sigterm_ends_a_run_with_exit_code_0(prepared, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "agra.cli", *train(prepared, run), "--stage.steps", "5000"])
    while process.poll() is None and not (run / "step_000002").is_dir():
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == 0
    assert newest(run) is not None


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("meter/", "samples_per_second"))} for row in found]


def test_a_checkpoint_with_a_flipped_byte(capsys, prepared, tmp_path):
    run = tmp_path / "run"
    main([*train(prepared, run), "--stage.steps", "1"])
    weights = run / "step_000001" / "video_dit.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 3] ^= 1
    weights.write_bytes(content)
    for arguments in (["evaluate", run], ["diagnose", run], [*train(prepared, tmp_path / "next"), "--init-from", run]):
        line = fails(capsys, *arguments)
        assert f"{weights}: checksum differs from manifest.json" in line
        assert "again" in line


def test_resuming_with_other_settings_is_refused(capsys, prepared, tmp_path):
    main([*train(prepared, tmp_path / "run"), "--stage.steps", "1"])
    line = fails(capsys, *train(prepared, tmp_path / "run"), "--stage.steps", "1", "--stage.seed", "3")
    assert "stage.seed is 0 there and 3 here" in line


def test_recipes_lists_every_recipe_and_preset(capsys):
    main(["recipes"])
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [line.split()[0] for line in printed] == [*RECIPES, *PRESETS]
    assert all(len(line.split()) > 3 for line in printed)


def test_no_arguments_print_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    printed = capsys.readouterr().out
    for command in ("collect", "prepare", "train", "evaluate", "compare", "diagnose", "report", "recipes"):
        assert command in printed


@pytest.mark.parametrize(
    ("recipe", "flags", "noted"),
    [
        ("agra_dino_l8", [], True),
        ("agra_dino_l8", ["--init-from", "nvidia/Cosmos-Predict2.5-2B"], False),
        ("tiny", [], False),
    ],
)
def test_random_weights_in_place_of_public_ones_are_announced(
    prepared, tmp_path, capsys, monkeypatch, recipe, flags, noted
):
    monkeypatch.setattr("agra.api.train", lambda config, **options: True)
    main(["train", recipe, "--stage", "adapt", "--output", str(tmp_path / "run"), *data(prepared), *flags])
    assert ("start random; --init-from nvidia/Cosmos-Predict2.5-2B" in capsys.readouterr().err) is noted
