import json
import zlib

import numpy as np
import pytest

from agra.diagnostics.diagnosis import diagnose
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.record import read_diagnosis


@pytest.fixture
def samples(make_sample):
    return [make_sample(trial=f"trial-{i // 2}", step=i, seed=i) for i in range(5)] + [
        make_sample(trial="hidden", step=9, masked=False)
    ]


def test_diagnose_finds_the_token_and_round_trips(policy, samples, tmp_path, target):
    def teacher(frames):
        return frames.reshape(len(frames), 4, 4, 5, 4, 3).mean(axis=(2, 4))

    config = DiagnosisConfig(background_sets=3, gallery=3)
    written = diagnose(
        policy, samples, tmp_path / "d", teacher=teacher, teacher_name="pixels", config=config, progress=False
    )
    read = read_diagnosis(tmp_path / "d")
    assert read.keys == [(s.trial, s.step) for s in samples]
    assert read.header["teacher"] == "pixels"
    assert [read.header[key] for key in ("checkpoint_sha256", "action_noise", "video_noise")] == [
        None,
        "random",
        "random",
    ]
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
    assert (inside.shape, outside.shape) == ((6, 2), (6, 2, 3))
    assert read.rows[5]["note"] == "the interaction mask is empty"
    assert read.arrays["frames"].shape == (3, 3, 16, 20, 3)
    heat = read.arrays["sensitivity_zero"]
    assert heat.shape == (3, 4, 5)
    assert (heat > 0).sum() == 3
    assert (heat[:, target[1], target[2]] > 0).all()
    assert read.arrays["pca_teacher"].shape == read.arrays["pca_layer_2"].shape == (3, 3, 4, 5, 3)
    assert read.header["summary"]["in_mask_ratio"]["value"] == pytest.approx(1)
    for name, count in (("steps", 4), ("heads", 2), ("actions", 4)):  # every part looks at the token alone
        part = read.arrays[f"attention_by_{name}"]
        assert part.shape == (3, count, 2, 3, 4, 5)
        assert (part[..., *target] == 1).all()
        np.testing.assert_allclose(part.sum(axis=(3, 4, 5)), 1)
    assert read.header["words"] == [["put", "the", "banana"]] * 3
    words = read.arrays["text_attention_0"]
    assert words.shape == (2, 3, 3, 4, 5)
    assert np.argwhere(words[0, 1]).tolist() == [list(target)]
    assert not list((tmp_path / "d").glob("*.tmp"))


def test_sample_order_does_not_matter(policy, samples, tmp_path):
    config = DiagnosisConfig(background_sets=2, gallery=0, map_kinds=())
    forward = diagnose(policy, samples, tmp_path / "a", config=config, progress=False)
    backward = diagnose(policy, samples[::-1], tmp_path / "b", config=config, progress=False)
    assert forward.rows == backward.rows[::-1]
    other = diagnose(policy, samples, tmp_path / "c", seed=1, config=config, progress=False)
    assert other.rows != forward.rows


def test_the_video_pass_runs_once_a_sample(policy, samples, tmp_path):
    diagnose(policy, samples, tmp_path / "d", config=DiagnosisConfig(gallery=2), progress=False)
    assert policy.method.hidden_calls == len(samples)


def test_diagnose_refuses(policy, samples, make_sample, tmp_path):
    with pytest.raises(ValueError, match="got none"):
        diagnose(policy, [], tmp_path)
    with pytest.raises(ValueError, match="same trial and step"):
        diagnose(policy, [samples[0], samples[0]], tmp_path, progress=False)
    with pytest.raises(ValueError, match="unknown interventions"):
        DiagnosisConfig(kinds=("blur",))
    with pytest.raises(FileNotFoundError, match="agra diagnose"):
        read_diagnosis(tmp_path / "nothing")


