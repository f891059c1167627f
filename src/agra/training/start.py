"""What a fresh stage starts from: the stage before, or a public checkpoint.                                          C.3"""

from pathlib import Path

from agra.training import checkpoint
from agra.training.lora import merged
from agra.training.objective import Objective
from agra.training.stages import Stage


def initialize(objective: Objective, source: str | Path, stage: Stage) -> None:
    """Start a stage from a checkpoint of an earlier one, or from a pretrained video DiT.                            C.3

    From `adapt` the video DiT is taken and the rest stays fresh; from `joint` everything is; adapters of the earlier stage
    are merged. A `source` that is not a
    checkpoint of ours is a diffusers model: a folder, or a hub id with or without @revision, whose `transformer` is the
    video DiT; the revision is else the one of the recipe's codec.
    """
    folder = checkpoint.find(source)
    if not folder.is_dir() or (folder / "transformer").is_dir():
        config = objective.wam.config
        name, _, revision = (str(source), "", "") if folder.is_dir() else str(source).partition("@")
        revision = revision or config.codec.revision or ""
        told, pre = config.condition_noise_level, revision.endswith("pre-trained")
        if not folder.is_dir() and (pre or revision.endswith("post-trained")) and pre != (told is None):
            raise ValueError(
                f"{name}: its revision {revision} goes with model.condition_noise_level {None if pre else 1e-4}, got "
                f"{told}; the preset cosmos_pre_trained changes all that belongs together"
            )
        objective.wam.video_dit.load_pretrained(name, revision=revision or None)
        return
    found = checkpoint.resolve(folder)
    checkpoint.verify(found)
    earlier = checkpoint.read_config(found).stage
    if earlier.name is Stage.ADAPT:
        with merged(objective.wam, earlier.lora):
            checkpoint.load_weights(objective.wam.video_dit, found, prefix="video_dit.")
        return
    if stage is Stage.ADAPT:
        raise ValueError(f"{found}: a {earlier.name} checkpoint does not start an adapt stage")
    with merged(objective.wam, earlier.lora):
        checkpoint.load_weights(objective.wam, found)
    if objective.projectors is not None and checkpoint.read_config(found).aligns:
        checkpoint.load_weights(objective.projectors, found, "projectors.safetensors")
