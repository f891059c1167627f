"""`benchmarks/gpu`, the script for a machine with a GPU: its imports, its bookkeeping, and every section on a CPU."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import SECTIONS, Options, main
from benchmarks.gpu.report import Report

REPOSITORY = Path(__file__).parents[2]
ALLOWED = ("torch", "transformers", "diffusers", "safetensors", "accelerate", "cattrs", "tyro", "jaxtyping", "rich")
IMPORT_ALL = """
import importlib.util, pkgutil
assert not any(map(importlib.util.find_spec, ("scipy", "pyarrow", "av", "sklearn", "msgpack")))
import benchmarks.gpu
for module in pkgutil.iter_modules(benchmarks.gpu.__path__):
    __import__(f"benchmarks.gpu.{module.name}")
"""


@pytest.fixture
def bare_site(tmp_path):
    """A folder with the nine packages and what they require, and nothing else that is installed."""
    names, waiting = set(), [*ALLOWED]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in names:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        names.add(name)
        lines = [line for line in distribution.requires or [] if "extra ==" not in line]
        waiting += [match[0] for line in lines if (match := re.match(r"[\w.-]+", line))]
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(str(distribution.locate_file(top)))
    assert names >= set(ALLOWED)
    return tmp_path


def start(*arguments, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_it_imports_the_nine_packages_alone(bare_site):
    """In a process that finds no others."""
    path = os.pathsep.join(map(str, (bare_site, REPOSITORY / "src", REPOSITORY)))
    done = start("-S", "-c", IMPORT_ALL, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_late_exists():
    """A section imports some of agra inside its functions, for machines without the packages that it needs."""
    for path in sorted((REPOSITORY / "benchmarks" / "gpu").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("agra"):
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{path.name} imports {missing} of {node.module}"


def report(folder, budget=60.0):
    return Report(output=folder, budget=budget, machine={"device": "none", "torch": "0", "python": "0"})


def test_figures_are_written_at_once_beside_their_floors(tmp_path):
    whole = report(tmp_path)
    whole.peak_flops, whole.bandwidth = 1e12, 1e9
    section = whole.section(2, "video_dit")
    section.measure("by products", lambda: {"seconds": 4.0, "flops": 2e12, "bytes": 1e9}, needs=1)
    written = json.loads((tmp_path / "2_video_dit.json").read_text())
    assert written["figures"]["by products"]["floor_seconds"] == 2.0
    section.measure("by bytes", lambda: {"seconds": 4.0, "flops": 1e12, "bytes": 3e9}, needs=1)
    assert section.figures["by bytes"]["floor_seconds"] == 3.0
    assert "| 2 video_dit | by products | 4 s | 2 s | 50% | - |" in (tmp_path / "table.md").read_text()


def test_what_fails_or_does_not_fit_is_named_and_the_run_goes_on(tmp_path):
    whole = report(tmp_path, budget=30)
    section = whole.section(3, "answer")
    section.measure("broken", lambda: {"seconds": 1 / 0}, needs=0)
    section.measure("absent", lambda: __import__("no_such_package"), needs=0)
    section.measure("long", lambda: {"seconds": 1.0}, needs=100)
    assert whole.failures == ["answer: broken"]
    assert section.figures["absent"]["skipped"] == "the package no_such_package is missing"
    assert section.figures["long"]["skipped"].startswith("100 s needed, ")
    assert "failed: ZeroDivisionError" in whole.table()
    assert len(json.loads((tmp_path / "3_answer.json").read_text())["figures"]) == 3


def test_sections_and_budget_are_checked(tmp_path):
    with pytest.raises(ValueError, match="--sections: expected numbers of 1 to 8, got 9"):
        Options(sections=(1, 9))
    with pytest.raises(ValueError, match="--budget: expected seconds above 0"):
        Options(budget=0)


def test_a_spent_budget_skips_every_section_by_name(tmp_path, capsys):
    assert main(["--dry-run", "--budget", "0.001", "--output", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text()
    for number, (name, _) in SECTIONS.items():
        assert f"| {number} {name} |" in table
    assert table.count("skipped: the budget is spent") + table.count("s left") >= len(SECTIONS) - 1
    assert table in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.slow
def test_every_section_runs_dry(tmp_path):
    """On a CPU at tiny sizes: two minutes on two busy cores."""
    done = start("-m", "benchmarks.gpu", "--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    figures = {
        name: json.loads((tmp_path / f"{number}_{name}.json").read_text())["figures"]
        for number, (name, _) in SECTIONS.items()
    }
    skipped = [f"{n}: {f}" for n, section in figures.items() for f, v in section.items() if "skipped" in v]
    assert not skipped
    assert figures["video_dit"]["equality"]["float32_difference"] < 1e-5
    assert all(answer["recompiles"] == 0 for answer in figures["answer"].values())
    assert all(answer["largest_difference"] < 0.05 for name, answer in figures["answer"].items() if "pool" not in name)
    resumed = figures["resume"]["resumed after SIGKILL"]
    assert resumed["resumed_from"] == 10
    assert resumed["validations"] == 4
    assert resumed["equal_tensors"] == resumed["tensors"] > 100
    assert figures["resume"]["served"]["exit_code"] == 0
    assert 0 < figures["resume"]["diagnosed"]["in_mask_ratio"] < 1
    assert set(figures["fsdp"]) == {"2 processes, gathered in float32", "2 processes, gathered in bfloat16"}
    assert (tmp_path / "table.md").read_text() in done.stdout
