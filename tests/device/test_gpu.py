"""The device tests again on a real GPU: `make test-gpu`. On a CPU the same functions run as slow tests, so that they stay true.

What stands in elsewhere is real here: the meta device is a GPU, Dynamo's capture is Inductor with CUDA graphs, the rules of
CUDA's autocast are CUDA's, the planned memory is the allocator's, and gloo is NCCL.
"""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from agra import api
from agra.checkpoints.folder import newest
from agra.data.features.online import OnlineEncoder
from agra.data.features.preparation import open_instructions
from agra.data.sampling.prefetch import Prefetched, on_device
from agra.data.source import embodiment_stats, open_sources
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.samples.probe_sample import save_samples
from agra.diagnostics.samples.sources import dataset_samples
from agra.policies.latency import random_policy, timed
from agra.policies.load import load_policy
from agra.recipes import at_stage, tiny
from agra.stages import Stage
from agra.training.distributed import DistributedContext
from agra.training.memory_estimate import fake_batch, measure
from agra.training.parallelize import ParallelConfig, apply
from agra.training.trainer import Trainer
from agra.types import PolicyRequest
from agra.wam.codec import WanCodec
from agra.weights import read_tensors
from tests.support import gather, small_cosmos

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(scope="module")
def precise(prepared):
    """The prepared recipe in float32, so that a GPU and a CPU compute the same up to rounding."""
    return replace(prepared, stage=replace(prepared.stage, precision="float32", ema_decay=0.9))


# --- threads (test_threads.py) -----------------------------------------------------------------------------------------


@on_each
def test_threads_encode_and_decode_as_one_does(device):
    codec = WanCodec(small_cosmos.wan()).to(device)
    clips = torch.rand(3, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    videos = [clips + 0.01 * number for number in range(4)]
    alone = [codec.encode(video) for video in videos]
    decoded = [codec.decode(latents) for latents in alone]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(codec.encode, videos), alone))
            assert all(map(torch.equal, pool.map(codec.decode, alone), decoded))
    assert alone[0].device.type == device


@on_each
def test_encoding_while_training_equals_the_cache(make_config, device):
    """Bit for bit, on the device that made the cache: two workers encode beside the main thread."""
    samplers = []
    for cached in (("latents", "targets"), ()):
        config = make_config(cached=cached)
        api.prepare(config, device=device)
        sources = open_sources(config.data)
        tokens = open_instructions(config.method, config.data, sources)
        online = OnlineEncoder.open(config.method, config.data, sources, device=device)
        samplers.append(api.make_sampler(config, sources, embodiment_stats(sources), tokens, online))
    stored, online = samplers
    with Prefetched(online.batch, workers=2, pin=device == "cuda") as batches:
        for step in range(4):
            held_out = online.validation_batch()
            batch, expected = batches(step), stored.batch(step)
            assert torch.equal(batch.latents.cpu(), expected.latents)
            assert torch.equal(batch.targets.cpu(), expected.targets)
            assert torch.equal(held_out.latents, stored.validation_batch().latents)


# --- commands (test_placement.py, test_edges.py) -----------------------------------------------------------------------


@pytest.fixture
def probes(prepared, tmp_path):
    samples = dataset_samples(prepared, 3)
    masks = np.zeros_like(samples[0].masks)
    masks[:, :16, :16] = True
    save_samples([replace(sample, masks=masks, position=None) for sample in samples], tmp_path / "probes")
    return tmp_path / "probes"


@on_each
@pytest.mark.parametrize("cached", [("latents", "targets"), ()], ids=["cached", "encoded while training"])
def test_a_resumed_run_equals_an_uninterrupted_one(precise, recorded, probes, tmp_path, device, cached):
    """With validation, the monitor, averages and the optimiser's state: bit for bit with deterministic operations."""
    config = replace(precise, data=replace(precise.data, cached=cached))
    config = replace(config, monitor=replace(config.monitor, probes=str(probes), sensitivity_samples=1))
    parallel = ParallelConfig(compile=False, deterministic=True)
    options = {"device": device, "parallel": parallel, "init_from": recorded / "cosmos"}
    assert api.train(config, output=tmp_path / "whole", **options)
    assert api.train(config, output=tmp_path / "resumed", **options)
    last = newest(tmp_path / "resumed")
    last.rename(tmp_path / "finished")
    assert newest(tmp_path / "resumed").name < last.name
    assert api.train(config, output=tmp_path / "resumed", **options)
    for path in newest(tmp_path / "whole").glob("*.safetensors"):
        ours, theirs = read_tensors(path), read_tensors(newest(tmp_path / "resumed") / path.name)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), path.name
    figures = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("grounding/sensitivity_ratio" in row for row in figures)
    assert all(np.isfinite(value) for row in figures for value in row.values())


