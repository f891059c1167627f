"""Gradient flow by stage and pass: the whole of the method is in who learns from what."""

from dataclasses import replace

import pytest
import torch

from agra.recipes import at_stage
from agra.training.objective import Objective, ObjectiveConfig, Pass
from agra.training.stages import Stage, StageConfig, freeze
from agra.wam.model import WAM

WIDTH = 6


def _objective(config, **changes):
    torch.manual_seed(0)
    objective_config = replace(config.stage.objective, **changes)
    objective = Objective(WAM(config.model), objective_config, config.alignment, WIDTH)
    for name, parameter in objective.named_parameters():
        if "linear_2" in name or "position" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return objective


def _block_gradients(objective, loss):
    objective.zero_grad()
    loss.backward()
    blocks = objective.wam.video_dit.transformer.transformer_blocks
    return [sum(p.grad.abs().sum().item() for p in block.parameters() if p.grad is not None) for block in blocks]


def test_action_loss_reaches_video_block_0_in_joint(small_config, make_batch):
    objective = _objective(small_config, video_weight=0.0, alignment_weight=0.0)
    freeze(objective, small_config.stage)
    losses = objective(make_batch(small_config))
    assert losses.video is None
    assert losses.alignment is None
    gradients = _block_gradients(objective, losses.total)
    assert all(g > 0 for g in gradients)


def test_finetune_leaves_the_video_dit_without_gradient(small_config, make_batch):
    config = at_stage(small_config, Stage.FINETUNE)
    objective = _objective(config)
    freeze(objective, config.stage)
    losses = objective(make_batch(config))
    assert losses.video is None
    assert losses.alignment is None
    assert _block_gradients(objective, losses.total) == [0.0] * 4
    assert all(p.grad is None for p in objective.wam.video_dit.parameters())
    assert all(p.grad is not None for p in objective.wam.action_dit.blocks.parameters())


def test_alignment_reaches_nothing_above_its_layer(small_config, make_batch):
    objective = _objective(small_config)
    losses = objective(make_batch(small_config))
    gradients = _block_gradients(objective, losses.alignment)
    assert gradients[0] > 0
    assert gradients[1] > 0
    assert gradients[2:] == [0.0, 0.0]
    assert all(p.grad is None for p in objective.wam.action_dit.parameters())
    assert all(p.grad is None for p in objective.wam.bridge.parameters())


def test_samples_without_targets_are_not_aligned(small_config, make_batch):
    objective, batch = _objective(small_config), make_batch(small_config)
    has = torch.arange(len(batch)) % 2 == 0
    torch.manual_seed(1)
    some = objective(replace(batch, has_targets=has))
    spoiled = torch.where(has[:, None, None, None, None], batch.targets, torch.full_like(batch.targets, 7.0))
    torch.manual_seed(1)
    same = objective(replace(batch, has_targets=has, targets=spoiled))
    assert torch.equal(some.alignment, same.alignment)
    torch.manual_seed(1)
    assert not torch.equal(some.alignment, objective(batch).alignment)
    none = objective(replace(batch, has_targets=torch.zeros_like(has)))
    assert none.alignment == 0
    assert none.alignment_cosine_gain is None


def test_adapt_computes_the_video_loss_alone(small_config, make_batch):
    config = at_stage(small_config, Stage.ADAPT)
    objective = _objective(config)
    freeze(objective, config.stage)
    losses = objective(replace(make_batch(config), targets=None))
    assert losses.action is None
    assert losses.alignment is None
    assert torch.equal(losses.total, losses.video)
    losses.total.backward()
    trained = {name.split(".")[1] for name, p in objective.named_parameters() if p.requires_grad}
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
    objective = _objective(small_config, guidance_pass=guidance, aligned_pass=aligned, video_share=1.0)
    asked = {}
    passes = objective._video_passes

    def spy(*args):
        loss, found = passes(*args)
        asked.update({which.value: tuple(sorted(hidden)) for which, hidden in found.items()})
        return loss, found

    objective._video_passes = spy
    losses = objective(make_batch(small_config))
    assert asked.get("denoising") == denoised
    assert asked.get("conditioning") == conditioned
    weights = small_config.stage.objective
    total = weights.video_weight * losses.video + losses.action + weights.alignment_weight * losses.alignment
    torch.testing.assert_close(losses.total, total)


