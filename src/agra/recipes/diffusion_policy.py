"""Diffusion Policy, as published and tiny."""

from dataclasses import replace

from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.methods.diffusion_policy import DiffusionPolicyConfig
from agra.recipes.editing import at_stage
from agra.recipes.tiny import tiny
from agra.stages import Stage, StageConfig
from agra.wam.text import TextConfig


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
