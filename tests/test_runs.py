"""The scripts under runs/ parse, and say only what the command line knows."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from agra.cli import COMMANDS
from agra.recipes import RECIPES
from agra.training.sharding import ParallelConfig

RUNS = sorted(path for path in (Path(__file__).parent.parent / "runs").iterdir() if path.is_file())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_script_parses_and_names_what_exists(path):
    text = path.read_text()
    if path.suffix == ".py":
        compile(text, path, "exec")
        assert path.name in path.with_suffix(".sh").read_text()
        return
    if path.suffix == ".yaml":
        kinds = [document["kind"] for document in yaml.safe_load_all(text)]
        assert kinds == ["Service", "Job"]
    else:
        subprocess.run(["bash", "-n", str(path)], check=True)
    commands = re.findall(r"(?:^\s*|exec |-m |\|\| )agra(?:\.cli)? ([a-z]\w*)(?! \d)", text, re.M)
    assert commands
    assert set(commands) <= COMMANDS.keys()
    assert set(re.findall(r"\b(?:train|prepare|plan) (agra_\w+|wam\w*|tiny\w*)", text)) <= RECIPES.keys()
    known = {f"--parallel.{field.name.replace('_', '-')}" for field in fields(ParallelConfig)}
    assert set(re.findall(r"--parallel\.[\w-]+", text)) <= known
