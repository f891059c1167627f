"""Names and signatures of the public interface. A change here is a change for users and belongs in CHANGELOG.md."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import agra

DOCS = Path(__file__).parent.parent / "docs"
SIGNATURES = {
    "diagnose": "(run, *, simulator, samples, seed=0, device='cpu', config=None, teacher='own', probes=None, masks=None,"
    " action_noise=None, video_noise=None)",
    "evaluate": "(policy, simulator='tabletop', *, output=None, name=None, regimes=None, tasks=None, limit=None, protocol=None, videos=0,"
    " workers=1, simulator_options=None, key_mapping=None, device='cpu', threads=None, action_noise=None, video_noise=None,"
    " checkpoint_sha256=None, computed_on=None, shard=None, progress=True)",
    "export": "(source, output, *, ema=False, half=False)",
    "load_policy": "(path, *, name=None, device='cpu', known_instructions=False, **options)",
    "make_demo": "(policies=('tabletop-wam', 'tabletop-agra'), *, device='cpu')",
    "make_simulator": "(name, **options)",
    "prepare": "(config, *, device='cpu')",
    "read_config": "(checkpoint)",
    "report": "(policies, *, output, studies=())",
    "train": "(config, *, output, init_from=None, head=None, head_rows=(24,), device='cpu', parallel=None, loggers=None, prepare_missing=None)",
}
CLASSES = {
    "ActionChunk": {"actions", "timings", "imagined"},
    "Observation": {"frame", "state", "instruction", "embodiment", "views"},
    "Policy": {"reset", "act"},
    "PolicyClient": {"spec", "reset", "act", "act_and_imagine", "close"},
    "RunConfig": {"method", "data", "stage", "visual_reliance", "monitor", "to_json", "from_json"},
    "Simulator": {"name", "embodiment", "fps", "max_steps", "regimes", "reset", "step", "trials", "close"},
}


def test_the_public_names_are_these():
    assert set(agra.__all__) == SIGNATURES.keys() | CLASSES.keys()
    assert dir(agra) == sorted(agra.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name):
    signature = inspect.signature(getattr(agra, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_keep_their_attributes(name):
    kind = getattr(agra, name)
    assert CLASSES[name] <= {*dir(kind), *getattr(kind, "__annotations__", {})}


@pytest.mark.parametrize("name", sorted([*SIGNATURES, *CLASSES]))
def test_public_names_are_documented(name):
    assert (getattr(agra, name).__doc__ or "").strip()
    assert f"agra.{name}" in (DOCS / "api.md").read_text()


def test_an_unknown_name_gets_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'WAMPolicy'; it has .*load_policy"):
        _ = agra.WAMPolicy


def test_import_loads_no_torch():
    code = "import sys, agra; agra.PolicyClient, agra.Observation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_documented_policy_plays(tmp_path, monkeypatch):
    """The example of docs/api.md, as it stands."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)
    exec(
        blocks[-1].replace("limit=1", 'limit=1, regimes=("in_distribution",), progress=False'), {"__name__": "example"}
    )
    assert (tmp_path / "still.jsonl").read_text().count("\n") == 2  # a header and a trial
