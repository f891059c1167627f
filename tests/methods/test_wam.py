"""Gradient flow by stage and pass, and the losses of the WAM method."""

from dataclasses import replace

import pytest
import torch

from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.methods.wam import ObjectiveConfig, Pass, WAMMethodConfig
from agra.recipes import at_stage
from agra.stages import Stage, StageConfig
from agra.training.optimization import freeze
from tests.support.small import with_model, with_objective


def _build(config, **objective):
    """The method with fresh weights, but none of its output layers zero."""
    torch.manual_seed(0)
    method = with_objective(config, **objective).method.build()
    for name, parameter in method.named_parameters():
        if "linear_2" in name or "position" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return method


def _block_gradients(method, loss):
    method.zero_grad()
    loss.backward()
    blocks = method.wam.video_dit.transformer.transformer_blocks
    return [sum(p.grad.abs().sum().item() for p in block.parameters() if p.grad is not None) for block in blocks]


def test_action_loss_reaches_video_block_0_in_joint(small_config, make_batch):
    method = _build(small_config, video_weight=0.0, alignment_weight=0.0)
    freeze(method, small_config.stage)
    losses = method(make_batch(small_config))
    assert "video" not in losses.terms
    assert "alignment" not in losses.terms
    gradients = _block_gradients(method, losses.total)
    assert all(g > 0 for g in gradients)


def test_finetune_leaves_the_video_dit_without_gradient(small_config, make_batch):
    config = at_stage(small_config, Stage.FINETUNE)
    method = _build(config)
    freeze(method, config.stage)
    losses = method(make_batch(config))
    assert "video" not in losses.terms
    assert "alignment" not in losses.terms
    assert _block_gradients(method, losses.total) == [0.0] * 4
    assert all(p.grad is None for p in method.wam.video_dit.parameters())
    assert all(p.grad is not None for p in method.wam.action_dit.blocks.parameters())


def test_alignment_reaches_nothing_above_its_layer(small_config, make_batch):
    method = _build(small_config)
    losses = method(make_batch(small_config))
    gradients = _block_gradients(method, losses.terms["alignment"])
    assert gradients[0] > 0
    assert gradients[1] > 0
    assert gradients[2:] == [0.0, 0.0]
    assert all(p.grad is None for p in method.wam.action_dit.parameters())
    assert all(p.grad is None for p in method.wam.bridge.parameters())


def test_samples_without_targets_are_not_aligned(small_config, make_batch):
    method, batch = _build(small_config), make_batch(small_config)
    has = torch.arange(len(batch)) % 2 == 0
    rows = has.nonzero().flatten()
    torch.manual_seed(1)
    some = method(replace(batch, target_rows=rows))
    spoiled = torch.where(has[:, None, None, None, None], batch.targets, torch.full_like(batch.targets, 7.0))
    torch.manual_seed(1)
    same = method(replace(batch, target_rows=rows, targets=spoiled))
    assert torch.equal(some.terms["alignment"], same.terms["alignment"])
    torch.manual_seed(1)
    assert not torch.equal(some.terms["alignment"], method(batch).terms["alignment"])
    none = method(replace(batch, target_rows=rows[:0]))
    assert none.terms["alignment"] == 0
    assert none.figures["alignment_cosine_gain"] == 0
    none.terms["alignment"].backward()
    assert all(p.grad is None or not p.grad.any() for p in method.parameters())


def test_micro_batches_average_to_the_whole_batch(small_config, make_batch):
    """Losses of the halves of a batch, with the denominators of the whole, average to those of the whole."""
    method = _build(small_config, video_weight=0.0, action_weight=0.0)
    batch = replace(make_batch(small_config), target_rows=torch.tensor([0, 2, 3]))
    for module in method.modules():
        module.eval()
    counts = method.counts(batch)
    assert counts == {"actions": 4 * 4 * 3, "targets": 3}
    denominators = {name: torch.tensor(value / 2) for name, value in counts.items()}
    halves = []
    with torch.no_grad():
        hidden = method.video_passes(batch).hidden[Pass.CONDITIONING]
        whole, _ = method.alignment_loss(batch, hidden, method.denominators(batch)["targets"])
        for index in range(2):
            half = batch.micro_batch(index, 2)
            states = {layer: value[index::2] for layer, value in hidden.items()}
            loss, _ = method.alignment_loss(half, states, denominators["targets"])
            halves.append(loss)
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_a_batch_without_actions_has_no_action_loss(small_config, make_batch):
    method, batch = _build(small_config), make_batch(small_config)
    losses = method(replace(batch, action_mask=torch.zeros_like(batch.action_mask)))
    assert losses.terms["action"] == 0
    assert losses.total.isfinite()


def test_adapt_computes_the_video_loss_alone(small_config, make_batch):
    config = at_stage(small_config, Stage.ADAPT)
    method = _build(config)
    freeze(method, config.stage)
    losses = method(replace(make_batch(config), targets=None))
    assert "action" not in losses.terms
    assert "alignment" not in losses.terms
    assert torch.equal(losses.total, losses.terms["video"])
    losses.total.backward()
    trained = {name for name, part in method.parts().items() if any(p.requires_grad for p in part.parameters())}
    assert trained == {"video_dit"}


