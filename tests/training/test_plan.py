"""The planner's counts against arithmetic and against real steps."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agra.cli.main import main
from agra.recipes import at_stage, tiny, tiny_lda_scratch, tiny_vla
from agra.stages import Stage
from agra.training.memory_estimate import count_flops, fake_batch, fake_method, flops_per_sample, measure
from agra.training.metrics import ThroughputMeter
from agra.training.optimization import parameter_groups
from agra.training.parallelize import ParallelConfig, apply, shard
from agra.training.plan import CHECKPOINTED, Machines, describe, lay_out, plan
from tests.support.small import make_small_config, with_objective


@functools.cache
def small_cost(*, activation_checkpointing=0.0, gather_bfloat16=False):
    """A step of the small config. Its cost does not depend on the batch size."""
    return measure(
        make_small_config(), activation_checkpointing=activation_checkpointing, gather_bfloat16=gather_bfloat16
    )


def small_batch(size):
    """The small config with `size` samples in a step. The method needs multiples of 4."""
    config = make_small_config()
    return replace(config, stage=replace(config.stage, batch_size=size))


def test_flops_are_those_of_the_products(small_config):
    """The adapt stage: every product of the video DiT forward, and twice that backward."""
    config = with_objective(at_stage(small_config, Stage.ADAPT), video_batch_fraction=1.0)
    model, video = config.method.model, config.method.model.video_dit
    frames, rows, columns = model.token_grid
    n, w, t = frames * rows * columns, video.width, model.text.length
    block = 2 * n * w * w * (4 + 2 + 8)  # projections of both attentions and the feed-forward
    block += 2 * 2 * t * video.text_dim * w + 2 * 2 * n * n * w + 2 * 2 * n * t * w  # text keys and values, attention
    block += 3 * 2 * frames * video.adaln_lora_dim * (w + 3 * w)  # modulations, a frame each
    ends = 2 * n * w * (4 * (video.latent_channels + 2) + 4 * video.latent_channels)
    time = 2 * frames * (w * w + 3 * w * w) + 2 * frames * video.adaln_lora_dim * (w + 2 * w)
    expected = 3 * (video.num_layers * block + ends + time)
    assert flops_per_sample(config) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flops_of_a_call_are_those_of_its_products(mode):
    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 2, 5)
    with mode():
        assert count_flops(lambda: layer(x) @ torch.ones(7, 4)) == 2 * 6 * 5 * 7 + 2 * 6 * 7 * 4


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [0, 0.5, 1])
@pytest.mark.parametrize("samples", [16, 64])
def test_planned_memory_is_that_of_a_real_step(checkpointed, samples):
    """The plan against torch's own count of allocations in a step of tiny, without workspaces of kernels."""
    config = tiny()
    found = measure(config, activation_checkpointing=checkpointed)
    planned = found.peak(samples)
    method = fake_method(config)
    apply(method, ParallelConfig(activation_checkpointing=checkpointed))
    optimizer = torch.optim.AdamW(list(parameter_groups(method, config.stage)))
    batch = fake_batch(config.method, samples)

    def step():
        method(batch).total.backward()
        optimizer.step()

    step()
    optimizer.zero_grad()  # before the profile begins, which does not see the end of what it has not seen begin
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    inputs = sum(value.nbytes for value in vars(batch).values() if value is not None)
    level = peak = found.states + inputs
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    assert peak == pytest.approx(planned, rel=0.02)


