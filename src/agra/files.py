"""Safe writing of files: a temporary name, then a rename; checksums; a lock that keeps a second writer out."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def replacing(path: Path, *, failures: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` at the end of the block. Folders are made as needed.

    On any error the temporary file or folder is removed and `path` stays as it was. OSError names `path`. `failures`
    are exceptions of other libraries that mean the same, such as SafetensorError for a full disk: they become OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, failures=failures):
            yield temporary
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, *, failures: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file, and in `failures`, which become OSError."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except failures as error:
        raise OSError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Checksum of a file, as hex digits."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def lock(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold the lock file `name` of an output folder, which is made as needed. Nothing waits.

    Raises ValueError naming the process that holds it. The kernel releases the lock when its process ends, however it
    ends; the file stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", errors="replace").strip() or "unknown"
            raise ValueError(
                f"{folder}: another process (pid {holder}) writes here; wait for it, stop it, or choose another output"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
