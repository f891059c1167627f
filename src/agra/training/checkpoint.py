"""Self-describing checkpoint folders: JSON and safetensors, checksummed, written whole or not at all.

One process writes the files below. Several write their shards into a folder `sharded` instead of the first three
(`training/sharded.py`); whatever reads a checkpoint reads either.

    step_000500/
      config.json            the RunConfig
      model.safetensors      the WAM
      lora.safetensors       its adapters, where there are any (training/lora.py)
      projectors.safetensors AGRA's projectors, where there are any
      optimizer.safetensors  AdamW's moments, by parameter name
      codec.safetensors      a codec fit on the data, where there is one
      norm_stats.json        statistics that undo the normalisation
      trainer.json           the number of finished steps
      manifest.json          sha256 of every file above

Everything random in training is a pure function of seed, step and sample, so no random state is stored.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from agra.config import RunConfig
from agra.pretrained import check_fit, read_into

SHIPPED = Path(__file__).parent.parent / "policies"
"""The policies that come with agra: exported folders by name."""

MODEL, ADAPTERS, OPTIMIZER = "model.safetensors", "lora.safetensors", "optimizer.safetensors"
_NAME = re.compile(r"step_(\d{6,})")


def newest(run: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder; unfinished ones have other names and do not count."""
    found = [(int(match[1]), path) for path in run.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return max(found)[1] if found else None


def best(run: Path) -> tuple[Path, float] | None:
    """The checkpoint that was best by `stage.keep_best`, and the figure that it was best by; None where none was kept."""
    path = run / "best.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return run / f"step_{found['step']:06d}", found["value"]


def note_best(run: Path, step: int, value: float) -> None:
    """Write down that a saved checkpoint is the best so far."""
    write_text(run / "best.json", json.dumps({"step": step, "value": value}) + "\n")


def find(name: str | Path) -> Path:
    """A folder by its path or, where there is none, by the name of a policy that comes with agra."""
    shipped = SHIPPED / name
    return shipped if not Path(name).exists() and shipped.is_dir() else Path(name)


def resolve(name: str | Path) -> Path:
    """A checkpoint folder from its own path, its run's, or the name of a policy that comes with agra; RUN/best stands for
    the one that a run with `stage.keep_best` kept.

    Raises FileNotFoundError naming what was looked for.
    """
    path = find(name)
    if path.name == "best" and not path.exists() and (kept := best(path.parent)) is not None:
        return kept[0]
    if (path / "manifest.json").is_file():
        return path
    last = newest(path) if path.is_dir() else None
    if last is None:
        known = ", ".join(sorted(p.name for p in SHIPPED.glob("*/")))
        raise FileNotFoundError(
            f"{path}: no checkpoint here; expected a folder with manifest.json or step_*/ folders, or a policy that "
            f"comes with agra ({known})"
        )
    return last


def home(name: str | Path) -> Path:
    """The folder for what is found out about a policy: its run's; an export's own; for a policy that comes with agra,
    which is read-only, outputs/NAME in the working directory."""
    path = find(name)
    if path.name == "best" and not path.exists():
        return path.parent
    if path.parent == SHIPPED:
        return Path("outputs") / path.name
    return path.parent if _NAME.fullmatch(path.name) else path


def save(run: Path, step: int, files: Mapping[str, Callable[[Path], object]], *, keep: int) -> Path:
    """Write a checkpoint under a temporary name, rename it, then drop all but the newest `keep`.

    `files` maps a file's name to the function that writes it at a given path.
    """
    temporary = unfinished(run, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, write in files.items():
            write(temporary / name)
        for path in temporary.iterdir():
            sync(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise unwritten(run, step, error) from error
    return commit(run, step, {name: sha256(temporary / name) for name in sorted(files)}, keep=keep)


def unfinished(run: Path, step: int) -> Path:
    """Where a step's checkpoint is written before it has its name."""
    return run / f".step_{step:06d}.writing"


def unwritten(run: Path, step: int, cause: BaseException) -> OSError:
    """What to say where a checkpoint could not be written."""
    previous = newest(run)
    kept = f"{previous} is intact" if previous else "there was none before it"
    return OSError(f"{run}: the checkpoint of step {step} could not be written ({cause}); {kept}")


def commit(run: Path, step: int, manifest: Mapping[str, str], *, keep: int) -> Path:
    """Give a step's written files their manifest (name to sha256) and the folder its name; then drop all but the newest
    `keep` and the best."""
    temporary, target = unfinished(run, step), run / f"step_{step:06d}"
    write_text(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    sync(temporary / "manifest.json")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync(run)
    finished = sorted(
        (path for path in run.glob("step_*") if _NAME.fullmatch(path.name)), key=lambda p: int(p.name[5:])
    )
    kept = best(run)
    for old in finished[:-keep]:
        if kept is None or old != kept[0]:
            shutil.rmtree(old)
    return target


def sync(path: Path) -> None:
    """Have the file, or the folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(checkpoint: Path, *, part: int = 0, parts: int = 1, without: Sequence[str] = ()) -> None:
    """Compare every file with the manifest, or the part::parts of them, `without` those that are not going to be read.

    Raises ValueError naming the first file that is corrupt or missing.
    """
    manifest_path = checkpoint / "manifest.json"
    if not manifest_path.is_file():
        raise FileNotFoundError(f"{manifest_path}: missing, so {checkpoint} is not a complete checkpoint")
    for name, expected in [*json.loads(manifest_path.read_text()).items()][part::parts]:
        if name in without:
            continue
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(
                f"{path}: missing, though manifest.json lists it; take the checkpoint from its source again"
            )
        if sha256(path) != expected:
            raise ValueError(
                f"{path}: checksum differs from manifest.json; the file is damaged, take it from its source again"
            )


def read_config(checkpoint: Path) -> RunConfig:
    """The RunConfig a checkpoint was made with."""
    path = checkpoint / "config.json"
    return RunConfig.from_json(path.read_text(), path)


def load_weights(module: nn.Module, checkpoint: Path, name: str = MODEL, *, prefix: str = "") -> None:
    """Load a checkpoint's weights into a module of one process; with `prefix`, only the entries under it.

    `name` is the file that one process writes; in the shards of several the entries have the same names. Adapters come
    with the WAM, which must have them attached. Raises ValueError where names or shapes don't fit.
    """
    folder = checkpoint / "sharded"
    if folder.is_dir():
        read_shards({prefix + key: value for key, value in module.state_dict().items()}, folder)
    else:
        files = [checkpoint / name]
        if name == MODEL and (checkpoint / ADAPTERS).is_file():
            files.append(checkpoint / ADAPTERS)
        read_into(module.state_dict(), files, what=str(checkpoint / name), prefix=prefix)


def has_projectors(checkpoint: Path) -> bool:
    """Whether a checkpoint, of one process or of several, holds AGRA's projectors."""
    if (checkpoint / "sharded").is_dir():
        return any(".layers." in name and name.split(".")[0].isdigit() for name in stored_names(checkpoint / "sharded"))
    return (checkpoint / "projectors.safetensors").is_file()


def read_shards(targets: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Copy tensors out of a folder's safetensors, whole or sharded, into whole tensors or shards of any other layout.

    Each process reads what its own shards need. With a process group all of its processes call this together.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        found = _sizes(reader)
        check_fit({name: found[name] for name in targets if name in found}, targets, str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
            load(dict(targets), storage_reader=reader, process_group=group, no_dist=group is None)
    except SafetensorError as error:
        raise ValueError(f"{folder}: not readable safetensors ({error})") from error


def stored_names(folder: Path) -> list[str]:
    """The tensors that a folder's safetensors, whole or sharded, hold between them."""
    return [*_sizes(HuggingFaceStorageReader(str(folder)))]


def _sizes(reader: HuggingFaceStorageReader) -> dict[str, Sequence[int]]:
    metadata: Any = reader.read_metadata()
    return {name: value.size for name, value in metadata.state_dict_metadata.items()}


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
        parameter = by_name[name]
        optimizer.state[parameter][moment] = value.to(parameter.device)  # fused AdamW reads its step there too


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors; the caller gives a temporary folder or renames. Raises OSError where there is no room."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.rename(path)


def sha256(path: Path) -> str:
    """Checksum of a file, as hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
