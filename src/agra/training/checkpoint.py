"""Self-describing checkpoint folders: JSON and safetensors, checksummed, written whole or not at all.

    step_000500/
      config.json            the RunConfig
      model.safetensors      the WAM
      projectors.safetensors AGRA's projectors, where there are any
      optimizer.safetensors  AdamW's moments, by parameter name
      codec.safetensors      a codec fit on the data, where there is one
      norm_stats.json        statistics that undo the normalisation
      trainer.json           the number of finished steps
      manifest.json          sha256 of every file above

Everything random in training is a pure function of seed, step and rank, so no random state is stored.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agra.config import RunConfig
from agra.pretrained import read_into

_NAME = re.compile(r"step_(\d{6,})")


def newest(run: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder; unfinished ones have other names and do not count."""
    found = [(int(match[1]), path) for path in run.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return max(found)[1] if found else None


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from its own path or its run's. Raises FileNotFoundError naming what was looked for."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise FileNotFoundError(f"{path}: no checkpoint here; expected a folder with manifest.json or step_*/ folders")
    return found


def save(run: Path, step: int, files: Mapping[str, Callable[[Path], None]], *, keep: int) -> Path:
    """Write a checkpoint under a temporary name, rename it, then drop all but the newest `keep`.

    `files` maps a file's name to the function that writes it at a given path.
    """
    target = run / f"step_{step:06d}"
    temporary = run / f".{target.name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, write in files.items():
        write(temporary / name)
    manifest = {name: _sha256(temporary / name) for name in sorted(files)}
    write_text(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    for path in temporary.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    finished = sorted(
        (path for path in run.glob("step_*") if _NAME.fullmatch(path.name)), key=lambda p: int(p.name[5:])
    )
    for old in finished[:-keep]:
        shutil.rmtree(old)
    return target


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest. Raises ValueError naming the first one that differs or lacks."""
    manifest_path = checkpoint / "manifest.json"
    if not manifest_path.is_file():
        raise FileNotFoundError(f"{manifest_path}: missing, so {checkpoint} is not a complete checkpoint")
    for name, expected in json.loads(manifest_path.read_text()).items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(
                f"{path}: missing, though manifest.json lists it; take the checkpoint from its source again"
            )
        if _sha256(path) != expected:
            raise ValueError(
                f"{path}: checksum differs from manifest.json; the file is damaged, take it from its source again"
            )


def read_config(checkpoint: Path) -> RunConfig:
    """The RunConfig a checkpoint was made with."""
    path = checkpoint / "config.json"
    return RunConfig.from_json(path.read_text(), path)


def load_weights(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Load safetensors into a module; with `prefix`, only the entries under it. Names and shapes must fit exactly."""
    read_into(module.state_dict(), [path], what=str(path), prefix=prefix)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ValueError names a damaged one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """AdamW's state as flat tensors named `<moment>/<parameter>`."""
    return {
        f"{key}/{names[parameter]}": value.contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path, names: Mapping[Tensor, str]) -> None:
    """Inverse of `optimizer_tensors`."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in read_tensors(path).items():
        moment, name = key.split("/", 1)
        if name not in by_name:
            raise ValueError(f"{path}: holds the optimiser state of {name!r}, which this stage does not train")
        optimizer.state[by_name[name]][moment] = value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors; the caller gives a temporary folder or renames."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.rename(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
