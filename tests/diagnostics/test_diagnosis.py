import numpy as np
import pytest

from agra.diagnostics.diagnosis import DiagnosisConfig, diagnose
from agra.diagnostics.record import read_diagnosis


@pytest.fixture
def samples(make_sample):
    return [make_sample(trial=f"trial-{i // 2}", step=i, seed=i) for i in range(5)] + [
        make_sample(trial="hidden", step=9, masked=False)
    ]


def test_diagnose_finds_the_token_and_round_trips(policy, samples, tmp_path, target):
    def teacher(frames):
        return frames.reshape(len(frames), 4, 4, 5, 4, 3).mean(axis=(2, 4))

    config = DiagnosisConfig(draws=3, gallery=3)
    written = diagnose(
        policy, samples, tmp_path / "d", teacher=teacher, teacher_name="pixels", config=config, progress=False
    )
    read = read_diagnosis(tmp_path / "d")
    assert read.keys == [(s.trial, s.step) for s in samples]
    assert read.header["teacher"] == "pixels"
    assert read.header["grid"] == [3, 4, 5]
    for name, array in written.arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)
    ratios = read.values("in_mask_ratio")
    np.testing.assert_allclose(ratios[:5], 1)
    assert np.isnan(ratios[5])
    np.testing.assert_allclose(read.values("uniform_in_mask_ratio")[:5], 1 / 20)
    np.testing.assert_allclose(read.values("centroid_error")[:5], 0, atol=1e-9)
    inside, outside = read.deviations("zero")
    assert (inside[:5] > 0).all()
    assert (outside[:5] == 0).all()
    assert outside.shape == (6, 3)
    assert read.rows[5]["note"] == "the interaction mask is empty"
    assert read.arrays["frames"].shape == (3, 3, 16, 20, 3)
    heat = read.arrays["sensitivity_zero"]
    assert heat.shape == (3, 4, 5)
    assert (heat > 0).sum() == 3
    assert (heat[:, target[1], target[2]] > 0).all()
    assert read.arrays["pca_teacher"].shape == read.arrays["pca_layer_2"].shape == (3, 3, 4, 5, 3)
    assert read.header["summary"]["in_mask_ratio"]["value"] == pytest.approx(1)
    assert not list((tmp_path / "d").glob("*.tmp"))


def test_sample_order_does_not_matter(policy, samples, tmp_path):
    config = DiagnosisConfig(draws=2, gallery=0, map_kinds=())
    forward = diagnose(policy, samples, tmp_path / "a", config=config, progress=False)
    backward = diagnose(policy, samples[::-1], tmp_path / "b", config=config, progress=False)
    assert forward.rows == backward.rows[::-1]
    other = diagnose(policy, samples, tmp_path / "c", seed=1, config=config, progress=False)
    assert other.rows != forward.rows


def test_the_video_pass_runs_once_a_sample(policy, samples, tmp_path):
    diagnose(policy, samples, tmp_path / "d", config=DiagnosisConfig(gallery=2), progress=False)
    assert policy.model.condition_calls == len(samples)


def test_diagnose_refuses(policy, samples, make_sample, tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        diagnose(policy, [], tmp_path)
    with pytest.raises(ValueError, match="same trial and step"):
        diagnose(policy, [samples[0], samples[0]], tmp_path, progress=False)
    with pytest.raises(ValueError, match="unknown interventions"):
        DiagnosisConfig(kinds=("blur",))
    with pytest.raises(FileNotFoundError, match="agra diagnose"):
        read_diagnosis(tmp_path / "nothing")