@pytest.mark.parametrize("layers", [(0, 3), (0, 1)], ids=["to the last block", "ending earlier"])
def test_two_passes_are_one_forward_where_both_need_all_blocks(small_config, make_batch, layers):
    model = replace(small_config.model, bridge=replace(small_config.model.bridge, layers=layers))
    objective, batch = _objective(replace(small_config, model=model)), make_batch(small_config)
    ran = []
    objective.wam.video_dit.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    noise, level = torch.randn(3, *batch.latents.shape[1:]), torch.rand(3)
    together = objective.wam.denoise_and_condition(
        batch.latents,
        noise,
        level,
        torch.flip(batch.latents, (0,)),
        batch.instruction,
        layers=(2,),
        condition_layers=(1,),
    )
    assert ran == ([7] if 3 in layers else [3, 4])
    denoised = objective.wam.denoise(batch.latents[:3], noise, level, batch.instruction[:3], layers=(2,))
    observed = batch.latents[:, :, :1]
    conditioned = objective.wam.condition(observed, torch.flip(batch.latents, (0,)), batch.instruction, layers=(1,))
    torch.testing.assert_close(together[0].velocity, denoised.velocity)
    torch.testing.assert_close(together[0].hidden, denoised.hidden)
    torch.testing.assert_close(together[1], conditioned)


def test_masked_actions_do_not_count(small_config, make_batch):
    objective = _objective(small_config, video_weight=0.0, alignment_weight=0.0, action_draws=1)
    batch = make_batch(small_config)
    mask = batch.action_mask.clone()
    mask[:, 2:] = False
    mask[:, :, 1] = False
    torch.manual_seed(5)
    masked = objective(replace(batch, action_mask=mask)).action
    torch.manual_seed(5)
    forward = objective.wam.action_dit.forward
    predicted = {}

    def spy(noisy, *args, **kwargs):
        predicted["noisy"], predicted["velocity"] = noisy, forward(noisy, *args, **kwargs).velocity
        return type("Out", (), {"velocity": predicted["velocity"]})

    objective.wam.action_dit.forward = spy
    objective(replace(batch, action_mask=mask))
    torch.manual_seed(5)
    torch.randn_like(batch.latents)  # the conditioning pass's noise
    noise = torch.randn_like(batch.actions)
    kept = ((predicted["velocity"] - (noise - batch.actions)) ** 2)[:, :2][:, :, [0, 2]]
    torch.testing.assert_close(masked, kept.mean())


def test_action_draws_repeat_the_guidance_not_the_video_pass(small_config, make_batch):
    objective = _objective(small_config, video_weight=0.0, action_draws=3)
    sizes = []
    objective.wam.video_dit.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    objective.wam.action_dit.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    objective(make_batch(small_config))
    assert sizes == [4, 12]


def test_missing_targets_are_named(small_config, make_batch):
    with pytest.raises(ValueError, match="holds no teacher targets; prepare them with `agra prepare`"):
        _objective(small_config)(replace(make_batch(small_config), targets=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveConfig(guidance_pass=Pass.DENOISING), "there is no conditioning pass to align"),
        (lambda: ObjectiveConfig(alignment_weight=-1), "alignment_weight: expected at least 0, got -1"),
        (lambda: StageConfig(name=Stage.ADAPT), r"stage.objective.action_weight: must be 0 in the adapt stage"),
        (lambda: StageConfig(steps=0), "stage.steps: expected at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
