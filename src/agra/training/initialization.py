"""Initial weights of a stage: those of an earlier stage, or of a public checkpoint (C.3)."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from agra.checkpoints.folder import OPTIMIZER, find, resolve, verify
from agra.checkpoints.read import load_parts, read_config, stored_parts
from agra.config import RunConfig
from agra.lora import merged
from agra.methods.method import Method
from agra.stages import Stage
from agra.wam.action_dit import EmbodimentLinear


@runtime_checkable
class StartsFromPublicModel(Protocol):
    """A method that can take weights of a public model in its own layout."""

    def load_public(self, source: str | Path) -> None:
        """Load from a folder or a hub id. Raises FileNotFoundError or ValueError with the remedy."""
        ...


def load_initial_weights(method: Method, source: str | Path, config: RunConfig) -> None:
    """Start a stage from a checkpoint of an earlier stage, or from a public model (C.3).

    A checkpoint of `adapt` gives the parts that it trained. One of `joint` or `finetune` gives every part that both
    methods have and whose weights fit (`Method.shared_parts`). Other parts stay fresh. Adapters of the earlier stage
    are merged. Raises ValueError where the checkpoint does not fit this stage, or where an embodiment has another row
    in the loaded embodiment banks.
    """
    folder = find(source)
    if not _is_checkpoint(folder):
        if folder.name == "best" and folder.parent.is_dir():
            raise FileNotFoundError(
                f"{source}: the run has no best checkpoint; train it with --stage.keep-best min:NAME"
            )
        if not isinstance(method, StartsFromPublicModel):
            raise ValueError(f"{source}: no checkpoint here, and {config.method.kind} starts from no public model")
        method.load_public(source)
        return
    path = resolve(folder)
    verify(path, without=(OPTIMIZER,))
    earlier = read_config(path)
    if earlier.method.kind != config.method.kind:
        raise ValueError(f"{path}: a checkpoint of {earlier.method.kind} does not start {config.method.kind}")
    parts, stored = method.parts(), stored_parts(path)
    if earlier.stage.name is Stage.ADAPT:
        loaded = {part: module for part, module in parts.items() if part not in earlier.stage.frozen and part in stored}
    elif config.stage.name is Stage.ADAPT:
        raise ValueError(f"{path}: a {earlier.stage.name} checkpoint does not start an adapt stage")
    else:
        loaded = {part: module for part, module in parts.items() if part in stored}
    with merged(loaded, earlier.stage.lora, leave_out=method.always_frozen()):
        shared = method.shared_parts(loaded, earlier.method)
        if any(isinstance(module, EmbodimentLinear) for part in shared.values() for module in part.modules()):
            _check_embodiments(earlier.data.embodiments, config.data.embodiments, path)
        load_parts(shared, path)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or any(folder.glob("step_*/manifest.json"))


def _check_embodiments(earlier: tuple[str, ...], present: tuple[str, ...], path: Path) -> None:
    """Check that every embodiment keeps its place in the list, which is its row in the embodiment banks."""
    for row, name in enumerate(present):
        if name in earlier and earlier.index(name) != row:
            raise ValueError(
                f"data.embodiments: {name!r} is row {row} here and row {earlier.index(name)} in {path}; list the "
                f"embodiments in that stage's order: {' '.join(earlier)}"
            )
