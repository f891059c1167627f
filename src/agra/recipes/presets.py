"""Presets: settings that C.1 and C.3 vary between experiments, and other backbones."""

from dataclasses import replace

from agra.config import RunConfig
from agra.data.config import SourceConfig
from agra.data.gr1 import EMBODIMENT as GR1
from agra.data.gr1 import REPOSITORY as GR1_REPOSITORY
from agra.data.gr1 import gr1_mixture
from agra.recipes.editing import head_with, model_with, wam_method
from agra.wam.bridge import bridged_layers


def gr1(config: RunConfig) -> RunConfig:
    """GR1 tabletop: the 24 tasks with 1,000 demonstrations each, from the hub or from `--data.path`. 80k steps (B.1, C.3).

    Latents and targets are encoded while training: a cache of them would take 3 TB (`agra prepare --estimate`).
    """
    return _gr1(config, gr1_mixture())


def gr1_few_shot(config: RunConfig) -> RunConfig:
    """GR1 tabletop with 100 demonstrations of each task, 2,400 in all: 40k steps instead of 80k (B.1, C.3)."""
    config = _gr1(config, gr1_mixture(few_shot=True))
    return replace(config, stage=replace(config.stage, steps=40_000))


def real_world(config: RunConfig) -> RunConfig:
    """Real robot: 60k steps (fine-tuning 2k), video DiT at 1e-5, chunks of 48 actions, every third frame (C.2.1, C.3).

    The 50 dimensions of IRON's state and action are padded to 64 and masked.
    """
    config = head_with(config, horizon=48, state_dim=64, action_dim=64)
    return replace(
        config,
        data=replace(config.data, frame_stride=3, embodiments=("iron", *config.data.embodiments[1:]), cached=()),
        stage=replace(config.stage, steps=60_000, learning_rate_by_part={"video_dit": 1e-5}),
    )


def egodex(config: RunConfig) -> RunConfig:
    """Human demonstrations of EgoDex: a second embodiment with its own encoders and decoder (4.2.2 d)."""
    embodiments = (*config.data.embodiments, "human_egodex")
    config = head_with(config, num_embodiments=len(embodiments))
    return replace(config, data=replace(config.data, embodiments=embodiments))


def literal_head(config: RunConfig) -> RunConfig:
    """Action head by the wording of C.1: inner width 1024 = 32 x 32, instead of GR00T-N1.5's 1536 (#4)."""
    return head_with(config, head_dim=32)


def groot_head(config: RunConfig) -> RunConfig:
    """Action head with N1.5's 32 future tokens, so that all weights of N1.5 can be loaded (`--head`)."""
    return head_with(config, future_tokens=32)


def cosmos_pre_trained(config: RunConfig) -> RunConfig:
    """Cosmos's pre-trained revision: the condition frame has the noise level of the other frames (#10, #11)."""
    return _cosmos(config, "nvidia/Cosmos-Predict2.5-2B", "diffusers/base/pre-trained", level=None)


def cosmos_14b(config: RunConfig) -> RunConfig:
    """Cosmos-Predict2.5-14B: 36 layers of width 5120, with a bridge and keys of that width. Not in the paper."""
    config = _cosmos(config, "nvidia/Cosmos-Predict2.5-14B", "diffusers/base/post-trained", level=1e-4)
    model = wam_method(config).model
    video = replace(model.video_dit, num_layers=36, num_heads=40)
    bridge = replace(model.bridge, layers=bridged_layers(36, model.action_dit.num_blocks), num_heads=80)
    head = replace(model.action_dit, guidance_dim=video.width)
    return model_with(config, video_dit=video, bridge=bridge, action_dit=head)


def _gr1(config: RunConfig, mixture: tuple[SourceConfig, ...]) -> RunConfig:
    embodiments = (GR1, *config.data.embodiments[1:])
    mixture = tuple(replace(source, frame_stride=config.data.frame_stride) for source in mixture)
    data = replace(config.data, path=GR1_REPOSITORY, mixture=mixture, embodiments=embodiments, cached=())
    return replace(config, data=data)


def _cosmos(config: RunConfig, source: str, revision: str, *, level: float | None) -> RunConfig:
    model = wam_method(config).model
    codec, text = (replace(part, source=source, revision=revision) for part in (model.codec, model.text))
    return model_with(config, codec=codec, text=text, condition_noise_level=level)
