"""Changes of run configs that recipes and presets share."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agra.alignment.loss import AlignmentConfig
from agra.config import RunConfig
from agra.methods.wam import WAMMethodConfig
from agra.stages import Stage

Recipe = Callable[[Stage], RunConfig]
Preset = Callable[[RunConfig], RunConfig]


def at_stage(config: RunConfig, stage: Stage) -> RunConfig:
    """Turn a joint-stage config into another stage's, with the steps of C.3."""
    if stage is Stage.JOINT:
        return config
    steps = min(config.stage.steps, 5_000 if stage is Stage.ADAPT else 2_000)
    changed = replace(config.stage, name=stage, steps=steps, frozen=config.method.frozen_at(stage))
    return replace(config, method=config.method.at_stage(stage), stage=changed)


def wam_method(config: RunConfig) -> WAMMethodConfig:
    """Return the method, a WAM. Raises ValueError for another method."""
    if not isinstance(config.method, WAMMethodConfig):
        raise ValueError(f"expected a recipe of the method wam for this preset, got one of {config.method.kind}")
    return config.method


def model_with(config: RunConfig, **changes: Any) -> RunConfig:
    """Replace fields of the model."""
    method = wam_method(config)
    return replace(config, method=replace(method, model=replace(method.model, **changes)))


def head_with(config: RunConfig, **changes: Any) -> RunConfig:
    """Replace fields of the action DiT."""
    return model_with(config, action_dit=replace(wam_method(config).model.action_dit, **changes))


def objective_with(config: RunConfig, **changes: Any) -> RunConfig:
    """Replace fields of the objective."""
    method = wam_method(config)
    return replace(config, method=replace(method, objective=replace(method.objective, **changes)))


def aligned(config: RunConfig, alignment: AlignmentConfig | None) -> RunConfig:
    """Replace the alignment. None turns it off."""
    if alignment is None:
        config = objective_with(config, alignment_weight=0.0)
    return replace(config, method=replace(wam_method(config), alignment=alignment))


def bridged(config: RunConfig, layer: int) -> RunConfig:
    """Let every action block read one video layer."""
    model = wam_method(config).model
    return model_with(config, bridge=replace(model.bridge, layers=(layer,) * model.action_dit.num_blocks))
