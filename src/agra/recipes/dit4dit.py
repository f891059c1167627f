"""DiT4DiT, as published and tiny, detached and attached."""

from dataclasses import replace

from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.methods.dit4dit import FIRST_SCHEDULER_LEVEL, DiT4DiTConfig
from agra.methods.wam import NoiseLevels
from agra.recipes.editing import at_stage, wam_method
from agra.recipes.tiny import tiny_wam
from agra.stages import Stage, StageConfig


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
    model = wam_method(base).model
    model = replace(
        model,
        guidance_noise_level=FIRST_SCHEDULER_LEVEL,
        bridge=replace(model.bridge, layers=(3,) * model.action_dit.num_blocks),
    )
    objective = replace(wam_method(base).objective, noise_levels=NoiseLevels.UNIFORM)
    return at_stage(replace(base, method=DiT4DiTConfig(model=model, objective=objective)), stage)


def tiny_dit4dit_attached(stage: Stage = Stage.JOINT) -> RunConfig:
    """DiT4DiT at tiny's size whose action loss trains the video DiT as well."""
    return _attached(tiny_dit4dit(stage))


def _attached(config: RunConfig) -> RunConfig:
    assert isinstance(config.method, DiT4DiTConfig)
    return replace(config, method=replace(config.method, detach=False))
