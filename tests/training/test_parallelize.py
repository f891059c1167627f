"""Several processes compute what one computes: gradients, losses and samples, through stops, moves and failures.

Tolerances: losses within 2e-6 (absolute, and of their value), gradients within 2e-6 of the largest entry of their tensor, both float32;
sums over processes are taken in another order than in one process.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from agra.checkpoints.folder import newest, verify
from agra.checkpoints.read import load_parts, read_config
from agra.policies.export import export
from agra.recipes import RECIPES
from agra.stages import Stage
from agra.training.distributed import distributed_context, make_mesh
from agra.training.memory_estimate import fake_batch
from agra.training.parallelize import ParallelConfig, apply, check_batch_size
from tests.support.ranks import Launcher
from tests.support.small import with_model

QUIET = {"save_every": 100, "validate_every": 100, "steps": 3}
LOSS = GRADIENT = 2e-6
SLOW = pytest.mark.slow  # many processes or long compilation, on a machine of two cores
COMPILED = pytest.mark.timeout(1200)
LAYOUTS = [
    pytest.param(1, {"gradient_accumulation_steps": 2, "activation_checkpointing": 0.5}, id="two micro-batches"),
    pytest.param(
        2, {"gradient_accumulation_steps": 2, "activation_checkpointing": 1}, id="two ranks, two micro-batches"
    ),
    pytest.param(
        2,
        {"gradient_accumulation_steps": 2, "reduce_every_micro_batch": True},
        id="reduced every micro-batch",
        marks=SLOW,
    ),
    pytest.param(4, {}, id="four ranks", marks=SLOW),
    pytest.param(1, {"compile": True, "activation_checkpointing": 1}, id="compiled", marks=[SLOW, COMPILED]),
    pytest.param(2, {"compile": True}, id="two ranks, compiled", marks=[SLOW, COMPILED]),
    pytest.param(4, {"shard_degree": 2}, id="two copies of two shards", marks=SLOW),
]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    made = Launcher(tmp_path_factory.mktemp("launcher") / "errors")
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(launcher, tmp_path_factory):
    """The reference run of one process."""
    output = tmp_path_factory.mktemp("whole")
    assert launcher.run(1, output, stage=QUIET, gradients=True) == [0], launcher.errors
    return output


@pytest.fixture(scope="module")
def two(launcher, tmp_path_factory):
    """The run of two processes."""
    output = tmp_path_factory.mktemp("two")
    assert launcher.run(2, output, stage=QUIET, gradients=True) == [0, 0], launcher.errors
    return output


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(ours, theirs):
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    losses = ("loss", "video_loss", "action_loss", "alignment_loss")
    names = (*losses, "learning_rate", *(f"validation/{name}" for name in losses))
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: mine[k] for k in names if k in mine} == pytest.approx(
            {k: other[k] for k in names if k in other}, rel=LOSS, abs=LOSS
        )


def seen(output, ranks):
    """The samples of every step, in the order of the whole batch: rank r has the rows r::ranks. A later start wins."""
    found = {}
    for rank in range(ranks):
        for step, values in map(json.loads, (output / f"seen_{rank}.jsonl").read_text().splitlines()):
            found.setdefault(step, {})[rank] = values
    return {step: [row for group in zip(*(v[r] for r in range(ranks)), strict=True) for row in group]
            for step, v in found.items()}  # fmt: skip


def assert_same_run(output, size, whole):
    ours, theirs = (load_file(folder / "gradients.safetensors") for folder in (output, whole))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if name.endswith("attn.to_k.bias"):
            continue  # softmax ignores it: zero but for rounding
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=GRADIENT * gradient.abs().max().item(), msg=name)
    assert_same_losses(rows(output), rows(whole))
    assert "validation/loss" in rows(output)[-1]
    assert seen(output, size) == seen(whole, 1)


def test_two_processes_are_one(whole, two):
    assert_same_run(two, 2, whole)


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS)
def test_other_layouts_are_one_process_too(launcher, whole, tmp_path, size, parallel):
    assert launcher.run(size, tmp_path, stage=QUIET, gradients=True, parallel=parallel) == [0] * size, launcher.errors
    assert_same_run(tmp_path, size, whole)


@pytest.mark.parametrize(
    "moves",
    [
        pytest.param([(2, [1, 0], 1), (1, None, 3)], id="two to one"),
        pytest.param([(4, [3, 0], 1), (2, [0, 1], 2), (1, None, 3)], id="four to two to one", marks=SLOW),
        pytest.param([(1, [0, 0], 1), (4, None, 3)], id="one to four", marks=SLOW),
    ],
)
def test_a_run_moves_to_another_number_of_processes(launcher, whole, tmp_path, moves):
    """SIGTERM to one process stops all of them with a checkpoint and exit code 0. Other processes continue with the same samples and losses."""
    order = {}
    for size, stop, saved in moves:
        assert launcher.run(size, tmp_path, stage=QUIET, stop=stop) == [0] * size, launcher.errors
        assert newest(tmp_path).name == f"step_{saved:06d}"
        order |= seen(tmp_path, size)
        for path in tmp_path.glob("seen_*"):
            path.unlink()
    assert_same_losses(rows(tmp_path), rows(whole))
    assert order == seen(whole, 1)


def test_shards_are_read_as_a_checkpoint_of_one_process_is(whole, two, tmp_path):
    """The shards have a config, checksums and the weights of one process, up to rounding that Adam amplifies."""
    one, sharded = newest(whole), tmp_path / "copy"
    shutil.copytree(newest(two), sharded)
    verify(sharded)
    manifest = json.loads((sharded / "manifest.json").read_text())
    assert {"config.json", "trainer.json", "norm_stats.json"} <= manifest.keys()
    assert sum(name.startswith("sharded/") for name in manifest) == 2
    methods = []
    for folder in (one, sharded):
        methods.append(read_config(folder).method.build())
        load_parts(methods[-1].parts(), folder)
    for (name, mine), other in zip(methods[1].named_parameters(), methods[0].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-4, msg=name)
    adapted = read_config(sharded).method.build()
    load_parts({"video_dit": adapted.wam.video_dit}, sharded)
    for mine, other in zip(adapted.wam.video_dit.parameters(), methods[1].wam.video_dit.parameters(), strict=True):
        assert torch.equal(mine, other)
    config = read_config(sharded)
    head = dataclasses.replace(config.method.model.action_dit, hidden_dim=8)
    narrow = with_model(config, action_dit=head).method.build()
    with pytest.raises(ValueError, match="made for another architecture"):
        load_parts(narrow.parts(), sharded)
    damaged = next((sharded / "sharded").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="checksum differs from manifest"):
        verify(sharded)


@pytest.mark.slow
def test_averages_are_kept_over_a_move(launcher, tmp_path):
    """Two processes and then one give the averaged weights of a single process."""
    stage = {**QUIET, "ema_decay": 0.5}
    assert launcher.run(1, tmp_path / "one", stage=stage) == [0], launcher.errors
    assert launcher.run(2, tmp_path / "two", stage=stage, stop=[1, 1]) == [0, 0], launcher.errors
    half = load_file(export(tmp_path / "two", tmp_path / "half", ema=True) / "video_dit.safetensors")
    assert launcher.run(1, tmp_path / "two", stage=stage) == [0], launcher.errors
    ours, theirs = (
        load_file(export(tmp_path / name, tmp_path / f"{name}_policy", ema=True) / "video_dit.safetensors")
        for name in ("two", "one")
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-4, msg=name)
    assert any(not torch.equal(half[name], ours[name]) for name in ours)


def test_a_number_that_is_not_finite_is_traced_to_its_sample(launcher, tmp_path):
    stage = {"steps": 3, "save_every": 1, "validate_every": 100}
    assert launcher.run(2, tmp_path, stage=stage, poison={"1": [5]}) == [1, 1]
    told = [line for line in launcher.errors.splitlines() if "step 1: the loss is nan" in line]
    assert len(told) == 2
    for line in told:
        assert "first in wam.action_dit.state_encoder.layer1, state of sample 5 of step 1" in line
        assert "is intact" in line
    assert newest(tmp_path).name == "step_000001"
    verify(newest(tmp_path))


def test_a_full_disk_loses_nothing(launcher, tmp_path):
    """Files are limited to 20 kB. Writing more fails as on a full disk."""
    assert launcher.run(1, tmp_path, stage=QUIET, stop=[0, 0]) == [0], launcher.errors
    before = newest(tmp_path)
    for size in (2, 1):
        assert launcher.run(size, tmp_path, stage=QUIET, bytes=20_000) == [1] * size, launcher.errors
        line = launcher.errors.strip().splitlines()[-1]
        assert "the checkpoint of step 3 could not be written" in line
        assert f"{before} is intact" in line
        assert [path.name for path in tmp_path.glob("*step*")] == [before.name]
        verify(before)


def test_too_few_processes_for_the_mesh_are_named():
    with pytest.raises(
        ValueError, match=r"parallel\.shard_degree: 8 processes are to share the model, but there are 4; start"
    ):
        make_mesh("cpu", 8, 4)
    with pytest.raises(ValueError, match=r"4 processes do not divide into copies of 3"):
        make_mesh("cpu", 3, 4)
    with (
        pytest.raises(ValueError, match="2 processes are to share the model, but there is 1"),
        distributed_context("cpu", shard_degree=2, deterministic=False),
    ):
        pass
    with pytest.raises(ValueError, match=r"parallel\.gradient_accumulation_steps: expected at least 1, got 0"):
        ParallelConfig(gradient_accumulation_steps=0)


def test_batches_divide_into_equal_micro_batches():
    check_batch_size(32, 4, 1, 1)
    check_batch_size(30, 4, 1, 1)  # one process alone rounds
    check_batch_size(32, 4, 2, 4)
    with pytest.raises(ValueError, match="32 does not divide into 3 processes with 1 micro-batches each"):
        check_batch_size(32, 1, 1, 3)
    with pytest.raises(ValueError, match="is 2 samples in a micro-batch; the method needs a multiple of 4"):
        check_batch_size(32, 4, 2, 8)


@pytest.fixture
def capture_alone(monkeypatch):
    """Dynamo's capture without the compiler behind it, with an error where it would give a function up."""
    compile_ = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("capture_alone")
