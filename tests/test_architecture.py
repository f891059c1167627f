"""Who may know whom: an AST walk over every import of the package."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src"
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in (ROOT / "agra").rglob("*.py")
}
MEETING_PLACES = (
    "agra.methods.wam",
    "agra.diagnostics",
    "agra.config",
    "agra.recipes",
    "agra.data.features.preparation",
    "agra.api",
    "agra.diagnostics.samples.sources",
    "agra.cli.main",
)
SUITES = ("metaworld", "libero", "robocasa")
"""Simulators whose libraries are installed in environments of their own."""
DOORS = {
    "diffusers": ("agra.wam.video_dit", "agra.wam.codec"),
    "transformers": ("agra.wam.text", "agra.alignment", "agra.hub"),
    "mujoco": ("agra.simulators.tabletop", "agra.simulators.metaworld"),
    "metaworld": ("agra.simulators.metaworld",),
    "libero": ("agra.simulators.libero",),
    "robocasa_gr1": ("agra.simulators.robocasa",),
    "pyarrow": ("agra.data",),
    "av": ("agra.data",),
    "h5py": ("agra.data.importers.hdf5",),
    "onnx": ("agra.alignment",),
    "websockets": ("agra.serving.server.websocket", "agra.serving.client", "agra.serving.remote_policies"),
    "msgpack": ("agra.serving.protocol.wire",),
    "zmq": ("agra.serving.remote_policies",),
    "prometheus_client": ("agra.serving.server.service",),
}


def _imports(name, *, types=False):
    """Modules that a file imports, wherever in it; those under TYPE_CHECKING only with `types`."""
    tree = ast.parse(FILES[name].read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            skipped.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else str(node.module)


def _under(name, *rooms):
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _ours(name):
    return {m for m in _imports(name) if _under(m, "agra")} - {name}


def test_no_cycle():
    list(TopologicalSorter({name: _ours(name) & FILES.keys() for name in FILES}).static_order())


def test_leaves_know_nothing():
    for leaf in ("agra.types", "agra.batch", "agra.rng", "agra.files"):
        assert not _ours(leaf), leaf
    assert _ours("agra.flow") == {"agra.rng"}


def test_only_the_command_line_knows_recipes():
    assert [name for name in FILES if "agra.recipes" in _ours(name)] in (["agra.cli.main"], [])


def test_wam_knows_only_the_leaves():
    allowed = ("agra.wam", "agra.flow", "agra.rng", "agra.batch", "agra.types", "agra.files", "agra.hub")
    for name in FILES:
        if _under(name, "agra.wam"):
            assert all(_under(m, *allowed) for m in _ours(name)), (name, _ours(name))


def test_wam_and_alignment_meet_only_where_they_should():
    for name in FILES:
        if not _under(name, *MEETING_PLACES):
            rooms = {room for room in ("agra.wam", "agra.alignment") if any(_under(m, room) for m in _ours(name))}
            assert len(rooms) < 2, name
            assert not (_under(name, "agra.alignment") and rooms == {"agra.wam"}), name


def test_evaluation_sees_policies_and_simulators_only():
    for name in FILES:
        if _under(name, "agra.evaluation"):
            allowed = ("agra.evaluation", "agra.types", "agra.files", "agra.data.lerobot.video", "agra.evaluation.workers")
            assert all(_under(m, *allowed) for m in _ours(name)), (name, _ours(name))


def test_serving_sees_policies_and_robots_only():
    allowed = (
        "agra.serving", "agra.types", "agra.files", "agra.simulators", "agra.data.lerobot.writer", "agra.evaluation.results",
    )  # fmt: skip
    for name in FILES:
        if _under(name, "agra.serving"):
            assert all(_under(m, *allowed) for m in _ours(name)), (name, _ours(name))


def test_nothing_reads_or_writes_pickle():
    for name in FILES:
        assert not {m for m in _imports(name) if _under(m, "pickle", "cloudpickle", "dill", "joblib", "shelve")}, name
        assert "allow_pickle=True" not in FILES[name].read_text(), name


def test_heavy_libraries_have_one_door():
    for name in FILES:
        for library, doors in DOORS.items():
            if any(_under(m, library) for m in _imports(name)):
                assert _under(name, *doors), f"{name} imports {library}"


def test_simulators_and_robots_need_no_torch():
    rooms = ("agra.types", "agra.simulators", "agra.evaluation", "agra.data.normalization.normalize", "agra.evaluation.collect", "agra.serving")
    apart = ("agra.simulators.tabletop", *(f"agra.simulators.{suite}.environment" for suite in SUITES))
    light = sorted(name for name in FILES if _under(name, *rooms) and not _under(name, *apart))
    code = f"import sys, importlib\nfor m in {light}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    for name in FILES:
        if _under(name, "agra.simulators"):
            assert not any(_under(m, "torch") for m in _imports(name)), name


def test_files_stay_readable():
    """Median near 120 lines, few over 300."""
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES.values() if path.name != "__init__.py")
    assert lengths[len(lengths) // 2] <= 200
    assert sum(length > 300 for length in lengths) <= len(lengths) // 8
