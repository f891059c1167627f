import numpy as np
import pytest

from agra.diagnostics.instruments.hidden_states import held_out_mean, mean_cosine, probed_positions, teacher_similarity


def test_similarity_knows_rotation_and_scale_from_chance():
    random = np.random.default_rng(0)
    tokens = random.normal(size=(40, 16)) * np.geomspace(1, 0.05, 16)
    turn, _ = np.linalg.qr(random.normal(size=(16, 16)))
    assert teacher_similarity(tokens, 7 * tokens @ turn + 3) == pytest.approx(1)
    chance = [teacher_similarity(random.normal(size=(40, 300)), random.normal(size=(40, 300))) for _ in range(50)]
    assert abs(np.mean(chance)) < 0.02  # without the correction it is about 0.88
    noisy = [teacher_similarity(tokens, tokens + noise * random.normal(size=tokens.shape)) for noise in (0.1, 0.5, 2)]
    assert noisy == sorted(noisy, reverse=True)
    assert np.isnan(teacher_similarity(np.ones((5, 3)), tokens[:5]))
    with pytest.raises(ValueError, match="at least 4"):
        teacher_similarity(tokens[:3], tokens[:3])


def test_mean_cosine():
    assert mean_cosine(np.array([[2.0, 0], [0, 1]]), np.array([[1.0, 0], [0, -5]])) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        mean_cosine(np.ones((2, 3)), np.ones((2, 4)))


def test_a_probe_finds_what_is_linear_and_is_held_out_by_group():
    random = np.random.default_rng(1)
    positions = random.uniform(0, 4, (60, 2))
    features = positions @ random.normal(size=(2, 200)) + 0.05 * random.normal(size=(60, 200))
    groups = [f"t{i // 2}" for i in range(60)]
    error = np.linalg.norm(probed_positions(features, positions, groups) - positions, axis=1)
    blind = np.linalg.norm(held_out_mean(positions, groups) - positions, axis=1)
    assert error.mean() < 0.1 * blind.mean()
    nothing = np.linalg.norm(probed_positions(random.normal(size=(60, 200)), positions, groups) - positions, axis=1)
    assert nothing.mean() > 0.9 * blind.mean()
    np.testing.assert_allclose(held_out_mean(positions, groups)[0], positions[2:].mean(axis=0))
    with pytest.raises(ValueError, match="two trials"):
        probed_positions(features, positions, ["a"] * 60)
