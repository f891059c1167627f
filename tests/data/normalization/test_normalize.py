import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from agra.data.normalization.normalize import AFFINE, NormalizedPart, NormStats


class Rows:
    """Two episodes of a robot whose second state dimension never changes."""

    episodes, missing_keys = range(2), ()

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


@pytest.mark.parametrize("method", AFFINE)
@pytest.mark.parametrize("quantity", ["state", "action"])
def test_inverse(method, quantity):
    stats = NormStats.of([ROWS], method)
    values = ROWS.states(0) if quantity == "state" else ROWS.actions(0)
    normalized = stats.normalize(quantity, values)
    assert normalized.dtype == np.float32
    assert np.abs(stats.unnormalize(quantity, normalized) - values).max() < 1e-6 * np.abs(values).max()
    outside = np.array([[[3.0] * values.shape[1]]])  # any leading axes, any value: nothing is clipped
    moving = [0, 2] if quantity == "state" else [0, 1]
    back = stats.normalize(quantity, stats.unnormalize(quantity, outside))
    assert np.allclose(back[..., moving], 3, atol=1e-5)


def test_ranges():
    low_high = NormStats.of([ROWS], "min_max").normalize("action", ALL_ACTIONS)
    assert np.allclose([low_high.min(0), low_high.max(0)], [[-1, -1], [1, 1]], atol=1e-6)
    standard = NormStats.of([ROWS], "mean_std").normalize("action", ALL_ACTIONS).astype(float)
    assert np.allclose([standard.mean(0), standard.std(0)], [[0, 0], [1, 1]], atol=1e-6)
    quantile = NormStats.of([ROWS], "q01_q99").normalize("action", ALL_ACTIONS)
    assert np.allclose(np.quantile(quantile, [0.01, 0.99], axis=0), [[-1, -1], [1, 1]], atol=1e-5)


@pytest.mark.parametrize("method", AFFINE)
def test_a_constant_dimension_becomes_zero_and_comes_back(method):
    stats = NormStats.of([ROWS], method)
    assert (stats.normalize("state", ROWS.states(1))[:, 1] == 0).all()
    anything = np.random.default_rng(1).normal(size=(4, 3))
    assert np.allclose(stats.unnormalize("state", anything)[:, 1], 0.7)


def test_statistics_equal_numpy():
    stats = NormStats.of([ROWS], "min_max").action
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
    stats = {"arm": NormStats.of([ROWS], "min_max"), "hand": NormStats.of([ROWS], "mean_std")}
    NormStats.save_all(stats, path)
    loaded = NormStats.load_all(path)
    assert list(loaded) == ["arm", "hand"]
    assert (loaded["hand"].method, loaded["hand"].state_dim, loaded["hand"].action_dim) == ("mean_std", 3, 2)
    for name in loaded:
        for quantity, values in (("state", ROWS.states(0)), ("action", ROWS.actions(0))):
            assert np.array_equal(loaded[name].normalize(quantity, values), stats[name].normalize(quantity, values))


def test_errors(tmp_path):
    stats = NormStats.of([ROWS], "min_max")
    with pytest.raises(ValueError, match=r"action: expected 2 dimensions, got shape \(5, 3\)"):
        stats.normalize("action", np.zeros((5, 3)))
    with pytest.raises(ValueError, match="expected one of min_max"):
        NormStats(method="minmax", state={}, action={})  # type: ignore[arg-type]
    path = tmp_path / "norm_stats.json"
    with pytest.raises(FileNotFoundError, match=r"norm_stats\.json: normalisation statistics are missing"):
        NormStats.load_all(path)
    path.write_text(json.dumps({"arm": {"method": "min_max", "state": {}}}))
    with pytest.raises(ValueError, match=r"norm_stats\.json: not normalisation statistics"):
        NormStats.load_all(path)
    ROWS.actions(1)[3, 1], original = np.nan, ROWS.actions(1)[3, 1]
    with pytest.raises(ValueError, match="row 43, dimension 1 is nan"):
        NormStats.of([ROWS], "min_max")
    ROWS.actions(1)[3, 1] = original


class Poses:
    """Angles, a rotation of some type and a length, over two files."""

    episodes = range(2)

    def __init__(self, rotation: str, missing_keys: tuple[str, ...] = (), seed: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.missing_keys = missing_keys
        self.rows = []
        for count in (30, 21):
            turned = Rotation.random(count, rng=rng)
            stored = {
                "axis_angle": turned.as_rotvec(),
                "quaternion": turned.as_quat(canonical=True, scalar_first=True),
                "matrix": turned.as_matrix().reshape(-1, 9),
                "euler_angles_rpy": turned.as_euler("XYZ"),
                "rotation_6d": turned.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6),
            }[rotation]
            angles, length = rng.uniform(-np.pi, np.pi, (count, 2)), rng.normal(0.3, 0.1, (count, 1))
            self.rows.append(np.concatenate([angles, stored, length], 1).astype(np.float32))

    def states(self, episode: int) -> np.ndarray:
        return self.rows[episode]

    actions = states


