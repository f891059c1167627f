"""UWM, as published and tiny."""

from dataclasses import replace

from agra.config import RunConfig
from agra.data.config import AugmentConfig, DataConfig
from agra.methods.uwm import UWMConfig
from agra.recipes.editing import at_stage
from agra.recipes.tiny import tiny
from agra.stages import Stage, StageConfig
from agra.wam.codec import CodecConfig
from agra.wam.joint_transformer import JointTransformerConfig
from agra.wam.text import TextConfig


def uwm(stage: Stage = Stage.JOINT) -> RunConfig:
    """UWM as published, for GR1's 24 tasks: frames t+16 and t+17 in SDXL's latents, the instruction in the condition.

    Frames are decoded and encoded while training, so that one crop and colour change holds for the present and the
    future (docs/methods.md). The original's own config has no instruction: `--method.language none`.
    """
    training = StageConfig(
        warmup_ratio=0.0125,
        weight_decay=1e-6,
        betas=(0.9, 0.999),
        clip_norm=1.0,
    )
    augmentation = AugmentConfig(crop=0.93, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2)
    data = DataConfig(embodiments=("gr1",), cached=(), augment=augmentation)
    return at_stage(RunConfig(method=UWMConfig(language="pooled"), data=data, stage=training), stage)


def tiny_uwm(stage: Stage = Stage.JOINT) -> RunConfig:
    """UWM small enough for two CPU cores: 4 blocks of width 128, single frames of tiny's patch PCA, the instruction.

    Frames and frame encoder are those of `tiny_diffusion_policy`, the demonstrations and early windows tiny's.
    """
    method = UWMConfig(
        frame_size=(96, 168),
        image_codec=CodecConfig(kind="patch_pca", channels=24),
        encoder_channels=(32, 64, 96, 128),
        pooling="spatial_softmax",
        vector_dim=64,
        language="pooled",
        text_encoder=TextConfig(kind="minilm", length=16),
        state_dim=16,
        action_dim=16,
        transformer=JointTransformerConfig(
            width=128, num_blocks=4, num_heads=4, num_registers=8, patch_size=(3, 3), step_dim=64
        ),
    )
    base = tiny(Stage.JOINT)
    data = replace(base.data, frame_stride=1, normalization="min_max", target_steps=None, embodiments=("tabletop",))
    training = replace(base.stage, learning_rate=5e-4, weight_decay=1e-6)
    return at_stage(replace(base, method=method, data=data, stage=training), stage)
