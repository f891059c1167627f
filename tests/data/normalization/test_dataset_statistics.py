import numpy as np
import pytest

from agra.data.normalization.dataset_statistics import describe, describe_stream

LENGTHS = (3, 40, 1, 7, 200, 13)


def chunks(dtype, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.normal(-1, 30, (n, 4)) * [1, 1e-3, 1e5, 1] for n in LENGTHS]
    for part in rows:
        part[:, 3] = np.round(part[:, 3] / 20)  # many ties, zero among them
    return [part.astype(dtype) for part in rows]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("block_rows", [1, 30, 10**6])
def test_streaming_equals_numpy_on_the_whole_set(dtype, block_rows):
    parts = chunks(dtype)
    whole = np.concatenate(parts).astype(np.float64)
    statistics = describe_stream(lambda: iter(parts), block_rows=block_rows)
    for name, q in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        np.testing.assert_array_equal(statistics[name], np.quantile(whole, q, axis=0), name)
    np.testing.assert_array_equal(statistics["min"], whole.min(0))
    np.testing.assert_array_equal(statistics["max"], whole.max(0))
    np.testing.assert_allclose(statistics["mean"], whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics["std"], whole.std(0), rtol=1e-12)
    assert statistics["count"].tolist() == [sum(LENGTHS)]


def test_one_block_is_described_directly():
    parts = chunks(np.float32)
    direct = describe(np.concatenate(parts))
    for name, value in describe_stream(lambda: iter(parts)).items():
        np.testing.assert_array_equal(value, direct[name])


def test_order_of_chunks_changes_no_quantile():
    parts = chunks(np.float32)
    one = describe_stream(lambda: iter(parts), block_rows=10)
    other = describe_stream(lambda: iter(parts[::-1]), block_rows=50)
    assert all(np.array_equal(one[name], other[name]) for name in ("min", "max", "q01", "q50", "q99"))


def test_what_is_not_finite_is_named_by_its_row_in_the_whole():
    parts = chunks(np.float32)
    parts[3][2, 1] = np.inf
    with pytest.raises(ValueError, match="row 46, dimension 1 is inf"):
        describe_stream(lambda: iter(parts), block_rows=10)
    with pytest.raises(ValueError, match="need rows"):
        describe_stream(lambda: iter(()))
