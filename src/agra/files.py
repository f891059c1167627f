"""Safe file writing through a temporary name and a rename, checksums, and a lock against a second writer."""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}

log = logging.getLogger("agra.files")


@contextmanager
def replacing(path: Path, *, failures: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` at the end of the block. Creates missing folders.

    On any error the temporary file or folder is removed and `path` stays unchanged. An OSError names `path`. `failures`
    are exceptions by which other libraries report a failed write, such as SafetensorError for a full disk. They become
    OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids are no distinction: containers that share a disk have the same small ones.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
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
    """Add `path` to an OSError of the block that names no file. Turn `failures` into an OSError that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except failures as error:
        raise OSError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def lock(folder: Path, name: str = LOCK, *, output: Path | None = None, keep: bool = True) -> Iterator[None]:
    """Hold the lock file `name` of an output folder inside the block. Creates the folder if it is missing. Never waits.

    Raises ValueError with `output`, by default the folder, and the process id of another holder. The kernel releases
    the lock when the process ends for any reason. The lock file stays, unless `keep` is False.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / name
    handle = _locked(place, output or folder)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        if not keep:
            place.unlink(missing_ok=True)
        os.close(handle)


def _locked(place: Path, output: Path) -> int:
    """Return the handle of the lock file at `place`, locked. Raises ValueError where another process holds it.

    A file system without locks, such as Lustre mounted without `flock`, gives a warning and no lock.
    """
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", errors="replace").strip()
            os.close(handle)
            holder = f" (pid {holder})" if holder else ""  # its writer may not have come to that yet
            raise ValueError(
                f"{output}: another process{holder} writes here; wait for it, stop it or choose another output"
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(handle)
                raise
            log.warning("%s: the file system has no locks; let no second process write here", output)
            return handle
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # the last holder has removed this file since


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Yield the path of the folder `<path>.partial`, not yet there, and rename it to `path` at the end of the block.

    On any error the partial folder is removed. One left by a killed process is removed at the start. Raises ValueError
    where `path` exists or another process builds it.
    """
    partial = path.with_name(path.name + ".partial")
    with lock(path.parent, f".{path.name}.lock", output=path, keep=False):
        refuse_existing(path)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise ValueError where `path` exists."""
    if path.exists():
        raise ValueError(f"{path}: already exists; choose another output or remove it")
