"""Atomic writing of checkpoints by one process. `agra.checkpoints.folder` describes their layout."""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from agra import files
from agra.checkpoints.folder import STEP, best, newest
from agra.checkpoints.migration import current_name
from agra.weights import read_tensors

log = logging.getLogger("agra.checkpoints")

Writers = Mapping[str, Callable[[Path], object]]
"""File names and the functions that write the files at a given path."""


def save(run: Path, step: int, writers: Writers, *, keep: int) -> Path:
    """Write a checkpoint under a temporary name, rename it, and remove all but the newest `keep` and the best."""
    remove_unfinished(run)
    # A second writer gets another name. It can make this one fail, but never mix its files into this checkpoint.
    temporary = run / f".step_{step:06d}.{secrets.token_hex(4)}.writing"
    temporary.mkdir(parents=True)
    try:
        for name, write in writers.items():
            write(temporary / name)
        for path in temporary.iterdir():
            files.sync(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise unwritten(run, step, error) from error
    manifest = {name: files.sha256(temporary / name) for name in sorted(writers)}
    return commit(temporary, run, step, manifest, keep=keep)


def unfinished(run: Path, step: int) -> Path:
    """Return the folder into which several processes write a step's checkpoint before it is renamed."""
    return run / f".step_{step:06d}.writing"


def remove_unfinished(run: Path) -> None:
    """Remove what killed saves of any step left. A run has one writer, and at most one save runs at a time."""
    for stale in run.glob(".step_*.writing"):
        shutil.rmtree(stale, ignore_errors=True)


def unwritten(run: Path, step: int, cause: BaseException) -> OSError:
    """Make the error for a checkpoint that could not be written."""
    previous = newest(run)
    state = f"{previous} is intact" if previous else "there is no earlier one"
    return OSError(f"{run}: the checkpoint of step {step} could not be written ({cause}); {state}")


def commit(temporary: Path, run: Path, step: int, manifest: Mapping[str, str], *, keep: int) -> Path:
    """Add the manifest (name to sha256) to a step's files and rename their folder.

    Afterwards all checkpoints but the newest `keep` and the best are removed. One that cannot be removed, for example
    because another process reads it over NFS, is logged and left for the next commit.
    """
    target = run / f"step_{step:06d}"
    files.write_text(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    files.sync(temporary / "manifest.json")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    files.sync(run)
    finished = sorted((path for path in run.glob("step_*") if STEP.fullmatch(path.name)), key=lambda p: int(p.name[5:]))
    best_checkpoint = best(run)
    for earlier in finished[:-keep]:
        if best_checkpoint is None or earlier != best_checkpoint[0]:
            try:
                shutil.rmtree(earlier)
            except OSError as error:
                log.warning(
                    "%s: the old checkpoint could not be removed (%s); the next save tries again", earlier, error
                )
    return target


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return AdamW's state as tensors named `<moment>/<parameter>`."""
    return {
        f"{key}/{names[parameter]}": value.contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path, names: Mapping[Tensor, str]) -> None:
    """Load what `optimizer_tensors` returned. Raises ValueError for the state of a parameter that is not trained."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in read_tensors(path).items():
        moment, name = current_name(key).split("/", 1)
        if name not in by_name:
            raise ValueError(f"{path}: holds the optimiser state of {name!r}, which this stage does not train")
        parameter = by_name[name]
        optimizer.state[parameter][moment] = value.to(parameter.device)  # fused AdamW reads its step there too


def make_optimizer_state(
    optimizer: torch.optim.Optimizer, stored: Collection[str], names: Mapping[Tensor, str]
) -> None:
    """Make zeros for the moments that a checkpoint holds, to read them into.

    `stored` are the names of its tensors. A parameter that never had a gradient has no moments.
    """
    held = set(stored)
    for parameter, name in names.items():
        state = {
            moment: torch.zeros_like(parameter, requires_grad=False)
            for moment in ("exp_avg", "exp_avg_sq", "ema")
            if f"{moment}/{name}" in held
        }
        if f"step/{name}" in held:
            state["step"] = torch.zeros((), device=parameter.device)  # fused AdamW reads it on the device
        if state:
            optimizer.state[parameter] = state
