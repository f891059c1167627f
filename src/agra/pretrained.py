"""Frozen weights: where they come from, what to say when they are missing, and which ones they are.

A leaf, shared by the three frozen networks: the video codec, the text encoder and the teacher.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from torch import nn

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
