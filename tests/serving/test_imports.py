"""`policies` and `serving` import neither training nor diagnostics, and a robot's client imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import agra

ROOT = Path(agra.__file__).parent
ROOMS = {room: sorted((ROOT / room).rglob("*.py")) for room in ("policies", "serving")}
HEAVY = ("agra.training", "agra.diagnostics")
LIGHT = (
    "agra.serving.client",
    "agra.serving.protocol.zmtp",
    "agra.serving.remote_policies",
    "agra.serving.robot.control",
    "agra.serving.server.config",
)


def modules_after_importing(names):
    """Names in `sys.modules` of a fresh process that has imported `names`."""
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def module_name(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def test_importing_both_rooms_loads_neither_training_nor_diagnostics():
    loaded = modules_after_importing([module_name(path) for paths in ROOMS.values() for path in paths])
    assert {"agra.policies.load", "agra.serving.server.app", "torch"} <= set(loaded)
    assert [name for name in loaded if name.startswith(HEAVY)] == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_imports_them_either(room):
    for path in ROOMS[room]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(HEAVY)], path


def test_a_robots_client_loads_no_torch():
    loaded = set(modules_after_importing(list(LIGHT)))
    assert set(LIGHT) <= loaded
    assert not loaded & {"torch", "prometheus_client", "agra.policies"}
