import json
import subprocess
import sys

import numpy as np
import pytest

from agra.data.normalize import METHODS, NormStats


class Rows:
    """Two episodes of a robot whose second state dimension never changes."""

    num_episodes = 2

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._states = [rng.normal(3, 2, (n, 3)).astype(np.float32) for n in (40, 25)]
        for states in self._states:
            states[:, 1] = 0.7
        self._actions = [rng.uniform(-2, 5, (n, 2)).astype(np.float32) for n in (40, 25)]

    def states(self, episode: int) -> np.ndarray:
        return self._states[episode]

    def actions(self, episode: int) -> np.ndarray:
        return self._actions[episode]


ROWS = Rows()
ALL_ACTIONS = np.concatenate([ROWS.actions(0), ROWS.actions(1)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantity", ["state", "action"])
def test_inverse(method, quantity):
    stats = NormStats.of(ROWS, method)
    values = ROWS.states(0) if quantity == "state" else ROWS.actions(0)
    normalized = stats.normalize(quantity, values)
    assert normalized.dtype == np.float32
    assert np.abs(stats.unnormalize(quantity, normalized) - values).max() < 1e-6 * np.abs(values).max()
    outside = np.array([[[3.0] * values.shape[1]]])  # any leading axes, any value: nothing is clipped
    moving = [0, 2] if quantity == "state" else [0, 1]
    back = stats.normalize(quantity, stats.unnormalize(quantity, outside))
    assert np.allclose(back[..., moving], 3, atol=1e-5)


def test_ranges():
    low_high = NormStats.of(ROWS, "min_max").normalize("action", ALL_ACTIONS)
    assert np.allclose([low_high.min(0), low_high.max(0)], [[-1, -1], [1, 1]], atol=1e-6)
    standard = NormStats.of(ROWS, "mean_std").normalize("action", ALL_ACTIONS).astype(float)
    assert np.allclose([standard.mean(0), standard.std(0)], [[0, 0], [1, 1]], atol=1e-6)
    quantile = NormStats.of(ROWS, "q01_q99").normalize("action", ALL_ACTIONS)
    assert np.allclose(np.quantile(quantile, [0.01, 0.99], axis=0), [[-1, -1], [1, 1]], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_dimension_becomes_zero_and_comes_back(method):
    stats = NormStats.of(ROWS, method)
    assert (stats.normalize("state", ROWS.states(1))[:, 1] == 0).all()
    anything = np.random.default_rng(1).normal(size=(4, 3))
    assert np.allclose(stats.unnormalize("state", anything)[:, 1], 0.7)


def test_statistics_equal_numpy():
    stats = NormStats.of(ROWS, "min_max").action
    exact = ALL_ACTIONS.astype(np.float64)
    expected = {
        "min": exact.min(0),
        "max": exact.max(0),
        "mean": exact.mean(0),
        "std": exact.std(0),
        "q01": np.quantile(exact, 0.01, axis=0),
        "q99": np.quantile(exact, 0.99, axis=0),
        "count": [65],
    }
    for name, value in expected.items():
        assert np.array_equal(stats[name], value), name


def test_json_round_trip(tmp_path):
    path = tmp_path / "norm_stats.json"
    stats = {"arm": NormStats.of(ROWS, "min_max"), "hand": NormStats.of(ROWS, "mean_std")}
    NormStats.save_all(stats, path)
    loaded = NormStats.load_all(path)
    assert list(loaded) == ["arm", "hand"]
    assert (loaded["hand"].method, loaded["hand"].state_dim, loaded["hand"].action_dim) == ("mean_std", 3, 2)
    for name in loaded:
        for quantity, values in (("state", ROWS.states(0)), ("action", ROWS.actions(0))):
            assert np.array_equal(loaded[name].normalize(quantity, values), stats[name].normalize(quantity, values))


def test_errors(tmp_path):
    stats = NormStats.of(ROWS, "min_max")
    with pytest.raises(ValueError, match=r"action: expected 2 dimensions, got an array of \(5, 3\)"):
        stats.normalize("action", np.zeros((5, 3)))
    with pytest.raises(ValueError, match="expected one of min_max"):
        NormStats(method="minmax", state={}, action={})  # type: ignore[arg-type]
    path = tmp_path / "norm_stats.json"
    with pytest.raises(FileNotFoundError, match=r"norm_stats\.json: normalisation statistics are missing"):
        NormStats.load_all(path)
    path.write_text(json.dumps({"arm": {"method": "min_max", "state": {}}}))
    with pytest.raises(ValueError, match=r"norm_stats\.json: not normalisation statistics"):
        NormStats.load_all(path)
    ROWS.actions(1)[3, 1], kept = np.nan, ROWS.actions(1)[3, 1]
    with pytest.raises(ValueError, match="row 43, dimension 1 is nan"):
        NormStats.of(ROWS, "min_max")
    ROWS.actions(1)[3, 1] = kept


def test_imports_no_torch():
    code = "import sys, agra.data.normalize; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