@pytest.fixture(scope="module")
def trained(precise, recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        config = replace(precise, stage=replace(precise.stage, seed=seed, steps=2))
        assert api.train(config, output=folder / f"run_{seed}", init_from=recorded / "cosmos")
    return folder


@on_each
@pytest.mark.parametrize("fast", [True, False])
def test_policies_answer_as_on_the_cpu(trained, observation, device, fast):
    run = trained / "run_0"
    policy, reference = load_policy(run, device=device, fast=fast), load_policy(run)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        ours, theirs = (p.act_and_imagine(observation) for p in (policy, reference))
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(ours.actions, theirs.actions, atol=1e-3)
    assert ours.imagined.shape == theirs.imagined.shape
    unknown = replace(observation, instruction="an instruction that no episode has")
    assert np.isfinite(policy.act(unknown).actions).all()
    assert policy.instructions.encoder.model.device.type == device


@on_each
def test_diagnosis(trained, probes, device):
    settings = DiagnosisConfig(noise_samples=1, background_sets=1, gallery=1, map_kinds=("mean",), imagination_steps=1)
    arguments = {"simulator": "none", "samples": 0, "probes": probes, "teacher": "own", "config": settings}
    output = api.diagnose(trained / "run_0", device=device, **arguments)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(0 <= row["in_mask_ratio"] <= 1 for row in rows)


@on_each
def test_latency_of_a_recipe(make_config, device):
    stages = timed(random_policy(make_config(), device=device), 2)()
    assert list(stages) == ["text", "codec", "video", "bridge", "action"]
    assert all(seconds >= 0 for seconds in stages.values())


# --- validation and memory (test_validation.py, test_memory.py) -------------------------------------------------------


def make_trainer(config, output, device, *, count=1, checkpointing=0.0):
    torch.manual_seed(0)
    method = config.method.build().to(device)
    parallel = ParallelConfig(gradient_accumulation_steps=count, activation_checkpointing=checkpointing, compile=False)
    apply(method, parallel, torch.device(device))
    samples = fake_batch(config.method, config.stage.batch_size)
    return Trainer(
        config, method, batch=lambda step: samples, validation=lambda: samples, output=output, extra_files={},
        context=DistributedContext(device=torch.device(device)), parallel=parallel,
    )  # fmt: skip


@on_each
def test_validation_is_the_same_for_any_number_of_micro_batches(tmp_path, device):
    config = replace(tiny(), stage=replace(tiny().stage, precision="float32", batch_size=8))
    values = [make_trainer(config, tmp_path, device, count=count)._validate()[0] for count in (1, 2)]
    for name in ("validation/loss", "validation/video_loss", "validation/action_loss"):
        assert values[1][name] == pytest.approx(values[0][name], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [0.0, 0.5, 1.0])
def test_planned_memory_is_the_allocator_s(tmp_path, checkpointing):
    """A step and a validation of a wide `tiny` in bfloat16, within a tenth: the allocator rounds sizes up."""
    config = replace(tiny(), stage=replace(tiny().stage, precision="bfloat16", batch_size=64))
    planned = measure(config, activation_checkpointing=checkpointing).peak(64)
    trainer = make_trainer(config, tmp_path, "cuda", checkpointing=checkpointing)
    trainer.meter.start(0)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        trainer._train_step(0, [])
        trainer._validate()
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.1)


@pytest.mark.gpu
def test_steps_reuse_the_memory_of_copied_batches():
    """Each step copies its batch as the trainer does."""
    batch, reserved = fake_batch(tiny().method, 64).pin_memory(), []
    for _ in range(40):
        for moved in on_device([batch], torch.device("cuda")):
            moved.state.sum()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[3]


