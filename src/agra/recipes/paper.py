"""A recipe for each variant in the paper."""

from dataclasses import replace

from agra.alignment.loss import AlignmentConfig
from agra.alignment.teacher import TeacherConfig
from agra.config import RunConfig
from agra.data.config import DataConfig
from agra.methods.wam import Pass
from agra.recipes.editing import Recipe, aligned, at_stage, bridged, objective_with
from agra.stages import Stage
from agra.wam.bridge import bridged_layers


def agra_dino_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL8, the paper's default: video layer 8 aligned with DINOv2 on the conditioning pass (4.1, C.1, C.3)."""
    return at_stage(RunConfig(data=DataConfig(embodiments=("gr1",))), stage)


def wam(stage: Stage = Stage.JOINT) -> RunConfig:
    """WAM: the baseline without alignment (4.1)."""
    return aligned(agra_dino_l8(stage), None)


def freeze_backbone(stage: Stage = Stage.JOINT) -> RunConfig:
    """Freeze backbone: the video DiT keeps the weights of the adapt stage, and the action head alone learns (4.1, B.2.2)."""
    config = objective_with(wam(), video_weight=0.0)
    return at_stage(replace(config, stage=replace(config.stage, frozen=("video_dit",))), stage)


def agra_dino_l15(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL15: a deeper layer is aligned (4.2.2 a, Fig. 10)."""
    return aligned(agra_dino_l8(stage), AlignmentConfig(layers=(15,)))


def agra_dino_l4_8_12(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-DinoL4/8/12: three layers are aligned at once (4.2.2 a)."""
    return aligned(agra_dino_l8(stage), AlignmentConfig(layers=(4, 8, 12)))


def agra_dino_hierarchical(stage: Stage = Stage.JOINT) -> RunConfig:
    """Hierarchical alignment: three layers, each with a DINOv2 block of its own depth (ours: 3, 7, 11) (4.2.2 a)."""
    return aligned(agra_dino_l8(stage), AlignmentConfig(layers=(4, 8, 12), teacher=TeacherConfig(depths=(3, 7, 11))))


def agra_siglip_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-SiglipL8: SigLIP as the teacher (4.2.2 b)."""
    teacher = TeacherConfig(kind="siglip", source="google/siglip-base-patch16-384")
    return aligned(agra_dino_l8(stage), AlignmentConfig(teacher=teacher))


def agra_bridge_l8(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-BridgeL8: every cross-attention block reads the aligned layer (4.2.2 c)."""
    return bridged(agra_dino_l8(stage), 8)


def agra_video_pass(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-VideoPass: the denoising pass is aligned, the conditioning pass guides (B.2.2, Table 2)."""
    return objective_with(agra_dino_l8(stage), guidance_pass=Pass.CONDITIONING, aligned_pass=Pass.DENOISING)


def agra_shared_denoising_pass(stage: Stage = Stage.JOINT) -> RunConfig:
    """AGRA-SharedDenoisingPass: one pass, at the sampled noise level, guides and is aligned (B.2.2, Table 2)."""
    return objective_with(agra_dino_l8(stage), guidance_pass=Pass.DENOISING, aligned_pass=Pass.DENOISING)


def _named(name: str, summary: str, make: Recipe) -> Recipe:
    """Make a recipe of a sweep, with a name and a summary."""

    def recipe(stage: Stage = Stage.JOINT) -> RunConfig:
        return make(stage)

    recipe.__name__, recipe.__doc__ = name, summary
    return recipe


def _aligned_at(layer: int) -> Recipe:
    summary = f"Layer sweep: video layer {layer} aligned alone (Fig. 10)."
    alignment = AlignmentConfig(layers=(layer,))
    return _named(f"agra_dino_l{layer}", summary, lambda stage: aligned(agra_dino_l8(stage), alignment))


def _bridged_at(layer: int) -> Recipe:
    summary = f"WAM whose action blocks all read video layer {layer} (Fig. 11)."
    return _named(f"wam_bridge_l{layer}", summary, lambda stage: bridged(wam(stage), layer))


PAPER: tuple[Recipe, ...] = (
    agra_dino_l8,
    wam,
    freeze_backbone,
    agra_dino_l15,
    agra_dino_l4_8_12,
    agra_dino_hierarchical,
    agra_siglip_l8,
    agra_bridge_l8,
    agra_video_pass,
    agra_shared_denoising_pass,
    *map(_aligned_at, sorted({*bridged_layers(28, 8)} - {8, 15})),
    *map(_bridged_at, bridged_layers(28, 8)),
)
"""All rows, with the two layer sweeps."""
