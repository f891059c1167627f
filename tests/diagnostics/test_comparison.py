"""runs/comparison.py on runs of known differences."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from agra.diagnostics.visual_reliance import Swaps, VisualReliance
from agra.types import REGIMES


@pytest.fixture
def comparison():
    path = Path(__file__).parents[2] / "runs" / "comparison.py"
    spec = importlib.util.spec_from_file_location("comparison", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_visual_reliance(folder, error):
    trials = [f"trial {i}" for i in range(8)]
    demonstrated = np.random.default_rng(0).uniform(-0.1, 0.1, (8, 2))
    targets = {"unchanged": demonstrated + np.array([error, 0])}
    swaps = Swaps.of(["a"] * 8, ["take it"] * 8, demonstrated, {})
    reliance = VisualReliance.of(targets, demonstrated, swaps, trials=trials, groups=["a"] * 8)
    reliance.save(folder / "diagnosis" / "visual_reliance.json")


def test_seeds_are_pooled_and_compared_in_pairs(comparison, write_policy, tmp_path, capsys):
    for name, wins, error in (("wam_0", 3, 0.06), ("wam_1", 4, 0.05), ("agra_0", 8, 0.02), ("agra_1", 6, 0.03)):
        write_policy(name, wins=wins)
        write_visual_reliance(tmp_path / name, error)
    comparison.main(tmp_path, ["wam", "agra"])
    written = json.loads((tmp_path / "comparison.json").read_text())
    success = written["success, %"]["agra"]
    assert success["value"]["value"] == pytest.approx(70)
    assert success["value"]["by_seed"] == pytest.approx({"0": 80, "1": 60})
    assert success["difference"]["value"] == pytest.approx(35)
    assert success["difference"]["by_seed"] == pytest.approx({"0": 50, "1": 20})
    assert success["difference"]["low"] < 35 < success["difference"]["high"]
    assert success["difference"]["count"] == 2 * 10 * len(REGIMES)
    error = written["first target's error, cm"]["agra"]
    assert error["difference"]["by_seed"] == pytest.approx({"0": -4, "1": -2})
    assert "difference" not in written["success, %"]["wam"]
    shift = written["shift when the image is swapped, cm"]["agra"]["value"]
    assert shift["value"] is shift["by_seed"]["0"] is None  # that variant was not measured
    assert "minus wam" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no run named frozen_SEED"):
        comparison.main(tmp_path, ["wam", "frozen"])