@pytest.mark.parametrize(
    ("guidance", "aligned", "denoised", "conditioned"),
    [
        (Pass.CONDITIONING, Pass.CONDITIONING, (), (0, 1, 3)),
        (Pass.CONDITIONING, Pass.DENOISING, (1,), (0, 3)),
        (Pass.DENOISING, Pass.DENOISING, (0, 1, 3), None),
    ],
)
def test_table_2_is_two_fields(small_config, make_batch, guidance, aligned, denoised, conditioned):
    """What is read of each pass, in the three variants of Table 2."""
    method = _build(small_config, guidance_pass=guidance, aligned_pass=aligned, video_batch_fraction=1.0)
    asked = {}
    video_passes = method.video_passes

    def spy(batch):
        passes = video_passes(batch)
        asked.update({which.value: tuple(sorted(hidden)) for which, hidden in passes.hidden.items()})
        return passes

    method.video_passes = spy
    losses = method(make_batch(small_config))
    assert asked.get("denoising") == denoised
    assert asked.get("conditioning") == conditioned
    weights = small_config.method.objective
    total = (
        weights.video_weight * losses.terms["video"]
        + losses.terms["action"]
        + weights.alignment_weight * losses.terms["alignment"]
    )
    torch.testing.assert_close(losses.total, total)


@pytest.mark.parametrize("layers", [(0, 3), (0, 1)], ids=["to the last block", "ending earlier"])
def test_two_passes_are_one_forward_where_both_need_all_blocks(small_config, make_batch, layers):
    bridge = replace(small_config.method.model.bridge, layers=layers)
    method, batch = _build(with_model(small_config, bridge=bridge)), make_batch(small_config)
    ran = []
    method.wam.video_dit.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    noise, level = torch.randn(3, *batch.latents.shape[1:]), torch.rand(3)
    together = method.wam.denoise_and_condition(
        batch.latents,
        noise,
        level,
        torch.flip(batch.latents, (0,)),
        batch.instruction,
        layers=(2,),
        condition_layers=(1,),
    )
    assert ran == ([7] if 3 in layers else [3, 4])
    denoised = method.wam.denoise(batch.latents[:3], noise, level, batch.instruction[:3], layers=(2,))
    observed = batch.latents[:, :, :1]
    conditioned = method.wam.condition(observed, torch.flip(batch.latents, (0,)), batch.instruction, layers=(1,))
    torch.testing.assert_close(together[0].velocity, denoised.velocity)
    torch.testing.assert_close(together[0].hidden, denoised.hidden)
    torch.testing.assert_close(together[1], conditioned)


def test_masked_actions_do_not_count(small_config, make_batch):
    method = _build(small_config, video_weight=0.0, alignment_weight=0.0, action_draws=1)
    batch = make_batch(small_config)
    mask = batch.action_mask.clone()
    mask[:, 2:] = False
    mask[:, :, 1] = False
    torch.manual_seed(5)
    masked = method(replace(batch, action_mask=mask)).terms["action"]
    torch.manual_seed(5)
    forward = method.wam.action_dit.forward
    predicted = {}

    def spy(noisy, *args, **kwargs):
        predicted["noisy"], predicted["velocity"] = noisy, forward(noisy, *args, **kwargs).velocity
        return type("Out", (), {"velocity": predicted["velocity"]})

    method.wam.action_dit.forward = spy
    method(replace(batch, action_mask=mask))
    torch.manual_seed(5)
    torch.randn_like(batch.latents)  # the conditioning pass's noise
    noise = torch.randn_like(batch.actions)
    kept = ((predicted["velocity"] - (noise - batch.actions)) ** 2)[:, :2][:, :, [0, 2]]
    torch.testing.assert_close(masked, kept.mean())


def test_action_draws_repeat_the_guidance_not_the_video_pass(small_config, make_batch):
    method = _build(small_config, video_weight=0.0, action_draws=3)
    sizes = []
    method.wam.video_dit.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    method.wam.action_dit.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    method(make_batch(small_config))
    assert sizes == [4, 12]


def test_missing_targets_are_named(small_config, make_batch):
    with pytest.raises(ValueError, match="holds no teacher targets; prepare them with `agra prepare`"):
        _build(small_config)(replace(make_batch(small_config), targets=None))


_NO_LOSS = ObjectiveConfig(video_weight=0, action_weight=0)


def _run(stage):
    return RunConfig(data=DataConfig(), stage=stage)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveConfig(guidance_pass=Pass.DENOISING), "there is no conditioning pass to align"),
        (lambda: ObjectiveConfig(alignment_weight=-1), "alignment_weight: expected at least 0, got -1"),
        (lambda: _run(StageConfig(name=Stage.ADAPT)), r"method.objective.action_weight: must be 0 in the adapt stage"),
        (
            lambda: _run(StageConfig(frozen=("head",))),
            "stage.frozen: 'head' is not a part of this method; expected video_dit",
        ),
        (lambda: ObjectiveConfig(video_batch_fraction=0), r"method.objective.video_batch_fraction: expected a number"),
        (
            lambda: replace(_run(StageConfig()), method=WAMMethodConfig(alignment=None, objective=_NO_LOSS)),
            "no loss has a weight above 0",
        ),
        (lambda: StageConfig(steps=0), "stage.steps: expected at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
