"""Check an installed agra without torch. Not a pytest file: `make test-light` runs it in a fresh environment.

    python -I tests/support/light_install.py [client] [tabletop]

Each argument is an extra that is installed there beside the bare package.
"""

import importlib
import pkgutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

MODULES = {
    "": (
        "agra.types",
        "agra.cli.main",
        "agra.simulators.registry",
        "agra.simulation",
        *(
            f"agra.evaluation.{name}"  # `collect` needs the extra `data`
            for name in ("protocols", "published", "remote", "results", "rollout", "statistics", "tables", "workers")
        ),
        "agra.data.normalization.normalize",
    ),
    "client": (
        "agra.serving.client",
        "agra.serving.protocol.wire",
        "agra.serving.protocol.messages",
        "agra.serving.robot.control",
    ),
    "tabletop": ("agra.simulators.tabletop",),
}
HEAVY = ("torch", "diffusers", "transformers")


def import_all(name):
    """Import a module, and everything inside it where it is a package. Returns the number of modules."""
    module = importlib.import_module(name)
    inside = [inner.name for inner in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}.")]
    for inner in inside:
        importlib.import_module(inner)
    return 1 + len(inside)


def check_base():
    """The command line answers, and statistics work with numpy and scipy alone."""
    from agra.evaluation.statistics import wilson_interval

    low, high = wilson_interval(8, 10)
    assert 0.49 < low < 0.5 < 0.94 < high < 0.95, (low, high)
    run("--help")
    run("leaderboard")


def check_client():
    """A request survives the wire, and a missing server is one clear error."""
    import numpy as np

    from agra.serving.client import PolicyClient, ServerLost
    from agra.serving.protocol.wire import pack, unpack

    state = np.linspace(0, 1, 7, dtype=np.float32)
    returned = unpack(pack({"observation/state": state, "prompt": "open the drawer"}))
    assert np.array_equal(returned["observation/state"], state)
    try:
        PolicyClient("ws://127.0.0.1:9", timeout=5).spec  # noqa: B018 (connects)
    except ServerLost:
        return
    raise AssertionError("a policy server on port 9?")


def check_tabletop():
    """The scripted expert plays a trial of each regime."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        run("evaluate", "expert", "--output", str(results), "--limit", "1", "--videos", "0")
        header, *trials = results.read_text().splitlines()
    assert len(trials) == 4, header
    assert all('"success": true' in trial for trial in trials), trials


def run(*arguments):
    """Run `agra` as a command. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-I", "-m", "agra.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def main(extras):
    """Import the modules and run the checks of the bare package and of `extras`."""
    unwanted = [name for name in HEAVY if find_spec(name)]
    if unwanted:
        raise SystemExit(f"installed here, but no part of a light installation: {', '.join(unwanted)}")
    count = sum(import_all(name) for extra in ("", *extras) for name in MODULES[extra])
    checks = {"": check_base, "client": check_client, "tabletop": check_tabletop}
    for extra in ("", *extras):
        checks[extra]()
    python = ".".join(map(str, sys.version_info[:3]))
    package = f"agra[{','.join(extras)}]" if extras else "agra"
    print(f"Python {python}, {package} without torch: {count} modules import, {len(extras) + 1} checks passed")


if __name__ == "__main__":
    main(sys.argv[1:])
