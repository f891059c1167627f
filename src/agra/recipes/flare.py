"""FLARE, as published and tiny: with the encoder's average or the frozen vision encoder as target, and without one."""

from dataclasses import replace
from typing import Literal

from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.methods.flare import EncoderConfig, FLAREConfig
from agra.recipes.editing import at_stage, wam_method
from agra.recipes.tiny import tiny
from agra.stages import Stage, StageConfig
from agra.wam.text import TextConfig


def flare(stage: Stage = Stage.JOINT) -> RunConfig:
    """FLARE as published for GR1, on frozen SigLIP2 features: 80k steps of 1,024 windows (docs/methods.md).

    The adapt stage trains the action-aware embedding. The paper's has 80k steps too: `--stage.steps 80000`.
    """
    config = RunConfig(
        method=FLAREConfig(),
        data=DataConfig(embodiments=("gr1",), cached=()),
        stage=StageConfig(batch_size=1024),
    )
    return at_stage(config, stage)


def flare_frozen(stage: Stage = Stage.JOINT) -> RunConfig:
    """FLARE whose target is the frozen SigLIP2, pooled 2 x 2, with 64 future tokens instead of 32."""
    config = flare(Stage.JOINT)
    assert isinstance(config.method, FLAREConfig)
    head = replace(config.method.action_dit, future_tokens=64)
    return at_stage(replace(config, method=replace(config.method, target="frozen", action_dit=head)), stage)


def flare_policy_only(stage: Stage = Stage.JOINT) -> RunConfig:
    """FLARE's policy without its alignment: the same networks, tokens and steps."""
    return at_stage(_with_target(flare(Stage.JOINT), "none"), stage)


def tiny_flare(stage: Stage = Stage.JOINT) -> RunConfig:
    """FLARE small enough for two CPU cores: tiny's action DiT with 8 future tokens, on packaged DINOv2-S and MiniLM.

    One fusion layer, 8 queries. Demonstrations, draws of noise and early windows are tiny's.
    """
    base = tiny(Stage.JOINT)
    wam = wam_method(base)
    assert wam.teacher is not None
    method = FLAREConfig(
        vision_encoder=wam.teacher,
        feature_grid=(4, 7),
        text_encoder=TextConfig(kind="minilm", length=16),
        encoder=EncoderConfig(num_layers=1, num_heads=2, head_dim=64, num_queries=8),
        action_dit=replace(wam.model.action_dit, future_tokens=8),
        future_frame=4,
        target_grid=(2, 4),
        action_draws=wam.objective.action_draws,
    )
    return at_stage(replace(base, method=method, data=replace(base.data, target_steps=None)), stage)


def tiny_flare_frozen(stage: Stage = Stage.JOINT) -> RunConfig:
    """FLARE at tiny's size whose target is the frozen DINOv2-S, pooled to 8 cells."""
    return at_stage(_with_target(tiny_flare(Stage.JOINT), "frozen"), stage)


def tiny_flare_policy_only(stage: Stage = Stage.JOINT) -> RunConfig:
    """FLARE's policy at tiny's size without its alignment: the same networks, tokens and steps."""
    return at_stage(_with_target(tiny_flare(Stage.JOINT), "none"), stage)


def _with_target(config: RunConfig, target: Literal["frozen", "none"]) -> RunConfig:
    assert isinstance(config.method, FLAREConfig)
    return replace(config, method=replace(config.method, target=target))
