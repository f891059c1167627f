"""Initial weights of a fresh stage: those of the stage before, or of a public checkpoint (C.3)."""

from pathlib import Path

from agra.config import RunConfig
from agra.training import checkpoint
from agra.training.lora import merged
from agra.training.objective import Objective
from agra.training.stages import Stage


def initialize(objective: Objective, source: str | Path, config: RunConfig) -> None:
    """Start a stage from a checkpoint of an earlier one, or from a pretrained video DiT (C.3).

    From `adapt` the video DiT is taken and the rest stays fresh. From `joint` everything is taken; projectors of layers
    that were not aligned there stay fresh. Adapters of the earlier stage are merged. A `source` that is not a checkpoint
    of ours is a diffusers model: a folder, or a hub id with or without @revision, whose `transformer` is the video DiT; the
    default revision is that of the recipe's codec. Raises ValueError where the checkpoint does not fit this stage.
    """
    folder = checkpoint.find(source)
    if not folder.is_dir() or (folder / "transformer").is_dir():
        _load_public(objective, source, config)
        return
    path = checkpoint.resolve(folder)
    checkpoint.verify(path, without=(checkpoint.OPTIMIZER,))
    earlier = checkpoint.read_config(path)
    if earlier.stage.name is Stage.ADAPT:
        with merged(objective.wam, earlier.stage.lora):
            checkpoint.load_weights(objective.wam.video_dit, path, prefix="video_dit.")
        return
    if config.stage.name is Stage.ADAPT:
        raise ValueError(f"{path}: a {earlier.stage.name} checkpoint does not start an adapt stage")
    _check_embodiments(earlier.data.embodiments, config.data.embodiments, path)
    with merged(objective.wam, earlier.stage.lora):
        checkpoint.load_weights(objective.wam, path)
    if objective.projectors is not None and checkpoint.has_projectors(path):
        assert config.alignment is not None
        assert earlier.alignment is not None
        if (earlier.alignment.teacher, earlier.alignment.projector) == (
            config.alignment.teacher,
            config.alignment.projector,
        ):
            for layer in sorted(set(earlier.alignment.layers) & set(config.alignment.layers)):
                projector = objective.projectors[str(layer)]
                checkpoint.load_weights(projector, path, "projectors.safetensors", prefix=f"{layer}.")


def _load_public(objective: Objective, source: str | Path, config: RunConfig) -> None:
    local = Path(source).is_dir()
    name, _, revision = (str(source), "", "") if local else str(source).partition("@")
    revision = revision or config.model.codec.revision or ""
    level, pre = config.model.condition_noise_level, revision.endswith("pre-trained")
    if not local and (pre or revision.endswith("post-trained")) and pre != (level is None):
        raise ValueError(
            f"{name}: its revision {revision} goes with model.condition_noise_level {None if pre else 1e-4}, got "
            f"{level}; the preset cosmos_pre_trained changes all that belongs together"
        )
    objective.wam.video_dit.load_pretrained(name, revision=revision or None)


def _check_embodiments(earlier: tuple[str, ...], present: tuple[str, ...], path: Path) -> None:
    """An embodiment's place in the list is its row in the action DiT's banks: it must not move between stages."""
    for row, name in enumerate(present):
        if name in earlier and earlier.index(name) != row:
            raise ValueError(
                f"data.embodiments: {name!r} is row {row} here and row {earlier.index(name)} in {path}; list the embodiments"
                f" in the order of that stage: {' '.join(earlier)}"
            )
