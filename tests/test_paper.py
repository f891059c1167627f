"""The paper's equations against independent arithmetic, mostly numpy loops."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from agra.alignment.loss import alignment_loss
from agra.alignment.teacher import reference_frames
from agra.flow import interpolate, velocity
from agra.recipes import PRESETS, RECIPES, agra_dino_l8, compose
from agra.stages import Stage
from agra.training.optimization import parameter_groups
from agra.wam.action_dit import ActionDiTConfig, EmbodimentLinear
from agra.wam.bridge import BridgeConfig, SelfAttentionBlock, bridged_layers
from agra.wam.model import WAM


def test_eq_6_alignment_loss():
    """Minus the mean over k, t, u, v of x.y / (|x||y| + eps), by loops."""
    rng = np.random.default_rng(0)
    batch, frames, height, width, dim, layers = 2, 3, 2, 4, 5, 3
    z = rng.normal(size=(layers, batch, frames, height, width, dim))
    y = rng.normal(size=(batch, frames, height, width, dim))
    z[0, 0, 0, 0, 0] = 0  # a zero vector must give cosine 0, not NaN
    total = 0.0
    for index in np.ndindex(layers, batch, frames, height, width):
        a, b = z[index], y[index[1:]]
        total += float(a @ b) / (math.sqrt(a @ a) * math.sqrt(b @ b) + 1e-8)
    expected = -total / (layers * batch * frames * height * width)
    ours = alignment_loss(
        [torch.tensor(layer, dtype=torch.float32) for layer in z], torch.tensor(y, dtype=torch.float32)
    )
    assert ours.item() == pytest.approx(expected, abs=1e-6)
    same = torch.tensor(y)
    assert alignment_loss([3 * same, 0.1 * same], same).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss([-same], same).item() == pytest.approx(1, abs=1e-6)


def test_eq_6_is_float32_under_autocast():
    x = torch.randn(1, 1, 2, 2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alignment_loss([x.bfloat16()], x.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 5, 4, 6), (3, 16, 29)], ids=["Eqs. 8-9 latents", "Eqs. 11, 13 actions"])
def test_eqs_8_9_11_13_flow(shape):
    """z^tau = (1 - tau) z + tau eps. The target is eps - z, the derivative of z^tau by tau."""
    rng = np.random.default_rng(1)
    data, noise = rng.normal(size=shape), rng.normal(size=shape)
    tau = rng.uniform(size=shape[0])
    noisy = interpolate(torch.tensor(data), torch.tensor(noise), torch.tensor(tau)).numpy()
    target = velocity(torch.tensor(data), torch.tensor(noise)).numpy()
    for b in range(shape[0]):
        np.testing.assert_allclose(noisy[b], (1 - tau[b]) * data[b] + tau[b] * noise[b], atol=1e-12)
    step = 1e-4
    ahead = interpolate(torch.tensor(data), torch.tensor(noise), torch.tensor(tau + step)).numpy()
    np.testing.assert_allclose((ahead - noisy) / step, target, atol=1e-8)


def test_eq_14_layers_are_those_of_c1():
    assert bridged_layers(28, 8) == (0, 4, 8, 12, 15, 19, 23, 27)
    for video, action in ((28, 8), (36, 8), (28, 16), (6, 4)):
        exact = [j * (video - 1) / (action - 1) for j in range(action)]
        assert bridged_layers(video, action) == tuple(math.floor(x + 0.5) for x in exact)


def test_reference_frames_are_the_first_of_each_latent_frame():
    """Latent frame 0 is frame 0. Latent frame t covers 4t - 3 .. 4t."""
    covered = {0: [0]} | {t: list(range(4 * t - 3, 4 * t + 1)) for t in range(1, 5)}
    assert sorted(f for frames in covered.values() for f in frames) == list(range(17))
    assert reference_frames(5) == tuple(frames[0] for frames in covered.values()) == (0, 1, 5, 9, 13)


def test_default_recipe_is_c1_and_c3():
    config = agra_dino_l8()
    assert config.method.model.frame_size == (192, 336)
    assert config.method.model.num_frames == 17
    assert config.method.model.latent_shape == (16, 5, 24, 42)
    assert math.prod(config.method.model.token_grid) == 1260
    assert config.method.model.bridge.layers == (0, 4, 8, 12, 15, 19, 23, 27)
    assert config.method.model.action_dit.num_blocks == 8
    assert config.method.model.action_dit.num_heads == 32
    assert config.method.model.action_dit.guidance_dim == 2048
    assert config.method.model.action_dit.horizon == 16
    assert config.method.alignment.layers == (8,)
    assert config.method.alignment.teacher.kind == "dinov2"
    assert tuple(config.method.alignment.teacher.input_size) == (448, 448)
    stage = config.stage
    assert (stage.batch_size, stage.steps, stage.warmup_ratio) == (256, 80_000, 0.05)
    assert (stage.rate_of("video_dit"), stage.rate_of("action_dit")) == (1e-4, 1e-4)
    objective = config.method.objective
    assert (objective.video_weight, objective.action_weight, objective.alignment_weight) == (1.0, 1.0, 0.01)


PAPER_RECIPES = {name: recipe for name, recipe in RECIPES.items() if recipe(Stage.JOINT).method.kind == "wam"}
"""Rows of the paper. Tests of the other methods are in tests/methods."""
SMALL = ("tiny", "metaworld")
"""Prefixes of recipes that are not at the paper's scale."""


