"""The door to h5py: groups and arrays, with errors that name the file and what was expected in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from agra.data.lerobot.json_parquet import REMEDY


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """A file open for reading. Raises FileNotFoundError without it, ValueError where it, or what is read, is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file is missing; {REMEDY}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged HDF5 file ({str(error).splitlines()[0]}); {REMEDY}") from error


def keys(parent: h5py.Group) -> list[str]:
    """Names of what is in a group."""
    return [str(name) for name in parent]


def group(parent: h5py.Group, name: str, path: Path) -> h5py.Group:
    """A group by name. Raises ValueError listing what there is."""
    found = parent.get(name)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{path}: no group {name!r} in {parent.name}; there are {', '.join(keys(parent)) or 'none'}")
    return found


def array(parent: h5py.Group, name: str, path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array by name, of a shape where None is any length; floats must be finite. Raises ValueError."""
    found = parent.get(name)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{path}: no array {name!r} in {parent.name}; there are {', '.join(keys(parent)) or 'none'}")
    fits = len(found.shape) == len(shape) and all(w in (None, n) for w, n in zip(shape, found.shape, strict=True))
    if not fits or found.dtype.kind not in "fiub":
        raise ValueError(f"{path}: {found.name} should be numbers of {shape}, is {found.dtype} of {found.shape}")
    values = found[()]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{path}: {found.name} holds values that are not finite")
    return values


def text(attributes: Mapping[str, Any], name: str, path: Path) -> str:
    """A text attribute. Raises ValueError where it is missing or something else."""
    value = attributes.get(name)
    value = value.decode() if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise ValueError(f"{path}: attribute {name!r} should be a text, got {value!r}")
    return value
