import sys

import pytest

from agra.diagnostics.diagnosis import diagnose
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.report.rerun_export import write_recording


@pytest.fixture
def diagnosis(policy, make_sample, tmp_path):
    def examine(gallery):
        samples = [make_sample(trial=f"t{i}", seed=i) for i in range(2)]
        config = DiagnosisConfig(background_sets=1, noise_samples=1, gallery=gallery, map_kinds=("zero",))
        return diagnose(policy, samples, tmp_path / f"d{gallery}", config=config, progress=False)

    return examine


def test_the_recording_holds_what_the_gallery_does(diagnosis, tmp_path):
    pytest.importorskip("rerun")
    path = write_recording([("wam", diagnosis(2))], tmp_path / "d.rrd")
    content = path.read_bytes()
    assert content[:4] == b"RRF2"
    for entity in ("camera/mask", "attention/block_2", "sensitivity/zero", "pca/layer_0", "metrics/in_mask_ratio"):
        assert f"/wam/{entity}".encode() in content
    assert not list(tmp_path.glob(".*writing"))


def test_what_is_missing_is_named(diagnosis, tmp_path, monkeypatch):
    empty = diagnosis(0)
    pytest.importorskip("rerun")
    with pytest.raises(ValueError, match="--gallery above 0"):
        write_recording([("wam", empty)], tmp_path / "d.rrd")
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ImportError, match=r"pip install .\.\[rerun\]. in a checkout"):
        write_recording([("wam", empty)], tmp_path / "d.rrd")
