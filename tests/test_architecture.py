"""Import rules of docs/architecture.md, checked on the syntax tree of every file, and the sizes of subpackages and files."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
FILES = {
    ".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p
    for p in (SOURCE / "agra").rglob("*.py")
}
LEAVES = ("types", "batch", "flow", "rng", "files", "hub", "weights", "precision", "lora", "stages")
ROOT_MODULES = {*LEAVES, "config", "api", "simulation"}
SUITES = ("metaworld", "libero", "robocasa")
"""Simulators whose libraries are installed in environments of their own."""
DOORS = {
    "diffusers": ("agra.wam.video_dit", "agra.wam.codec", "agra.methods.ddim"),
    "transformers": ("agra.wam.text", "agra.alignment"),
    "huggingface_hub": ("agra.hub",),
    "mujoco": ("agra.simulators.tabletop", "agra.simulators.metaworld"),
    "metaworld": ("agra.simulators.metaworld",),
    "libero": ("agra.simulators.libero",),
    "robocasa_gr1": ("agra.simulators.robocasa",),
    "pyarrow": ("agra.data",),
    "av": ("agra.data",),
    "h5py": ("agra.data.importers",),
    "onnx": ("agra.alignment",),
    "tyro": ("agra.cli", "agra.serving.server.config"),
    "cattrs": ("agra.config",),
    "websockets": ("agra.serving",),
    "msgpack": ("agra.serving.protocol.wire",),
    "zmq": ("agra.serving",),
    "prometheus_client": ("agra.serving.server",),
    "gradio": ("agra.demo",),
    "plotly": ("agra.diagnostics.report",),
    "jinja2": ("agra.diagnostics.report", "agra.checkpoints", "agra.policies"),
}
"""Libraries, and the only rooms that import them."""


@cache
def imports(name):
    """Modules that a file imports, wherever in it, but for those under TYPE_CHECKING."""
    tree = ast.parse(FILES[name].read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    modules = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            modules.update(module if module in FILES else str(node.module) for module in full)
    return frozenset(modules - {name})


def under(name, *rooms):
    return any(name == room or name.startswith(room + ".") for room in rooms)


def package_imports(name):
    return {module for module in imports(name) if under(module, "agra")}


def files_of(*rooms):
    return [name for name in FILES if under(name, *(f"agra.{room}" for room in rooms))]


def rooms_that_import(*rooms):
    return {
        name.split(".")[1]
        for name in FILES
        if name != "agra" and any(under(m, *(f"agra.{r}" for r in rooms)) for m in package_imports(name))
    } - set(rooms)


def check_only(rooms, allowed):
    """Every file of `rooms` imports these rooms and the allowed ones alone."""
    names = tuple(f"agra.{room}" for room in (*rooms, *allowed))
    for name in files_of(*rooms):
        outside = {module for module in package_imports(name) if not under(module, *names)}
        assert not outside, f"{name} imports {sorted(outside)}"


# --- rule 1: no cycle, and leaves at the bottom --------------------------------------------------------------------------


def test_files_have_no_cycle():
    list(TopologicalSorter({name: package_imports(name) & FILES.keys() for name in FILES}).static_order())


@pytest.mark.parametrize("room", ["", "data", "diagnostics", "serving", "simulators", "training"])
def test_rooms_have_no_cycle(room):
    """Of the package, and within a room that has rooms of its own."""
    prefix = "agra." + (room + "." if room else "")
    graph = defaultdict(set)
    for name in FILES:
        if name.startswith(prefix):
            place = name.removeprefix(prefix).split(".")[0]
            targets = {m.removeprefix(prefix).split(".")[0] for m in package_imports(name) if m.startswith(prefix)}
            graph[place] |= targets - {place}
    list(TopologicalSorter(graph).static_order())


def test_leaves_know_leaves():
    check_only(LEAVES, ())


def test_recipes_are_known_by_the_command_line_alone():
    assert rooms_that_import("recipes") == {"cli"}


def test_the_api_is_known_by_the_command_line_alone():
    assert rooms_that_import("api") == {"cli"}
    assert rooms_that_import("simulation") == {"api", "cli"}


# --- rules 2 to 5: the rooms --------------------------------------------------------------------------------------------


def test_networks_know_leaves_alone():
    check_only(("wam",), LEAVES)
    check_only(("alignment",), LEAVES)


def test_only_methods_and_what_encodes_frames_join_networks_and_alignment():
    """`methods/wam.py` joins them, `data/features` and `policies` run the frozen ones, and the rest is wiring."""
    both = rooms_that_import("wam") & rooms_that_import("alignment")
    assert both == {"methods", "data", "policies", "diagnostics", "training", "recipes", "api"}


def test_training_and_policies_know_no_particular_method():
    for name in files_of("training", "policies", "checkpoints"):
        particular = {
            m
            for m in package_imports(name)
            if under(m, "agra.methods") and m not in ("agra.methods.method", "agra.methods")
        }
        assert not particular, f"{name} imports {particular}"


SHARED = ("agra.methods.method", "agra.methods.ddim")
"""Modules that methods share."""


def test_the_table_is_the_only_list_of_methods():
    listing = {
        name for name in FILES if any(under(m, "agra.methods") and m not in SHARED for m in package_imports(name))
    }
    of_wam = {"agra.methods.wam_actor", "agra.methods.wam", "agra.diagnostics.study", *files_of("recipes")}
    of_wam |= {"agra.methods.dit4dit"}  # a WAM with a loss of its own
    assert listing - of_wam == {"agra.methods.table", "agra.config"}


def test_a_robots_server_needs_neither_training_nor_diagnostics():
    for name in files_of("policies", "serving", "checkpoints"):
        assert not any(under(m, "agra.training", "agra.diagnostics") for m in package_imports(name)), name
    served = sorted(files_of("policies", "serving"))
    code = (
        f"import sys, importlib\nfor m in {served}: importlib.import_module(m)\n"
        "print(*[m for m in sys.modules if m.startswith(('agra.training', 'agra.diagnostics'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_evaluation_sees_policies_and_simulators_alone():
    check_only(("evaluation",), ("types", "files", "simulators", "data.lerobot"))


def test_serving_sees_policies_and_robots_alone():
    check_only(("serving",), ("types", "files", "simulators", "data.lerobot.writer"))


# --- rules 6 to 8: libraries --------------------------------------------------------------------------------------------


def test_rooms_without_torch():
    rooms = ("types", "files", "simulators", "evaluation", "data.normalization", "serving.client", "serving.protocol")
    apart = ("agra.simulators.tabletop", *(f"agra.simulators.{suite}.{suite}_env" for suite in SUITES))
    light = sorted(name for name in files_of(*rooms) if not under(name, *apart))
    code = f"import sys, importlib\nfor m in {light}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    for name in files_of("simulators"):
        assert not any(under(module, "torch") for module in imports(name)), name


def test_heavy_libraries_have_one_door():
    for name in FILES:
        for library, doors in DOORS.items():
            if any(under(module, library) for module in imports(name)):
                assert under(name, *doors), f"{name} imports {library}"


def test_nothing_reads_or_writes_pickle():
    for name, path in FILES.items():
        assert not {m for m in imports(name) if under(m, "pickle", "cloudpickle", "dill", "joblib", "shelve")}, name
        assert "allow_pickle=True" not in path.read_text(), name


def test_configs_open_nothing():
    for name in ("agra.config", "agra.data.config", "agra.stages", "agra.methods.method", *files_of("recipes")):
        assert not any(under(m, "agra.hub", "agra.data.lerobot", "pyarrow", "av") for m in imports(name)), name


# --- size and documentation ---------------------------------------------------------------------------------------------


def test_the_root_holds_leaves_config_and_the_api():
    modules = {p.stem for p in (SOURCE / "agra").glob("*.py")} - {"__init__"}
    assert modules == ROOT_MODULES


def test_rooms_are_small():
    """3 to 10 files or rooms, a dozen where a format or a scene needs them; two files where a simulator has no more."""
    for folder in {path.parent for path in FILES.values()} - {SOURCE / "agra"}:
        children = [p for p in folder.iterdir() if any(p.rglob("*.py")) or (p.suffix == ".py" and p.stem != "__init__")]
        assert 2 <= len(children) <= 12, f"{folder}: {len(children)}"


def test_files_stay_readable():
    """Median near 150 lines, few over 300."""
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES.values() if path.name != "__init__.py")
    assert lengths[len(lengths) // 2] <= 160
    assert sum(length > 300 for length in lengths) <= len(lengths) // 8


def test_the_documented_tree_is_complete():
    """docs/architecture.md names every module of the package, and no other."""
    page = (ROOT / "docs/architecture.md").read_text()
    tree = re.search(r"```\nsrc/agra/\n(.*?)```", page, re.DOTALL)
    assert tree is not None
    listed, folders = set(), []
    for line in tree[1].splitlines():
        if not line.strip():
            continue
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[: depth - 1], name.rstrip("/")]
        if name.endswith(".py"):
            listed.add("/".join(folders))
    present = {str(p.relative_to(SOURCE / "agra")) for p in FILES.values() if p.name != "__init__.py"}
    assert present - listed == set(), "missing in docs/architecture.md"
    assert listed - present == set(), "in docs/architecture.md alone"