def test_options_that_are_not_in_the_paper_are_off_at_paper_scale():
    for name, recipe in PAPER_RECIPES.items():
        if name.startswith(SMALL):
            continue
        config = recipe(Stage.JOINT)
        assert not config.method.model.video_dit.learned_positions, name
        assert config.method.model.bridge.position_grid is None, name
        assert config.method.model.bridge.projector == "transformer", name
        assert config.method.model.guidance_noise_level == 1, name
        assert config.method.model.action_dit.state_dropout == 0, name
        assert not config.method.model.action_dit.self_attention_first, name
        assert not config.method.model.action_dit.time_grows_with_noise, name
        assert config.data.early_window_fraction == 0, name
        assert config.data.shift == 0, name
        assert config.stage.ema_decay is None, name
        assert (config.action_noise, config.video_noise) == ("random", "random"), name
        assert (config.method.objective.action_draws, config.method.objective.video_batch_fraction) == (1, 1.0), name


@cache
def _on_meta(model_config):
    with torch.device("meta"):
        return WAM(model_config)


def _count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_every_recipe_builds_on_the_meta_device():
    """The video DiT is Cosmos-Predict2.5-2B. Head and bridge together have N1.5's count without its future tokens."""
    for name, recipe in PAPER_RECIPES.items():
        for stage in Stage:
            assert recipe(stage).stage.name is stage
            assert compose(name, stage) == recipe(stage), name
        if not name.startswith(SMALL):
            model = _on_meta(recipe(Stage.JOINT).method.model)
            assert _count(model.video_dit) == 2_059_174_912, name
            assert _count(model.bridge, model.action_dit) == 763_300_896 - 32 * 1536, name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_on_the_meta_device(name):
    for stage in Stage:
        assert compose("agra_dino_l8", stage, [name]).stage.name is stage
    config = compose("agra_dino_l8", Stage.JOINT, [name])
    model = _on_meta(config.method.model)
    blocks, width = (36, 5120) if name == "cosmos_14b" else (28, 2048)
    each = 14 * width**2 + 5120 * width + 512  # attention 4 + 2, feed-forward 8; modulations, text keys, head norms
    around = 4 * width**2 + 905 * width + 100_353 * 1024  # time, output, patches; the text projection
    assert _count(model.video_dit) == blocks * each + around
    assert len(config.method.model.bridge.layers) == 8
    assert config.method.model.bridge.layers[-1] == blocks - 1


def test_head_presets_have_the_published_counts():
    """GR00T-N1.5 has 763.3 M with one embodiment, the literal reading 464.2 M, both with 32 future tokens."""
    groot = _on_meta(compose("agra_dino_l8", Stage.JOINT, ["groot_head"]).method.model)
    assert _count(groot.bridge, groot.action_dit) == 763_300_896
    literal = _on_meta(compose("agra_dino_l8", Stage.JOINT, ["literal_head", "groot_head"]).method.model)
    assert _count(literal.bridge, literal.action_dit) == 464_198_688


