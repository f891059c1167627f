"""AGRA, WAM and Diffusion Policy for Meta-World's 50 tasks, each small enough for a CPU core.

The data are demonstrations of `metaworld_20hz`: 320 x 320 frames, of which the workspace is cut out, and rows of four 80 Hz
actions side by side. runs/metaworld.sh trains and evaluates the recipes.
"""

from dataclasses import replace

from agra.config import RunConfig, VisualRelianceConfig
from agra.methods.diffusion_policy import DiffusionPolicyConfig
from agra.recipes.diffusion_policy import tiny_diffusion_policy
from agra.recipes.editing import aligned, at_stage, head_with, model_with, objective_with, wam_method
from agra.recipes.tiny import tiny
from agra.stages import Stage


def metaworld(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA for Meta-World at 20 Hz, from scratch: two latent frames of 112 x 112 pixels, chunks of 8 rows.

    A chunk spans 32 control steps of the suite. The latent frames are the observation and the four frames at every
    second row after it, so both end at the same time. Networks and losses' weights are tiny's. The averaged weights are
    meant to act (`agra export --ema`).
    """
    base = tiny(Stage.JOINT)
    data = replace(
        base.data,
        crop_rows=(48, 272),
        crop_columns=(96, 320),
        frame_stride=2,
        early_window_fraction=0.4,
        early_window_steps=3,
        target_steps=3,
        embodiments=("sawyer_20hz",),
    )
    training = replace(
        base.stage,
        steps=12_000,
        learning_rate=1e-3,
        ema_decay=0.999,
        ema_power=0.75,
        validate_every=1_000,
        save_every=500,
    )
    # An action of 1 asks for a centimetre. The target is the displacement that a whole chunk asks for.
    reliance = VisualRelianceConfig(dimensions=("hand_dx_*", "hand_dy_*", "hand_dz_*"), displacement_unit=0.01)
    config = replace(base, data=data, stage=training, visual_reliance=reliance)
    config = head_with(config, state_dim=4, action_dim=16, horizon=8, num_embodiments=1)
    config = objective_with(config, action_draws=2)
    model = wam_method(config).model
    config = model_with(
        config,
        frame_size=(112, 112),
        codec=replace(model.codec, channels=32),
        video_dit=replace(model.video_dit, latent_channels=32),
        bridge=replace(model.bridge, position_grid=(2, 7, 7)),
    )
    alignment = wam_method(config).alignment
    assert alignment is not None
    config = aligned(config, replace(alignment, teacher=replace(alignment.teacher, input_size=(196, 196))))
    return at_stage(config, stage)


def metaworld_wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """The baseline WAM for Meta-World. It differs from `metaworld` in the alignment alone."""
    return aligned(metaworld(stage), None)


def metaworld_diffusion_policy(stage: Stage = Stage.JOINT) -> RunConfig:
    """Diffusion Policy for Meta-World, with tiny's networks: the demonstrations, frames and chunks of `metaworld`.

    Its random crop keeps 100 of 112 pixels, about the share of the original.
    """
    base, small = metaworld(Stage.JOINT), tiny_diffusion_policy(Stage.JOINT)
    assert isinstance(small.method, DiffusionPolicyConfig)
    sizes = {"frame_size": (112, 112), "crop_size": (100, 100), "state_dim": 4, "action_dim": 16, "horizon": 8}
    data = replace(base.data, frame_stride=1, normalization="min_max", target_steps=None)
    training = replace(base.stage, learning_rate=small.stage.learning_rate, weight_decay=small.stage.weight_decay)
    return at_stage(replace(base, method=replace(small.method, **sizes), data=data, stage=training), stage)
