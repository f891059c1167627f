"""Recipes: one function for each variant in the paper and each compared method, and presets that change any recipe.

A recipe takes a stage and returns a `RunConfig`. It calls another recipe and replaces the fields that differ. The
defaults of the config classes are the paper's. A preset changes a config: other data (C.3), EgoDex, another reading of
the action head. `compose` combines recipe, stage and presets.
"""

from collections.abc import Sequence

from agra.config import RunConfig
from agra.recipes.diffusion_policy import diffusion_policy, tiny_diffusion_policy
from agra.recipes.dit4dit import dit4dit, dit4dit_attached, tiny_dit4dit, tiny_dit4dit_attached
from agra.recipes.editing import Preset, Recipe, at_stage
from agra.recipes.flare import (
    flare,
    flare_frozen,
    flare_policy_only,
    tiny_flare,
    tiny_flare_frozen,
    tiny_flare_policy_only,
)
from agra.recipes.lda import lda_scratch, lda_scratch_vae, tiny_lda_scratch, tiny_lda_scratch_vae
from agra.recipes.metaworld import metaworld, metaworld_diffusion_policy, metaworld_wam
from agra.recipes.paper import (
    PAPER,
    agra_bridge_l8,
    agra_dino_hierarchical,
    agra_dino_l4_8_12,
    agra_dino_l8,
    agra_dino_l15,
    agra_shared_denoising_pass,
    agra_siglip_l8,
    agra_video_pass,
    freeze_backbone,
    wam,
)
from agra.recipes.presets import (
    cosmos_14b,
    cosmos_pre_trained,
    egodex,
    gr1,
    gr1_few_shot,
    groot_head,
    literal_head,
    real_world,
)
from agra.recipes.tiny import tiny, tiny_wam
from agra.recipes.uwm import tiny_uwm, uwm
from agra.recipes.vla import tiny_vla, vla
from agra.stages import Stage

__all__ = [
    "PRESETS",
    "RECIPES",
    "Preset",
    "Recipe",
    "agra_bridge_l8",
    "agra_dino_hierarchical",
    "agra_dino_l4_8_12",
    "agra_dino_l8",
    "agra_dino_l15",
    "agra_shared_denoising_pass",
    "agra_siglip_l8",
    "agra_video_pass",
    "at_stage",
    "compose",
    "cosmos_14b",
    "cosmos_pre_trained",
    "diffusion_policy",
    "dit4dit",
    "dit4dit_attached",
    "egodex",
    "flare",
    "flare_frozen",
    "flare_policy_only",
    "freeze_backbone",
    "gr1",
    "gr1_few_shot",
    "groot_head",
    "lda_scratch",
    "lda_scratch_vae",
    "literal_head",
    "metaworld",
    "metaworld_diffusion_policy",
    "metaworld_wam",
    "real_world",
    "tiny",
    "tiny_diffusion_policy",
    "tiny_dit4dit",
    "tiny_dit4dit_attached",
    "tiny_flare",
    "tiny_flare_frozen",
    "tiny_flare_policy_only",
    "tiny_lda_scratch",
    "tiny_lda_scratch_vae",
    "tiny_uwm",
    "tiny_vla",
    "tiny_wam",
    "uwm",
    "vla",
    "wam",
]

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        *PAPER,
        tiny,
        tiny_wam,
        diffusion_policy,
        tiny_diffusion_policy,
        dit4dit,
        dit4dit_attached,
        tiny_dit4dit,
        tiny_dit4dit_attached,
        flare,
        flare_frozen,
        flare_policy_only,
        tiny_flare,
        tiny_flare_frozen,
        tiny_flare_policy_only,
        vla,
        tiny_vla,
        uwm,
        tiny_uwm,
        lda_scratch,
        lda_scratch_vae,
        tiny_lda_scratch,
        tiny_lda_scratch_vae,
        metaworld,
        metaworld_wam,
        metaworld_diffusion_policy,
    )
}
PRESETS: dict[str, Preset] = {
    preset.__name__: preset
    for preset in (gr1, gr1_few_shot, real_world, egodex, literal_head, groot_head, cosmos_pre_trained, cosmos_14b)
}


def compose(name: str, stage: Stage, presets: Sequence[str] = ()) -> RunConfig:
    """Make the recipe `name`, change it by `presets` in their order, and turn it into `stage`."""
    config = RECIPES[name](Stage.JOINT)
    for preset in presets:
        config = PRESETS[preset](config)
    return at_stage(config, stage)