def test_blocks_of_many_shapes_stay_compiled():
    """As those of the diffusion policy's U-Net, which share one function."""

    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Block(width) for width in range(2, 12))

        def blocks(self):
            return list(self.layers)

    class Block(torch.nn.Linear):
        def __init__(self, width):
            super().__init__(width, width)

        def forward(self, x):
            return super().forward(x) * self.in_features

    method = Blocks()
    apply(method, ParallelConfig(compile=True))
    for block in method.blocks():
        block(torch.ones(2, block.in_features))
    assert torch._dynamo.config.recompile_limit > 8


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(name for name in RECIPES if name.startswith("tiny")))
@pytest.mark.usefixtures("capture_alone")
def test_every_method_stays_compiled_in_training_and_validation(recipe):
    config = RECIPES[recipe](Stage.JOINT)
    method, batch = config.method.build(), fake_batch(config.method, 4)
    apply(method, ParallelConfig(compile=True))
    for _ in range(2):
        method.train()
        method(batch).total.backward()
        method.eval()
        with torch.no_grad():
            method(batch)


def test_a_single_process_uses_the_gpu_that_it_is_given(monkeypatch):
    """The random numbers that each shard restores are those of torch's current device."""
    gpu, used = torch.device("cuda", 1), []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("agra.training.distributed.local_device", lambda name: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    with distributed_context("cuda:1", shard_degree=None, deterministic=False) as context:
        assert (context.device, used) == (gpu, [gpu])