@pytest.mark.gpu
def test_layer_norms_run_in_float32_under_autocast_and_in_their_own_type_outside():
    """The rule that the planner emulates."""
    x, norm = torch.randn(2, 8, device="cuda", dtype=torch.bfloat16), torch.nn.LayerNorm(8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert norm(x).dtype is torch.float32
        assert (x @ x.mT).dtype is torch.bfloat16
        assert torch.addcmul(x, x, x).dtype is torch.bfloat16


# --- precision (test_precision.py) --------------------------------------------------------------------------------------


@on_each
def test_bfloat16_policies_are_near_float32(trained, observation, device):
    policies = {p: load_policy(trained / "run_0", device=device, precision=p) for p in ("bfloat16", "float32")}
    assert {p.dtype for p in policies["bfloat16"].method.parameters()} == {torch.bfloat16}
    actions = [policy.normalize(policy.act(observation).actions, "dot") for policy in policies.values()]
    assert 0 < np.abs(actions[0] - actions[1]).max() < 0.05


# --- compiled answers (test_compiled.py) -------------------------------------------------------------------------------


@pytest.fixture
def compiler(device, monkeypatch):
    """Inductor with CUDA graphs on a GPU; Dynamo's capture alone on a CPU."""
    compile_ = torch.compile
    torch._dynamo.reset()
    if device == "cpu":
        monkeypatch.setattr(
            torch, "compile", lambda function, mode, **options: compile_(function, backend="eager", **options)
        )
    yield
    torch._dynamo.reset()


@on_each
@pytest.mark.usefixtures("compiler")
def test_compiled_answers_are_the_plain_ones_and_nothing_is_compiled_late(trained, observation, device):
    """In the thread that answers, for one instruction and several, and after newer weights have been adopted."""

    def ask(policy, texts):
        observations = [replace(observation, instruction=text) for text in texts]
        return policy.act_batch(
            [PolicyRequest(observation=o, episode=policy.episode(row)) for row, o in enumerate(observations)]
        )

    compiled, newer = (load_policy(trained / f"run_{seed}", device=device, compiled=True) for seed in (0, 1))
    plain, plain_newer = (load_policy(trained / f"run_{seed}", device=device, fast=False) for seed in (0, 1))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compiled.warm_up, 4).result()
        for reference in (plain, plain_newer):
            for texts in (["go 0"], ["go 0", "go 1"], ["go 1", "go 0", "go 1"]):
                ours, theirs = thread.submit(ask, compiled, texts).result(), ask(reference, texts)
                for one, other in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(one.actions, other.actions, atol=2e-3)
            if reference is plain:
                assert thread.submit(compiled.adopt, newer).result()
    assert compiled.recompiles == 0


@pytest.mark.gpu
def test_compiled_blocks_train_as_eager_ones(tmp_path):
    config = replace(tiny(), stage=replace(tiny().stage, precision="float32", batch_size=8))
    losses = []
    for compiles in (False, True):
        trainer = make_trainer(config, tmp_path, "cuda")
        apply(trainer.method, ParallelConfig(compile=compiles), torch.device("cuda"))
        trainer.meter.start(0)
        losses.append([trainer._train_step(step, [])["loss"] for step in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


# --- several GPUs (test_gather.py) -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < gather.RANKS, reason=f"needs {gather.RANKS} GPUs")
def test_two_gpus_over_nccl(tmp_path):
    """Sharded by FSDP2 with parameters gathered in either type: gradients near those of float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = get_context("spawn")
    ranks = [spawn.Process(target=gather.work, args=(rank, port, tmp_path, "cuda")) for rank in range(gather.RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * gather.RANKS
    exact, *halves = (read_tensors(tmp_path / f"{name}.safetensors") for name in gather.WAYS)
    for half in halves:
        for name, value in exact.items():
            assert (half[name] - value).norm() <= 0.1 * value.norm() + 1e-6, name


@on_each
def test_stages_follow_each_other(precise, recorded, tmp_path, device):
    """Adapt, joint, finetune, each from the last."""
    before = recorded / "cosmos"
    for stage in (Stage.ADAPT, Stage.JOINT, Stage.FINETUNE):
        config = at_stage(precise, stage)
        config = replace(config, stage=replace(config.stage, steps=1))
        assert api.train(config, output=tmp_path / stage, init_from=before, device=device)
        before = tmp_path / stage
    assert load_policy(before, device=device).config.stage.name is Stage.FINETUNE
