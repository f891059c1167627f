"""msgpack encoding of messages with arrays, safe on untrusted input: openpi's encoding and GR00T's.

Decoding runs no code from the sender and allocates nothing on the sender's word. An array must be as large as the bytes
that hold it, with one of a dozen numeric dtypes. Lists, maps and texts have small limits. There is no pickle and no
`numpy.load`. Decoded arrays are read-only views of the message. Shared by server and client. Imports no torch.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any, cast

import msgpack
import numpy as np

MAX_ENTRIES = 256  # in a map or a list
MAX_CONTAINERS = 512  # maps and lists in a message: an empty one takes one byte in the message and sixty in memory
MAX_TEXT = 8192  # bytes
MAX_AXES = 8

_DTYPES = {
    np.dtype(code).str: np.dtype(code) for code in ("?", "u1", "i1", *(f"<{k}" for k in ("u2", "u4", "u8", "i2", "i4")))
}
_DTYPES |= {np.dtype(code).str: np.dtype(code) for code in ("<i8", "<f2", "<f4", "<f8")}
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?s:(..))\{'descr': '([^']{2,4})', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n"
)


class WireError(ValueError):
    """Bytes that are not a valid message."""


def pack(message: Any) -> bytes:
    """Encode maps, lists, numbers, texts and arrays as openpi does."""
    return cast(bytes, msgpack.packb(message, default=_openpi_array))


def unpack(data: bytes) -> Any:
    """Inverse of `pack`. Raises WireError with the reason."""
    return _unpack(data, _from_openpi)


def pack_groot(message: Any) -> bytes:
    """Encode as GR00T does: an array is the bytes of an .npy file."""
    return cast(bytes, msgpack.packb(message, default=_groot_array))


def unpack_groot(data: bytes) -> Any:
    """Inverse of `pack_groot`. Raises WireError with the reason."""
    return _unpack(data, _from_groot)


def _unpack(data: bytes, hook: Callable[[dict], Any]) -> Any:
    containers = itertools.count(1)

    def counted(container: Any) -> Any:
        if next(containers) > MAX_CONTAINERS:
            raise WireError(f"message: expected at most {MAX_CONTAINERS} maps and lists, got more")
        return hook(container) if isinstance(container, dict) else container

    try:
        return msgpack.unpackb(
            data,
            object_hook=counted,
            list_hook=counted,
            max_str_len=MAX_TEXT,
            max_bin_len=len(data),
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")  # some of msgpack's errors have no text
        raise WireError(f"not a valid msgpack message ({reason})") from error


def _openpi_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": _dtype_name(value), b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": _dtype_name(value)}
    raise _unsupported(value)


def _groot_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise _unsupported(value)
    shape = "".join(f"{size}, " for size in value.shape)
    shape = shape if value.ndim == 1 else shape.removesuffix(", ")
    header = f"{{'descr': '{_dtype_name(value)}', 'fortran_order': False, 'shape': ({shape.rstrip()}), }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    contents = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + value.tobytes()
    return {"__ndarray_class__": True, "as_npy": contents}


def _unsupported(value: Any) -> TypeError:
    return TypeError(f"{type(value).__name__} cannot be sent; expected maps, lists, numbers, texts or arrays")


def _dtype_name(value: np.ndarray | np.generic) -> str:
    if value.dtype.str not in _DTYPES:
        raise TypeError(f"arrays of {value.dtype} cannot be sent; expected one of {', '.join(_DTYPES)}")
    return value.dtype.str


def _from_openpi(entries: dict) -> Any:
    if b"__ndarray__" in entries:
        data, shape = entries.get(b"data"), entries.get(b"shape")
        if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > MAX_AXES:
            raise WireError(f"array: expected bytes as 'data' and a list of at most {MAX_AXES} sizes as 'shape'")
        return _array(data, _dtype(entries.get(b"dtype")), shape)
    if b"__npgeneric__" in entries:
        value, dtype = entries.get(b"data"), _dtype(entries.get(b"dtype"))
        if not isinstance(value, bool | int | float):
            raise WireError(f"numpy scalar: expected a number, got {type(value).__name__}")
        try:
            return dtype.type(value)
        except OverflowError as error:
            raise WireError(f"numpy scalar: {value} does not fit {dtype}") from error
    return entries


def _from_groot(entries: dict) -> Any:
    if "__ndarray_class__" not in entries:
        return entries
    data = entries.get("as_npy")
    head = _NPY.match(data[:1024]) if isinstance(data, bytes) else None
    if head is None or not isinstance(data, bytes) or head.end() != 10 + int.from_bytes(head[1], "little"):
        raise WireError("array: expected the bytes of numpy.save (format 1.0, numbers only) in 'as_npy'")
    sizes = [size.strip() for size in head[4].decode().split(",") if size.strip()]
    if len(sizes) > MAX_AXES or not all(size.isdigit() for size in sizes):
        raise WireError(f"array: expected a shape of at most {MAX_AXES} sizes, got ({head[4].decode()})")
    return _array(
        data[head.end() :], _dtype(head[2].decode()), [int(size) for size in sizes], fortran=head[3] == b"True"
    )


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise WireError(f"array: expected one of the dtypes {', '.join(_DTYPES)}, got {repr(name)[:40]}")
    return _DTYPES[name]


def _array(data: bytes, dtype: np.dtype, shape: list[Any], *, fortran: bool = False) -> np.ndarray:
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise WireError(f"array: expected a shape of integers, got {repr(shape)[:80]}")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if expected != len(data):
        raise WireError(f"array: shape {tuple(shape)} of {dtype} needs {expected} bytes, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
