"""The workflows test the versions that pyproject.toml supports."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _rows(workflow, job):
    text = (ROOT / f".github/workflows/{workflow}.yml").read_text()
    return yaml.safe_load(text)["jobs"][job]["strategy"]["matrix"]["include"]


def _oldest_pins(workflow, job):
    """Versions by library, of the row that pins the oldest ones."""
    (row,) = (row for row in _rows(workflow, job) if "pins" in row)
    return dict(pin.split("==") for pin in f"{row.get('torch', '')} {row['pins']}".split())


def _lower_bounds(*extras):
    """Versions by library, of the bare package or of extras."""
    texts = [text for extra in extras for text in PROJECT["optional-dependencies"][extra]] or PROJECT["dependencies"]
    requirements = [Requirement(text) for text in texts]
    return {
        requirement.name: next(bound.version for bound in requirement.specifier if bound.operator == ">=")
        for requirement in requirements
        if requirement.specifier
    }


def test_every_supported_python_is_tested():
    prefix = "Programming Language :: Python :: "
    pythons = {text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(f"{prefix}3.")}
    assert f">={min(pythons, key=Version)}" == PROJECT["requires-python"]
    assert {row["python"] for row in _rows("tests", "test")} == pythons
    assert {row["python"] for row in _rows("wheels", "wheel")} == pythons


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers"])
def test_the_oldest_supported_networks_are_tested(library):
    assert _oldest_pins("tests", "test")[library].startswith(_lower_bounds("policy")[library])


def test_the_oldest_supported_libraries_without_torch_are_tested():
    pins = _oldest_pins("wheels", "wheel")
    bounds = {**_lower_bounds(), **_lower_bounds("client", "tabletop")}
    assert pins.keys() == bounds.keys()
    assert all(pins[library].startswith(bounds[library]) for library in pins), (pins, bounds)


def test_the_newest_torch_is_tested():
    assert "torch" in [row["torch"] for row in _rows("tests", "test")]