def pose_parts(rotation: str, size: int) -> tuple[NormalizedPart, ...]:
    return (
        NormalizedPart(name="joints", start=0, end=2, method="sin_cos"),
        NormalizedPart(name="wrist", start=2, end=2 + size, method="rot6d", rotation=rotation),
        NormalizedPart(name="length", start=2 + size, end=3 + size, method="mean_std"),
    )


@pytest.mark.parametrize(
    ("rotation", "size"),
    [("axis_angle", 3), ("quaternion", 4), ("matrix", 9), ("euler_angles_rpy", 3), ("rotation_6d", 6)],
)
def test_angles_and_rotations_come_back(rotation, size, tmp_path):
    rows, parts = Poses(rotation), pose_parts(rotation, size)
    stats = NormStats.of([rows], "min_max", state_parts=parts, action_parts=parts)
    assert (stats.action_dim, stats.width("action")) == (3 + size, 4 + 6 + 1)
    values = np.concatenate(rows.rows)
    encoded = stats.normalize("action", values)
    assert encoded.shape == (51, 11)
    np.testing.assert_allclose(
        encoded[:, :4], np.concatenate([np.sin(values[:, :2]), np.cos(values[:, :2])], 1), atol=1e-6
    )
    columns = encoded[:, 4:10].reshape(-1, 2, 3)
    np.testing.assert_allclose(columns @ columns.transpose(0, 2, 1), np.broadcast_to(np.eye(2), (51, 2, 2)), atol=1e-5)
    assert abs(encoded[:, 10].std() - 1) < 1e-5
    back = stats.unnormalize("action", encoded)
    np.testing.assert_allclose(back, values, atol=2e-6)  # float32 rounding of angles up to pi
    NormStats.save_all({"arm": stats}, tmp_path / "s.json")
    again = NormStats.load_all(tmp_path / "s.json")["arm"]
    assert again.action_parts == parts
    np.testing.assert_array_equal(again.normalize("state", values), encoded)


def test_a_rotation_is_the_first_two_columns_of_its_matrix():
    """A quarter turn about z, by hand: x goes to y, y to -x."""
    part = NormalizedPart(name="r", start=0, end=3, method="rot6d", rotation="axis_angle")
    decoded = part.encode(np.array([[0, 0, np.pi / 2]]), {})
    np.testing.assert_allclose(decoded, [[0, 1, 0, -1, 0, 0]], atol=1e-7)
    euler = NormalizedPart(name="r", start=0, end=3, method="rot6d", rotation="euler_angles_rpy")
    roll, yaw = 0.3, 0.5  # Rx(roll) @ Rz(yaw): its first column is (cos yaw, cos roll sin yaw, sin roll sin yaw)
    expected = [np.cos(yaw), np.cos(roll) * np.sin(yaw), np.sin(roll) * np.sin(yaw)]
    np.testing.assert_allclose(euler.encode(np.array([[roll, 0, yaw]]), {})[0, :3], expected, atol=1e-6)


def test_gram_schmidt_takes_what_is_no_rotation():
    part = NormalizedPart(name="r", start=0, end=9, method="rot6d", rotation="matrix")
    decoded = part.decode(np.array([[2.0, 0, 0, 1, 3, 0]]), {}).reshape(3, 3)
    np.testing.assert_allclose(decoded, np.eye(3), atol=1e-6)


def test_a_missing_part_enters_no_statistics():
    whole, incomplete = Poses("axis_angle"), Poses("axis_angle", missing_keys=("length",), seed=4)
    for rows in incomplete.rows:
        rows[:, 5] = 0
    parts = pose_parts("axis_angle", 3)
    stats = NormStats.of([whole, incomplete], "min_max", state_parts=parts, action_parts=parts)
    alone = np.concatenate(whole.rows).astype(float)[:, 5]
    np.testing.assert_allclose([stats.action["mean"][5], stats.action["std"][5]], [alone.mean(), alone.std()])
    assert stats.action["min"][0] == min(rows[:, 0].min() for rows in whole.rows + incomplete.rows)
    assert stats.mask("action", incomplete.missing_keys).tolist() == [True] * 10 + [False]
    with pytest.raises(ValueError, match="'length' is missing from every dataset"):
        NormStats.of([incomplete], "min_max", state_parts=parts, action_parts=parts)


def test_parts_are_checked():
    with pytest.raises(ValueError, match="rot6d needs a rotation_type"):
        NormalizedPart(name="wrist", start=0, end=3, method="rot6d")
    with pytest.raises(ValueError, match="expected 4 dimensions for rotation_type quaternion, got 3"):
        NormalizedPart(name="wrist", start=0, end=3, method="rot6d", rotation="quaternion")
    with pytest.raises(ValueError, match="rotation type: expected one of"):
        NormalizedPart(name="wrist", start=0, end=3, method="rot6d", rotation="euler_angles_xyw")


def test_imports_no_torch():
    code = "import sys, agra.data.normalization.normalize; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
