"""Messages round-trip. Any other bytes raise WireError and take little memory."""

import io
import random
import tracemalloc

import msgpack
import numpy as np
import pytest

from agra.serving.protocol.wire import MAX_CONTAINERS, WireError, pack, pack_groot, unpack, unpack_groot

ARRAYS = [
    np.arange(12, dtype=np.uint8).reshape(3, 4),
    np.linspace(0, 1, 5),
    np.zeros((2, 0, 3), np.int64),
    np.array(2.5, np.float32),
    np.array([True, False]),
]
PAIRS = [(pack, unpack), (pack_groot, unpack_groot)]


@pytest.mark.parametrize(("to_bytes", "from_bytes"), PAIRS)
@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_arrays_come_back_equal_and_read_only(to_bytes, from_bytes, array):
    decoded = from_bytes(to_bytes({"a": array, "rest": [1, 2.5, None, True, "text"]}))
    assert decoded["a"].dtype == array.dtype
    assert np.array_equal(decoded["a"], array)
    assert not decoded["a"].flags.writeable
    assert decoded["rest"] == [1, 2.5, None, True, "text"]


def test_numpy_scalars_keep_their_type():
    decoded = unpack(pack({"x": np.float32(1.5), "n": np.int64(3)}))
    assert decoded == {"x": 1.5, "n": 3}
    assert decoded["x"].dtype == np.float32


@pytest.mark.parametrize("array", [*ARRAYS, np.asfortranarray(np.arange(6).reshape(2, 3))], ids=str)
def test_groot_arrays_are_npy_files(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    sent = msgpack.packb({"__ndarray_class__": True, "as_npy": file.getvalue()})
    assert np.array_equal(unpack_groot(sent), array)
    ours = msgpack.unpackb(pack_groot(array))["as_npy"]
    assert np.array_equal(np.load(io.BytesIO(ours), allow_pickle=False), array)


def _openpi(**changes):
    entries = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb(entries | {key.encode(): value for key, value in changes.items()})


def _object_array():
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    return msgpack.packb({"__ndarray_class__": True, "as_npy": file.getvalue()})


HOSTILE = {
    "empty": b"",
    "truncated": b"\x82\xa1a",
    "trailing bytes": b"\xc0\xc0",
    "four billion entries": b"\xdd\xff\xff\xff\xff",
    "four gigabytes": b"\xc6\xff\xff\xff\xff",
    "deeply nested": b"\x91" * 5000,
    "invalid text": b"\xa1\xff",
    "a number as key": b"\x81\x01\x01",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "never used byte": b"\xc1",
    "many empty lists": b"\xdc\x00\xff" + (b"\xdc\x00\xff" + b"\x90" * 255) * 255,
    "shape beyond the data": _openpi(shape=[2**30, 2**30]),
    "negative shape": _openpi(shape=[-2]),
    "shape of bools": _openpi(shape=[True, 2]),
    "shape as text": _openpi(shape="2"),
    "many axes": _openpi(shape=[1] * 9 + [2]),
    "objects": _openpi(dtype="|O"),
    "void": _openpi(dtype="|V8"),
    "records": _openpi(dtype="f4,f4"),
    "a dtype of a gigabyte": _openpi(dtype="S1000000000"),
    "dtype not a text": _openpi(dtype=7),
    "data as text": _openpi(data="xxxxxxxx"),
    "scalar of text": msgpack.packb({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}),
    "scalar too large": msgpack.packb({b"__npgeneric__": True, b"data": 2**40, b"dtype": "|u1"}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_refused_in_little_memory(data):
    tracemalloc.start()
    with pytest.raises(WireError):
        unpack(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21 + 20 * len(data)


@pytest.mark.parametrize(
    "npy",
    [b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16, b"\x93NUMPY\x02\x00", 7, "text"],
    ids=str,
)
def test_groot_refuses_other_files(npy):
    with pytest.raises(WireError, match=r"numpy.save"):
        unpack_groot(msgpack.packb({"__ndarray_class__": True, "as_npy": npy}))


def test_groot_refuses_pickled_objects():
    with pytest.raises(WireError, match=r"dtype|numpy.save"):
        unpack_groot(_object_array())


def test_containers_are_counted():
    assert len(unpack(pack([[]] * 200))) == 200
    with pytest.raises(WireError, match=f"at most {MAX_CONTAINERS} maps and lists"):
        unpack(pack([[[]] * 200] * 3))


def test_unsupported_values_are_refused():
    for value in (object(), {1, 2}, np.array([1j]), np.array(["a"]), np.array([None])):
        with pytest.raises(TypeError, match="cannot be sent"):
            pack({"x": value})


@pytest.mark.parametrize(("to_bytes", "from_bytes"), PAIRS)
def test_damaged_messages_raise_no_other_error(to_bytes, from_bytes):
    rng = random.Random(0)
    whole = to_bytes({"frame": np.zeros((8, 8, 3), np.uint8), "state": np.ones(3), "prompt": "go", "n": [1, {}]})
    read = 0
    for _ in range(4000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
        try:
            from_bytes(data)
            read += 1
        except WireError:
            pass
    assert 0 < read < 4000