def test_presets_are_c3():
    """Steps, rates, horizon and stride of every experiment, with the adapt stage's 5k before and the robot's 2k after."""
    rows = {
        ("agra_dino_l8", ()): (80_000, 1e-4, 16, 1),
        ("agra_dino_l8", ("gr1",)): (80_000, 1e-4, 16, 1),
        ("agra_dino_l8", ("gr1_few_shot",)): (40_000, 1e-4, 16, 1),
        ("wam", ("real_world",)): (60_000, 1e-5, 48, 3),
        ("agra_dino_l8", ("real_world", "egodex")): (60_000, 1e-5, 48, 3),
    }
    for (name, presets), (steps, video_lr, horizon, stride) in rows.items():
        config = compose(name, Stage.JOINT, presets)
        assert config.stage.steps == steps
        assert (config.stage.rate_of("video_dit"), config.stage.rate_of("action_dit")) == (video_lr, 1e-4)
        assert (config.method.model.action_dit.horizon, config.data.frame_stride) == (horizon, stride)
        assert config.stage.batch_size == 256
        assert compose(name, Stage.ADAPT, presets).stage.steps == 5_000
        finetune = compose(name, Stage.FINETUNE, presets).stage
        assert (finetune.steps, finetune.frozen) == (2_000, ("video_dit",))
    human = compose("agra_dino_l8", Stage.JOINT, ["real_world", "egodex"])
    assert human.data.embodiments == ("iron", "human_egodex")
    assert human.method.model.action_dit.num_embodiments == 2


def test_freeze_backbone_adapts_first_and_then_freezes():
    adapt, joint = (RECIPES["freeze_backbone"](stage) for stage in (Stage.ADAPT, Stage.JOINT))
    assert ("video_dit" in adapt.stage.frozen, adapt.method.objective.video_weight) == (False, 1.0)
    assert ("video_dit" in joint.stage.frozen, joint.method.objective.video_weight) == (True, 0.0)


def test_condition_level_follows_the_checkpoint():
    post, pre = (compose("wam", Stage.JOINT, presets).method.model for presets in ([], ["cosmos_pre_trained"]))
    assert (post.codec.revision, post.condition_noise_level) == ("diffusers/base/post-trained", 1e-4)
    assert (pre.codec.revision, pre.condition_noise_level) == ("diffusers/base/pre-trained", None)
    assert pre.text.revision == pre.codec.revision


def test_banks_of_biases_have_no_weight_decay(small_config):
    """#44: a bank of biases (n, out) has two axes, but is a bias."""
    method = small_config.method.build()
    decayed = {id(p): g["weight_decay"] > 0 for g in parameter_groups(method, small_config.stage) for p in g["params"]}
    for name, parameter in method.named_parameters():
        assert decayed[id(parameter)] == (parameter.ndim > 1 and not name.endswith("bias")), name
    bank = method.wam.action_dit.action_encoder.layer1
    assert (bank.bias.ndim, decayed[id(bank.bias)], decayed[id(bank.weight)]) == (2, False, True)


@pytest.mark.parametrize(("std", "expected"), [(0.02, 0.02), (None, 1 / 8)], ids=["GR00T's", "from scratch"])
def test_initial_banks(std, expected):
    """#45: the banks' initial standard deviation is GR00T's by default."""
    torch.manual_seed(0)
    bank = EmbodimentLinear(2, 64, 256, std)
    assert bank.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert bank.bias.eq(0).all()
    assert ActionDiTConfig().bank_init_std == 0.02


def test_bridge_drops_the_attention_twice():
    """#46: with probability 1/2 each, a quarter of the values remains, scaled by 4."""
    torch.manual_seed(0)
    block = SelfAttentionBlock(BridgeConfig(num_heads=2, head_dim=32, dropout=0.5)).train()
    for linear, bias in ((block.attn.to_out, 1.0), (block.ff[3], 0.0)):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.constant_(linear.bias, bias)
    x = torch.zeros(4, 100, 64)
    values = block(x)
    assert values.unique().tolist() == [0.0, 4.0]
    assert values.ne(0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_learning_rate_warms_up_and_falls_to_zero():
    stage = agra_dino_l8().stage
    factors = [stage.learning_rate_factor(step) for step in range(stage.steps)]
    assert factors.index(max(factors)) == pytest.approx(0.05 * stage.steps, abs=1)
    assert max(factors) == 1
    assert factors[-1] < 1e-8
    middle = round(0.525 * stage.steps)
    assert factors[middle] == pytest.approx(0.5, abs=1e-3)
