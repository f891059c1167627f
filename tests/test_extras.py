"""Each extra installs what its documented use imports. The environment of the tests has all of them, so others are hidden."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import agra

USES = {
    "train": "agra.api, agra.training.trainer",
    "policy": "agra.policies.load",
    "policy,serve": "agra.serving.server.app, agra.serving.server.groot",
    "report,train": "agra.diagnostics.report.page",
    "client,tabletop": "agra.simulation, agra.simulators.tabletop.tabletop_env, agra.serving.remote_policies",
}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def add_requirements(name, extras, required):
    """Add `name` and all that it requires with `extras`, as far as they are installed. `required` maps names to extras."""
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:
        return
    wanted = extras | {""}
    seen = required.setdefault(normal(name), set())
    if wanted <= seen:
        return
    seen |= wanted
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
            add_requirements(requirement.name, set(requirement.extras), required)


@pytest.mark.parametrize("extras", USES)
def test_an_extra_installs_what_its_use_imports(extras, tmp_path):
    """The extra's distributions are linked into a folder of their own, in which another Python without packages looks."""
    required = {}
    add_requirements("agra", set(extras.split(",")), required)
    for name in required.keys() - {"agra"}:
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = tmp_path / top
            if not link.exists():
                link.symlink_to(distribution(name).locate_file(top))
    path = [str(tmp_path), str(Path(agra.__file__).parents[1])]
    command = [sys.executable, "-S", "-I", "-c", f"import sys; sys.path += {path}; import {USES[extras]}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
