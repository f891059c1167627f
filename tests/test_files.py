"""Files are written whole or not at all, errors name them, and one process writes into a folder."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from agra import files


class RefusedError(Exception):
    pass


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "eins ä")
    files.write_bytes(path, b"zwei")
    assert path.read_bytes() == b"zwei"
    assert list(path.parent.iterdir()) == [path]
    assert files.sha256(path) == "9dbe3cfc5af797f3516eb7c92f37fe507b83c13017aa9ddb57b9afe25a75a3a6"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RefusedError("No space left")])
def test_an_error_names_the_file_and_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def write():
        with files.replacing(path, failures=RefusedError) as temporary:
            temporary.write_text("ha")
            raise error

    with pytest.raises(OSError, match=rf"No space left.*{path}|{path}.*No space left"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_pass_and_a_temporary_folder_goes_too(tmp_path):
    path = tmp_path / "a"

    def write():
        with files.replacing(path) as temporary:
            (temporary / "deep").mkdir(parents=True)
            raise KeyError("x")

    with pytest.raises(KeyError):
        write()
    assert not list(tmp_path.iterdir())
    with files.replacing(path) as temporary:
        (temporary / "deep").mkdir(parents=True)
    assert (path / "deep").is_dir()


def test_a_full_device_is_named(tmp_path):
    def write():
        with files.naming("/dev/full"), open("/dev/full", "wb", buffering=0) as handle:
            handle.write(b"x")

    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write()


def test_two_writers_of_a_file_do_not_share_a_temporary_one(tmp_path):
    """In containers that share a disk, both can have the same process id."""
    path = tmp_path / "a.txt"
    with files.replacing(path) as outer:
        outer.write_text("outer")
        files.write_text(path, "inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_built_by_one_process_and_leaves_nothing_beside_it(tmp_path):
    path, partial = tmp_path / "set", tmp_path / "set.partial"
    partial.mkdir()
    (partial / "left").touch()  # by a killed process

    def build(error=None):
        with files.building(path) as root:
            assert not root.exists()
            root.mkdir()
            (root / "a").touch()
            with pytest.raises(ValueError, match=rf"set: another process \(pid {os.getpid()}\) writes here"):
                files.building(path).__enter__()
            assert (root / "a").exists()
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        build(KeyError("x"))
    assert not list(tmp_path.iterdir())
    build()
    assert list(tmp_path.rglob("*")) == [path, path / "a"]
    with pytest.raises(ValueError, match="set: already exists"):
        build()
    assert list(tmp_path.rglob("*")) == [path, path / "a"]


def test_a_removed_lock_file_locks_nothing(tmp_path, monkeypatch):
    """A process that has opened the lock file before its holder removed it takes the new file."""
    opened = os.open

    def open_late(place, *arguments):
        handle = opened(place, *arguments)
        monkeypatch.undo()
        place.unlink()
        return handle

    monkeypatch.setattr(os, "open", open_late)
    with files.lock(tmp_path, keep=False), pytest.raises(ValueError, match="writes here"):
        files.lock(tmp_path).__enter__()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert "no locks" in caplog.text
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.lock(tmp_path).__enter__()


HOLD = "import sys, time\nfrom agra import files\nwith files.lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"


def test_a_second_process_is_told_who_writes_and_a_killed_one_holds_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"run: another process \(pid {other.pid}\) writes here"):
            files.lock(tmp_path / "run").__enter__()
        with files.lock(tmp_path / "run", ".results.jsonl.lock"):  # another file's lock in the same folder
            pass
        other.send_signal(signal.SIGKILL)
    with files.lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
