"""Validation in micro-batches, with the same values for any spread, and moments on the parameters' device."""

from dataclasses import replace

import pytest
import torch

from agra.checkpoints.folder import newest
from agra.checkpoints.read import stored_names
from agra.training.optimization import trained_names
from agra.training.parallelize import ParallelConfig
from agra.training.trainer import Trainer
from tests.support.small import random_batch


def make_trainer(config, output, *, seen=None, gradient_accumulation_steps=1):
    torch.manual_seed(0)
    method = config.method.build()
    if seen is not None:
        method.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))

    def batch(step):
        values = random_batch(config, count=config.stage.batch_size, seed=step)
        keep = torch.arange(config.method.model.action_dit.horizon) <= torch.arange(len(values))[:, None] % 4
        rows = torch.arange(0, len(values), 3)
        return replace(values, action_mask=values.action_mask & keep[:, :, None], target_rows=rows)

    return Trainer(
        config, method, batch=batch, validation=lambda: batch(999), output=output, extra_files={},
        parallel=ParallelConfig(gradient_accumulation_steps=gradient_accumulation_steps),
    )  # fmt: skip


@pytest.fixture
def config(small_config):
    return replace(small_config, stage=replace(small_config.stage, batch_size=32))


def test_validation_is_the_same_for_any_number_of_micro_batches_and_never_larger(config, tmp_path):
    values = {}
    for accumulate in (1, 2, 8):
        seen: list[int] = []
        trainer = make_trainer(config, tmp_path / str(accumulate), seen=seen, gradient_accumulation_steps=accumulate)
        values[accumulate], _ = trainer._validate()
        values[accumulate].pop("validation/alignment_cosine_gain")  # relative to the mean of a micro-batch
        assert seen == [32 // accumulate] * accumulate
        assert trainer._validate()[0].items() >= values[accumulate].items()
    for accumulate in (2, 8):
        assert values[accumulate] == pytest.approx(values[1], rel=2e-6)
    assert {"validation/loss", "validation/video_loss", "validation/action_loss"} <= values[1].keys()


def test_validation_leaves_no_gradient_and_no_trace(config, tmp_path):
    """A step after a validation equals one without it."""
    plain, validating = (make_trainer(config, tmp_path / name) for name in ("a", "b"))
    validating._validate()
    for trainer in (plain, validating):
        trainer.meter.start(0)
        trainer._train_step(0, [])
    for ours, theirs in zip(plain.method.parameters(), validating.method.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "read as shards"])
def test_moments_and_steps_are_read_to_the_parameters_device(config, tmp_path, meta, sharded, monkeypatch):
    """Fused AdamW reads its step through the parameters' device: on the CPU it would be an illegal memory access."""
    first = make_trainer(config, tmp_path)
    first.meter.start(0)
    first._train_step(0, [])
    first.step = 1
    first.save()
    second = make_trainer(config, tmp_path)
    second.method.to(meta)
    second.optimizer.state.clear()
    second.names = trained_names(second.method)
    if sharded:
        folder = newest(tmp_path)
        (folder / "sharded").mkdir()
        monkeypatch.setattr("agra.training.trainer.stored_names", lambda shards: stored_names(shards.parent))
        monkeypatch.setattr("agra.training.trainer.read_shards", lambda *_: None)
    monkeypatch.setattr("agra.training.trainer.load_parts", lambda *_, **__: None)
    second._resume()
    states = [(parameter, state) for parameter, state in second.optimizer.state.items()]
    assert len(states) == len(second.names)
    for parameter, state in states:
        assert {"step", "exp_avg", "exp_avg_sq"} <= state.keys()
        assert {value.device for value in state.values()} == {parameter.device}