def test_checkpointing_keeps_less(monkeypatch):
    assert CHECKPOINTED == (0.0, 0.25, 0.5, 0.75, 1.0)
    monkeypatch.setattr("agra.training.plan.CHECKPOINTED", (0.0, 0.5, 1.0))
    monkeypatch.setattr("agra.training.plan.measure", lambda config, **options: small_cost(**options))
    config = small_batch(8)
    found = plan(config, Machines(gpus=2, price=2))
    memory = [layout.per_sample for layout in found.layouts]
    assert memory == sorted(memory, reverse=True)
    assert [layout.activation_checkpointing for layout in found.layouts] == [0, 0.5, 1]
    plain, *_, checkpointed = found.layouts
    assert checkpointed.per_sample < plain.per_sample
    assert (plain.gradient_accumulation_steps, checkpointed.gradient_accumulation_steps) == (1, 1)
    assert plain.samples < checkpointed.samples
    steps, validations = config.stage.steps, 1 + config.stage.steps // config.stage.validate_every
    seconds = found.best.seconds * steps + found.best.validation_seconds * validations
    assert found.hours == pytest.approx(seconds / 3600)
    assert 0 < found.best.validation_seconds < found.best.seconds
    assert found.cost == pytest.approx(found.hours * 4)
    with pytest.raises(ValueError, match="does not divide into 3 processes"):
        lay_out(config, Machines(gpus=3), [found.step_cost])
    with pytest.raises(ValueError, match="copies of 3"):
        Machines(gpus=8, shard_degree=3)
    with pytest.raises(ValueError, match="rate: expected more than 0, got 0"):
        Machines(gpus=8, bandwidth=0)


@pytest.mark.parametrize("recipe", [tiny_vla, tiny_lda_scratch])
def test_teacher_features_in_the_cache_are_not_encoded_while_training(recipe):
    """`data.cached` lists them as targets, also where they are an input."""
    config, step_cost = recipe(), small_cost()
    assert lay_out(config, Machines(gpus=1), [step_cost]).encoding == {}
    config = replace(config, data=replace(config.data, cached=()))
    result = lay_out(config, Machines(gpus=1), [step_cost])
    assert "features" in result.encoding
    assert "features while training" in describe(result, config, Machines(gpus=1))
    assert "Their memory is not counted" in describe(result, config, Machines(gpus=1))


def test_averages_of_the_weights_are_planned(small_config):
    averaged = measure(replace(small_config, stage=replace(small_config.stage, ema_decay=0.9)))
    assert averaged.states == small_cost().states + 4 * averaged.trained
    assert averaged.peak(8) == small_cost().peak(8) + 4 * averaged.trained


def test_a_wrong_number_of_gpus_is_refused_before_anything_is_counted(monkeypatch, capsys):
    monkeypatch.setattr("agra.training.plan.measure", lambda *_, **__: pytest.fail("counted a step"))
    config = small_batch(8)
    with pytest.raises(ValueError, match=r"stage\.batch_size: 8 does not divide into 3 processes"):
        plan(config, Machines(gpus=3))
    with pytest.raises(ValueError, match="is 2 samples in a micro-batch; the method needs a multiple of 4"):
        plan(config, Machines(gpus=4))
    with pytest.raises(SystemExit):
        main(["plan", "agra_dino_l8", "--gpus", "7"])
    assert capsys.readouterr().err.startswith("agra: error: stage.batch_size: 256 does not divide into 7 processes")


def test_a_plan_proposes_micro_batches_that_training_accepts():
    """The small config needs multiples of 4 samples. With 8 on each GPU that leaves one or two micro-batches."""
    config, step_cost = small_batch(64), small_cost()
    sizes = np.geomspace(1e-4, 1, 30)
    plans = [lay_out(config, Machines(gpus=8, gpu_memory=size), [step_cost]) for size in sizes]
    assert {layout.gradient_accumulation_steps for result in plans for layout in result.layouts} == {0, 1, 2}


class Received(TorchDispatchMode):
    """Adds up the bytes that collectives put together."""

    def __init__(self):
        super().__init__()
        self.bytes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        if name in self.bytes:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.bytes[name] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("checkpointed", "half"), [(0.0, False), (0.5, False), (1.0, False), (0.0, True)])
