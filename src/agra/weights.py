"""Weights in safetensors files: read tensor by tensor, compared before anything is copied, and identified. A leaf."""

import hashlib
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
    """SHA-256 over the name, type, shape and bytes of every parameter and buffer, as 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def frozen(module: AnyModule) -> AnyModule:
    """`module` itself, in evaluation mode and without gradients for its parameters."""
    return module.eval().requires_grad_(False)


@contextmanager
def stored_tensors(files: Sequence[Path], what: str) -> Iterator[dict[str, Any]]:
    """The tensors of safetensors `files` by name, as slices that read when indexed. ValueError where one is damaged."""
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
            yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        raise ValueError(f"{what}: not a readable safetensors file ({error}); take it from its source again") from error


def read_into(
    targets: Mapping[str, Tensor],
    files: Sequence[Path],
    *,
    what: str,
    name_of: Callable[[str], str | None] = lambda stored: stored,
) -> None:
    """Copy tensors of safetensors `files` into the targets of their names, one at a time and cast to the target's type.

    `name_of` turns a stored name into a target's, or into None for a tensor that is not wanted. Names and shapes are
    compared before anything is copied: raises ValueError where they differ or a file is damaged.
    """
    with stored_tensors(files, what) as tensors, torch.no_grad():
        wanted = {name: value for stored, value in tensors.items() if (name := name_of(stored)) is not None}
        check_fit({name: tuple(value.get_shape()) for name, value in wanted.items()}, targets, what)
        for name, value in wanted.items():
            targets[name].copy_(value[...])


def under(prefix: str) -> Callable[[str], str | None]:
    """A `name_of` for `read_into`: the names that begin with `prefix`, without it."""
    return lambda stored: stored.removeprefix(prefix) if stored.startswith(prefix) else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ValueError for a damaged one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. The caller gives a temporary path. Raises OSError where there is no room."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def check_fit(stored: Mapping[str, Sequence[int]], targets: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError naming the first name or shape in which the `stored` shapes and `targets` differ."""
    odd = sorted(set(stored) ^ set(targets)) or [k for k in stored if tuple(stored[k]) != tuple(targets[k].shape)]
    if odd:
        raise ValueError(
            f"{what}: made for another architecture; {len(odd)} entries do not fit, the first is {odd[0]!r}"
        )
