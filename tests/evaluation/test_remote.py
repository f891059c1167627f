import os
import sys
import textwrap
from contextlib import suppress

import pytest

from agra.evaluation.remote import evaluate_in_subprocess, served

SERVER = """
    #!{python}
    import sys, time
    open({told!r}, "w").write(" ".join(sys.argv[1:]))
    print("serving policy on ws://127.0.0.1:4321", flush=True)
    time.sleep(60)
"""
SIMULATOR = """
    #!{python}
    import os, sys
    open({told!r}, "w").write(" ".join([os.environ.get("PYTHONHASHSEED", "random"), *sys.argv[1:]]))
    sys.exit(3)
"""


def script(path, source):
    """A stand-in for an interpreter, which writes down how it was called."""
    told = path.with_suffix(".txt")
    path.write_text(textwrap.dedent(source.format(python=sys.executable, told=str(told))).lstrip())
    path.chmod(0o755)
    return path, told


def test_server_and_simulator_start_and_end_together(tmp_path, monkeypatch):
    server, asked = script(tmp_path / "server", SERVER)
    simulator, told = script(tmp_path / "simulator", SIMULATOR)
    monkeypatch.setattr(sys, "executable", str(server))
    code = evaluate_in_subprocess("runs/mine", simulator, ["--limit", "2"], serve=["--device", "cpu"])
    assert code == 3
    assert asked.read_text() == "-m agra.cli serve runs/mine --port 0 --max-batch 1 --device cpu"
    assert told.read_text() == "0 -m agra.cli evaluate ws://127.0.0.1:4321 --limit 2"


def test_the_server_is_ended_whatever_happens(tmp_path, monkeypatch):
    server, asked = script(
        tmp_path / "server", SERVER.replace('" ".join(sys.argv[1:])', "str(os.getpid())").replace("sys, t", "os, t")
    )
    monkeypatch.setattr(sys, "executable", str(server))
    with suppress(RuntimeError), served("p") as address:
        assert address == "ws://127.0.0.1:4321"
        raise RuntimeError("simulator broke")
    with pytest.raises(ProcessLookupError):
        os.kill(int(asked.read_text()), 0)


def test_what_does_not_start_is_said(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="no such interpreter; simulators' environments are made by make env-NAME"
    ):
        evaluate_in_subprocess("p", tmp_path / "python", [])
    silent, _ = script(tmp_path / "silent", SIMULATOR)
    monkeypatch.setattr(sys, "executable", str(silent))
    with pytest.raises(ValueError, match="p: its server did not start"), served("p"):
        pass