def test_what_was_demonstrated_is_compared(policy, make_sample, tmp_path):
    """The stand-in expects that nothing moves; of the four frames to come only the last one differs from the first."""
    samples = [make_sample(trial=f"t{i}", seed=i) for i in range(8)]
    config = DiagnosisConfig(background_sets=1, gallery=1, map_kinds=())
    diagnosis = diagnose(policy, samples, tmp_path / "d", config=config, progress=False)
    row = diagnosis.rows[0]
    assert 10 < row["psnr"] == row["still_psnr"] < 15
    assert 0.75 <= row["ssim"] == row["still_ssim"] < 0.85
    np.testing.assert_array_equal(diagnosis.arrays["imagined"][0], diagnosis.arrays["recorded"][0][[0] * 5])
    demonstrated, inputs = samples[0].actions[:4], policy.encode([samples[0].observation])
    seed = zlib.crc32(b"0/t0/0")
    chunks = [policy.method.act(inputs, policy.noise(1, seed + number))[0].detach().numpy() for number in range(2)]
    errors = [np.sqrt(np.square(chunk - demonstrated).mean()) for chunk in chunks]
    assert row["action_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert len(row["probe_error_by_layer"]) == 2
    others = np.mean([sample.position for sample in samples[1:]], axis=0)
    assert row["blind_probe_error"] == pytest.approx(np.linalg.norm((others - samples[0].position) * (4, 5)))


def test_samples_without_a_recording_are_measured_all_the_same(policy, make_sample, tmp_path):
    samples = [make_sample(trial=f"t{i}", seed=i, recorded=False) for i in range(3)]
    diagnosis = diagnose(
        policy, samples, tmp_path / "d", config=DiagnosisConfig(background_sets=1, map_kinds=()), progress=False
    )
    missing = ("psnr", "action_error", "probe_error_by_layer", "teacher_similarity_by_layer")
    assert all(row[name] is None for row in diagnosis.rows for name in missing)
    assert "imagined" not in diagnosis.arrays


def test_projectors_are_read_where_they_belong(policy, make_sample, tmp_path):
    """A projector that maps the hidden states to the teacher's features exactly has a cosine of 1 at its layer."""

    class Exact:
        def __iter__(self):
            return iter(["2"])

        def project(self, hidden):
            return [hidden[2] * 3]

    def teacher(frames):
        return policy.method.hidden(inputs, noise, layers=(2,))[2][0].numpy()

    sample = make_sample()
    inputs, noise = policy.encode([sample.observation]), policy.noise(1, zlib.crc32(b"0/trial-0/0"))
    config = DiagnosisConfig(background_sets=1, noise_samples=1, map_kinds=())
    diagnosis = diagnose(
        policy, [sample], tmp_path / "d", teacher=teacher, projectors=Exact(), config=config, progress=False
    )
    row = diagnosis.rows[0]
    assert diagnosis.header["layers"] == [0, 2]
    assert row["alignment_cosine_by_layer"] == [None, pytest.approx(1)]
    assert row["teacher_similarity_by_layer"][1] == pytest.approx(1)
    assert row["teacher_similarity_by_layer"][0] < 0.9


MEASURES = {
    "attention": ("in_mask_ratio", "in_mask_ratio_by_block", "centroid_error", "uniform_in_mask_ratio"),
    "interventions": ("deviation", "tokens_in_mask"),
    "hidden_states": ("teacher_similarity_by_layer", "alignment_cosine_by_layer", "probe_error_by_layer"),
    "imagination": ("psnr", "ssim", "still_psnr"),
}
ARRAYS = {
    "attention": "attention",
    "interventions": "sensitivity_",
    "hidden_states": "pca_layer_",
    "text_attention": "text_attention_",
    "imagination": "imagined",
}


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("policy", set()),
        ("token_policy", {"attention", "text_attention", "imagination"}),
        ("plain_policy", {"attention", "interventions", "hidden_states", "text_attention", "imagination"}),
    ],
)
def test_an_instrument_that_the_method_cannot_offer_is_not_applicable_and_never_zero(
    name, missing, request, make_sample, tmp_path
):
    samples = [make_sample(trial=f"t{i}", seed=i) for i in range(8)]
    config = DiagnosisConfig(background_sets=1, gallery=2)

    def teacher(frames):
        return frames.reshape(len(frames), 4, 4, 5, 4, 3).mean(axis=(2, 4))

    policy = request.getfixturevalue(name)
    diagnose(policy, samples, tmp_path / "d", teacher=teacher, config=config, progress=False)
    read = read_diagnosis(tmp_path / "d")
    assert set(read.header["not_applicable"]) == missing
    for instrument, measures in MEASURES.items():
        assert read.applies(instrument) == (instrument not in missing)
        for row in read.rows:
            absent = [row[measure] is None for measure in measures if measure != "alignment_cosine_by_layer"]
            assert absent == [instrument in missing] * len(absent)
    for instrument, array in ARRAYS.items():
        assert any(key.startswith(array) for key in read.arrays if key != "attention_by_") == (
            instrument not in missing
        )
    assert all(row["action_error"] > 0 for row in read.rows)  # applies to every method
    summary = read.header["summary"]["in_mask_ratio"]
    assert (summary["value"], summary["count"]) == ((None, 0) if "attention" in missing else (pytest.approx(1), 8))


def test_a_diagnosis_of_an_earlier_version_is_read(policy, samples, tmp_path):
    diagnose(policy, samples, tmp_path / "d", config=DiagnosisConfig(gallery=0), progress=False)
    path = tmp_path / "d" / "diagnosis.json"
    header = json.loads(path.read_text())
    del header["not_applicable"], header["method"]
    settings = header["settings"]
    settings["noises"], settings["draws"] = settings.pop("noise_samples"), settings.pop("background_sets")
    path.write_text(json.dumps(header))
    read = read_diagnosis(tmp_path / "d")
    assert read.applies("attention")
    assert read.deviations("zero")[1].shape == (6, 2, 2)
    path.write_text(json.dumps({**header, "format": 1}))
    with pytest.raises(ValueError, match="expected format 2, got 1; diagnose the policy again"):
        read_diagnosis(tmp_path / "d")
