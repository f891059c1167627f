import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from agra.checkpoints.folder import resolve
from agra.cli.main import main
from agra.evaluation.remote import evaluate_in_subprocess, served
from agra.simulation import manifest_sha256
from agra.types import SimulatorFailed

SERVER = """
    #!{python}
    import json, os, sys, time
    open({log!r}, "w").write(f"{{os.getpid()}} " + " ".join(sys.argv[1:]))
    ready = sys.argv[sys.argv.index("--ready-file") + 1]
    with open(ready + ".part", "w") as file:
        json.dump(dict(address="ws://127.0.0.1:4321"), file)
    os.rename(ready + ".part", ready)
    time.sleep(60)
"""
SIMULATOR = """
    #!{python}
    import os, sys
    open({log!r}, "w").write(" ".join([os.environ.get("PYTHONHASHSEED", "random"), *sys.argv[1:]]))
    sys.exit(3)
"""
WAITS = """
    #!{python}
    import os, time
    from agra.evaluation.remote import watch_parent
    watch_parent()
    open({log!r} + ".part", "w").write(str(os.getpid()))
    os.rename({log!r} + ".part", {log!r})
    time.sleep(60)
"""
CRASHES = """
    #!{python}
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def script(path, source):
    """A stand-in for an interpreter that logs its arguments."""
    log = path.with_suffix(".txt")
    path.write_text(textwrap.dedent(source.format(python=sys.executable, log=str(log))).lstrip())
    path.chmod(0o755)
    return path, log


def test_server_and_simulator_start_and_end_together(tmp_path, monkeypatch):
    server, server_log = script(tmp_path / "server", SERVER)
    simulator, simulator_log = script(tmp_path / "simulator", SIMULATOR)
    monkeypatch.setattr(sys, "executable", str(server))
    code = evaluate_in_subprocess("runs/mine", simulator, ["--limit", "2"], serve=["--device", "cpu"])
    assert code == 3
    pid, *arguments = server_log.read_text().split()
    assert arguments[:8] == ["-m", "agra.cli", "serve", "runs/mine", "--port", "0", "--max-batch", "1"]
    assert arguments[-2:] == ["--device", "cpu"]
    assert simulator_log.read_text() == "0 -m agra.cli evaluate ws://127.0.0.1:4321 --limit 2"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_results_in_a_simulator_s_environment_name_the_served_checkpoint(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "agra.evaluation.remote.evaluate_in_subprocess",
        lambda policy, python, arguments, serve: calls.append((policy, list(arguments))) or 0,
    )
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "tabletop-agra", "--simulator-python", sys.executable])
    ((served_policy, arguments),) = calls
    checkpoint = resolve("tabletop-agra")
    assert served_policy == str(checkpoint)
    assert arguments[arguments.index("--checkpoint-sha256") + 1] == manifest_sha256(checkpoint)
    assert arguments[arguments.index("--computed-on") + 1] == "cpu, float32"
    assert arguments[arguments.index("--name") + 1] == "tabletop-agra"
    with pytest.raises(SystemExit):
        main(["evaluate", "tabletop-agra", "--simulator-python", sys.executable, "--checkpoint-sha256", "abc"])
    assert "--checkpoint-sha256: expected none with --simulator-python, which sets it" in capsys.readouterr().err
    assert len(calls) == 1


def test_no_flag_is_dropped_on_the_way_to_a_simulator_s_environment(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "agra.evaluation.remote.evaluate_in_subprocess",
        lambda policy, python, arguments, serve: calls.append(arguments) or 0,
    )
    monkeypatch.chdir(tmp_path)
    there = ["evaluate", "tabletop-agra", "--simulator-python", sys.executable]
    main([*there, "--no-render"])
    main(there)
    assert ["--no-render" in arguments for arguments in calls] == [True, False]
    for command, message in (
        ([*there, "--key-mapping", "groot_gr1"], "--key-mapping: expected none with --simulator-python"),
        (
            ["evaluate", "expert", "--output", "r.jsonl", "--execute-steps", "5"],
            "the expert is asked at every step, got 5",
        ),
    ):
        with pytest.raises(SystemExit):
            main(command)
        assert message in " ".join(capsys.readouterr().err.split())
    assert len(calls) == 2


def test_a_killed_simulator_is_reported(tmp_path, monkeypatch):
    server, _ = script(tmp_path / "server", SERVER)
    simulator, _ = script(tmp_path / "simulator", CRASHES)
    monkeypatch.setattr(sys, "executable", str(server))
    with pytest.raises(SimulatorFailed, match="the simulator's process was ended by SIGKILL; run the same command"):
        evaluate_in_subprocess("runs/mine", simulator, [])


def lives(pid):
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_server_and_simulator_end_with_a_killed_evaluation(tmp_path, number, code):
    source = SERVER.replace(
        "    open(", "    from agra.evaluation.remote import watch_parent\n    watch_parent()\n    open(", 1
    )
    server, server_log = script(tmp_path / "server", source)
    simulator, simulator_log = script(tmp_path / "simulator", WAITS)
    call = f"""
        import sys
        from agra.evaluation.remote import evaluate_in_subprocess
        sys.executable = {str(server)!r}
        evaluate_in_subprocess("runs/mine", {str(simulator)!r}, [])
    """
    evaluation = subprocess.Popen([sys.executable, "-c", textwrap.dedent(call)])
    while not simulator_log.is_file():
        assert evaluation.poll() is None
        time.sleep(0.05)
    pids = [int(log.read_text().split()[0]) for log in (server_log, simulator_log)]
    assert all(map(lives, pids))
    evaluation.send_signal(number)
    assert evaluation.wait(20) == code
    for _ in range(200):
        if not any(map(lives, pids)):
            return
        time.sleep(0.05)
    pytest.fail("the server or the simulator outlives the evaluation")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_policy_server_ends_with_a_killed_evaluation(tmp_path):
    """The real command, which `served` starts."""
    log = tmp_path / "pid"
    call = f"""
        import os, subprocess, time
        from pathlib import Path
        from agra.evaluation import remote
        class Logged(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                Path({str(log)!r}).write_text(str(self.pid))
        remote.subprocess.Popen = Logged
        with remote.served("tabletop-wam"):
            os.rename({str(log)!r}, {str(log)!r} + ".ready")
            time.sleep(60)
    """
    evaluation = subprocess.Popen([sys.executable, "-c", textwrap.dedent(call)])
    ready = log.with_name("pid.ready")
    while not ready.is_file():
        assert evaluation.poll() is None
        time.sleep(0.05)
    pid = int(ready.read_text())
    assert lives(pid)
    evaluation.kill()
    evaluation.wait()
    for _ in range(400):
        if not lives(pid):
            return
        time.sleep(0.05)
    pytest.fail("the server outlives the evaluation")


def test_the_server_ends_with_an_error(tmp_path, monkeypatch):
    server, log = script(tmp_path / "server", SERVER)
    monkeypatch.setattr(sys, "executable", str(server))
    with suppress(RuntimeError), served("p") as address:
        assert address == "ws://127.0.0.1:4321"
        raise RuntimeError("simulator broke")
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)


def test_a_failed_start_is_reported(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="no such interpreter; make env-NAME installs a simulator's environment"
    ):
        evaluate_in_subprocess("p", tmp_path / "python", [])
    failing, _ = script(tmp_path / "failing", SIMULATOR)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(ValueError, match="p: its server did not start"), served("p"):
        pass