def test_traffic_is_what_fsdp_sends(checkpointed, half):
    """Against the collectives of a real step of one process, with a fake group of eight."""
    config, found = make_small_config(), small_cost(activation_checkpointing=checkpointed, gather_bfloat16=half)
    method = fake_method(config)
    apply(method, ParallelConfig(activation_checkpointing=checkpointed))
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (8,), mesh_dim_names=("shard",))
        shard(method, mesh, ParallelConfig(gather_bfloat16=half))
        with Received() as received, torch.autocast("cpu", torch.bfloat16, enabled=half):
            method(fake_batch(config.method, 4 * config.method.batch_multiple)).total.backward()
    finally:
        dist.destroy_process_group()
    # Shards are as long as the longest, so that a little more is sent.
    sent = found.weight_bytes * found.gathered
    assert sent <= received.bytes["_allgather_base_"] < 1.05 * sent
    assert 4 * found.trained <= received.bytes["_reduce_scatter_base_"] < 4.2 * found.trained


def test_traffic_grows_with_shards_and_copies():
    config, counted = small_batch(64), (small_cost(), small_cost(activation_checkpointing=1.0))

    def best(**machines):
        return lay_out(config, Machines(**machines), counted).best

    whole = 4 * (counted[0].gathered + counted[0].trained)
    assert best(gpus=1).traffic == 0
    assert best(gpus=8).traffic == pytest.approx(whole * 7 / 8)
    assert best(gpus=16, shard_degree=8).traffic == pytest.approx(whole * 7 / 8 + 4 * counted[0].trained / 8)
    slow, quick = best(gpus=8, bandwidth=1e-6), best(gpus=8, bandwidth=1e6)
    assert slow.seconds == pytest.approx(slow.traffic / 1e3)
    assert quick.seconds == quick.compute_seconds


def test_gradients_are_reduced_once_or_after_every_micro_batch():
    """Once where the memory holds whole gradients, and after every micro-batch where it does not."""
    config, step_cost = small_batch(64), small_cost()

    def layout(gigabytes):
        (one,) = lay_out(config, Machines(gpus=8, gpu_memory=gigabytes), [step_cost]).layouts
        return one

    sizes = np.geomspace(1e-4, 1, 60)
    layouts = [layout(size) for size in sizes]
    several = [layout for layout in layouts if layout.gradient_accumulation_steps > 1]
    assert {one.reduce_every_micro_batch for one in several} == {True, False}
    for one in several:
        reductions = one.gradient_accumulation_steps if one.reduce_every_micro_batch else 1
        expected = 4 * (one.gradient_accumulation_steps * step_cost.gathered + reductions * step_cost.trained) * 7 / 8
        assert one.traffic == pytest.approx(expected)
        assert ("--parallel.reduce-every-micro-batch True" in one.flags) == one.reduce_every_micro_batch
    assert not layouts[-1].flags


@pytest.mark.slow
def test_the_papers_model_is_planned_from_the_command_line(capsys):
    main(["plan", "agra_dino_l8", "--gpus", "8", "--gpu-memory", "80", "--price", "2"])
    printed = capsys.readouterr().out
    assert "video_dit 2,059,174,912" in printed
    assert "--parallel.activation-checkpointing 1" in printed
    with pytest.raises(SystemExit):
        main(["plan", "agra_dino_l8", "--gpus", "1", "--gpu-memory", "16"])
    assert "no layout fits" in capsys.readouterr().out


def test_a_meter_computes_rates_waits_and_mfu(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = ThroughputMeter(flops_per_sample=2e12, peak_flops=1e14)
    meter.start(10)
    with meter.waiting():
        now[0] += 1
    now[0] += 3
    found = meter.read(14, batch_size=32, devices=4)
    assert found["samples_per_second"] == pytest.approx(32)
    assert found["meter/samples_per_second_per_device"] == pytest.approx(8)
    assert found["meter/data_wait_fraction"] == pytest.approx(0.25)
    assert found["meter/mfu"] == pytest.approx(8 * 2e12 / 1e14)
    assert found["meter/peak_memory_bytes"] > 1e6
    plain = ThroughputMeter()
    plain.start(0)
    assert "meter/mfu" not in plain.read(1, batch_size=1, devices=1)
