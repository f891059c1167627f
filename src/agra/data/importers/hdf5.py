"""Reading HDF5 with h5py.

Errors name the file and the expected group, array or attribute. No other module imports h5py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from agra.data.lerobot.json_parquet import REMEDY


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading.

    Raises FileNotFoundError for a missing file, ValueError where it or a read array is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file is missing; {REMEDY}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged HDF5 file ({str(error).splitlines()[0]}); {REMEDY}") from error


def keys(parent: h5py.Group) -> list[str]:
    """Return the names in a group."""
    return [str(name) for name in parent]


def group(parent: h5py.Group, name: str, path: Path) -> h5py.Group:
    """Return a group by name. Raises ValueError with the available names."""
    value = parent.get(name)
    if not isinstance(value, h5py.Group):
        raise ValueError(f"{path}: no group {name!r} in {parent.name}; available: {', '.join(keys(parent)) or 'none'}")
    return value


def array(parent: h5py.Group, name: str, path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """Read an array by name. None in `shape` is any length.

    Raises ValueError for a missing array, another shape or type, and values that are not finite.
    """
    data = parent.get(name)
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{path}: no array {name!r} in {parent.name}; available: {', '.join(keys(parent)) or 'none'}")
    fits = len(data.shape) == len(shape) and all(w in (None, n) for w, n in zip(shape, data.shape, strict=True))
    if not fits or data.dtype.kind not in "fiub":
        raise ValueError(f"{path}: {data.name}: expected numbers of shape {shape}, got {data.dtype} of {data.shape}")
    values = data[()]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{path}: {data.name}: expected finite values")
    return values


def text(attributes: Mapping[str, Any], name: str, path: Path) -> str:
    """Return a text attribute. Raises ValueError where it is missing or not text."""
    value = attributes.get(name)
    value = value.decode() if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise ValueError(f"{path}: attribute {name!r}: expected text, got {value!r}")
    return value
