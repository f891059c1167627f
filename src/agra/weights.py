"""Weights in safetensors files: reading tensor by tensor, comparison of names and shapes, hashes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def weights_digest(module: nn.Module) -> str:
    """Return 16 hex digits of the SHA-256 over name, type, shape and bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def frozen(module: AnyModule) -> AnyModule:
    """Put `module` in evaluation mode without gradients for its parameters, and return it."""
    return module.eval().requires_grad_(False)


@contextmanager
def stored_tensors(files: Sequence[Path], what: str) -> Iterator[dict[str, Any]]:
    """Yield the tensors of safetensors `files` by name, as slices that read when indexed.

    Raises ValueError if a file is damaged.
    """
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
            yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        raise ValueError(f"{what}: not a readable safetensors file ({error}); download or copy it again") from error


def read_into(
    targets: Mapping[str, Tensor],
    files: Sequence[Path],
    *,
    what: str,
    name_of: Callable[[str], str | None] = lambda stored: stored,
) -> None:
    """Copy tensors of safetensors `files` into the targets of the same names, one at a time, cast to the target's type.

    `name_of` maps a stored name to a target's name, or to None for a tensor to skip. Raises ValueError before anything
    is copied if names or shapes differ, or if a file is damaged.
    """
    with stored_tensors(files, what) as tensors, torch.no_grad():
        selected = {name: value for stored, value in tensors.items() if (name := name_of(stored)) is not None}
        check_fit({name: tuple(value.get_shape()) for name, value in selected.items()}, targets, what)
        for name, value in selected.items():
            targets[name].copy_(value[...])


def under(prefix: str) -> Callable[[str], str | None]:
    """Return a `name_of` for `read_into` that selects the names with `prefix` and removes it."""
    return lambda stored: stored.removeprefix(prefix) if stored.startswith(prefix) else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. Raises ValueError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to a temporary path (`agra.files.replacing`). Raises OSError if the disk is full."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    if metadata is not None:
        sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file.

    The library writes it in random order, and equal content should be equal bytes.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def check_fit(stored: Mapping[str, Sequence[int]], targets: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError with the first name in which the `stored` shapes and the `targets` differ."""
    differing = sorted(set(stored) ^ set(targets))
    differing = differing or [name for name in stored if tuple(stored[name]) != tuple(targets[name].shape)]
    if differing:
        raise ValueError(
            f"{what}: made for another architecture; {len(differing)} entries do not fit, the first is {differing[0]!r}"
        )
