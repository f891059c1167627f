"""Properties of the code that reads untrusted bytes, files and metadata: valid input is read, and any other input raises an
expected error with one line of text.

Each property is a strategy and a check. The quick tests draw a few examples from a fixed seed. `python -m tests.fuzz` draws new
ones for an hour.
"""

import asyncio
import copy
import functools
import json
import math
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from agra import files
from agra.checkpoints.folder import verify
from agra.checkpoints.read import check_statistics, part_tensors, read_config, reading
from agra.data.config import SourceConfig
from agra.data.doctor.doctor import check_dataset
from agra.data.gr1 import gr1_source
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.normalization.dataset_statistics import describe
from agra.data.normalization.normalize import NormStats
from agra.diagnostics.samples.masks import read_masks
from agra.diagnostics.samples.probe_sample import ProbeSample, load_samples, save_samples
from agra.policies.load import load_method
from agra.serving.protocol.messages import InferRequest, WireKeys, encode_request, read_description
from agra.serving.protocol.validation import RequestError, parse_request
from agra.serving.protocol.wire import WireError, pack, pack_groot, unpack, unpack_groot
from agra.serving.protocol.zmtp import COMMAND, GREETING, LONG, MORE, Peer, ProtocolError
from agra.serving.server.config import GrootWire
from agra.serving.server.groot_messages import flatten, parse_observations
from agra.types import EmbodimentSpec, Observation, PolicySpec
from agra.weights import write_tensors
from tests.support.layouts import CAMERAS, write_gr1, write_v2, write_v3
from tests.support.small import make_small_config

EXPECTED_ERRORS = (ValueError, OSError)
"""Errors that the command line prints as one line."""


@dataclass(frozen=True)
class Property:
    """A check that must pass for every example of a strategy."""

    strategy: SearchStrategy
    check: Callable[[Any], None]


def _check_message(error: Exception, name: str = "") -> None:
    """Assert that an error has a text with the file's name."""
    assert str(error)
    assert name in str(error)


@functools.cache
def scratch_folder() -> Path:
    """A folder of this process for the files of the examples."""
    return Path(tempfile.mkdtemp(prefix="agra-fuzz-"))


# --- values ------------------------------------------------------------------------------------------------------------

NASTY = (
    -1,
    0,
    1,
    2**31,
    2**53,
    2**63,
    2**64 - 1,
    10**30,
    1e308,
    -0.0,
    math.inf,
    math.nan,
    "",
    "../..",
    "/etc/passwd",
    "\0",
    "ä",
)
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(NASTY),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: Any, content: Any) -> Any:
    """JSON content with one to three of its values replaced, removed, duplicated or added."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        place, parent = content, None
        while isinstance(place, dict | list) and place and (parent is None or draw(st.integers(0, 3))):
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            parent, place = (place, key), place[key]
        if parent is None:
            return draw(json_values)
        container, key = parent
        action = draw(st.sampled_from(("replace", "replace", "remove", "add", "double")))
        if action == "remove":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[draw(st.text(max_size=6))] = draw(json_values)
        elif action == "double" and isinstance(container, list):
            container.append(copy.deepcopy(place))
        else:
            container[key] = draw(json_values)
    return content


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes with some of them changed, truncated, removed or inserted."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        action = draw(st.sampled_from(("set", "set", "cut", "remove", "insert")))
        if action == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif action == "cut":
            del content[at:]
        elif action == "remove":
            del content[at : at + draw(st.integers(1, 9))]
        else:
            content[at:at] = draw(st.binary(max_size=9))
    return bytes(content)


# --- protocols --------------------------------------------------------------------------------------------------------

ROBOT = EmbodimentSpec(state={"arm": (0, 3), "hand": (3, 4)}, action={"arm": (0, 3)})
SPEC = PolicySpec(name="policy", horizon=5, frame_size=(32, 48), embodiments={"robot": ROBOT}, imagines=True)
OBSERVATION = Observation(
    frame=np.zeros((16, 16, 3), np.uint8), state=np.zeros(4, np.float32), instruction="go", embodiment="robot"
)
REQUEST = encode_request(InferRequest(observation=OBSERVATION, seed=1, request_id=3), WireKeys(), SPEC)
GROOT = {
    "video.ego_view": OBSERVATION.frame[None], "state.arm": np.zeros((1, 3), np.float32), "state.hand": np.zeros((1, 1), np.float32),
    "annotation.human.action.task_description": ["go"],
}  # fmt: skip
NPY = {"__ndarray_class__": True, "as_npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', "}
packed_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=12), st.binary(max_size=40),
        st.just({b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}),
        st.just({b"__npgeneric__": True, b"data": 3, b"dtype": "<f8"}), st.just(NPY),
        st.builds(
            lambda dtype, shape, data: {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape},
            st.sampled_from(("<f4", "|O", "<f8", "|u1", "<M8", "f", "", None, 3)),
            st.lists(st.integers(-2, 2**33), max_size=10) | st.none(), st.binary(max_size=64),
        ),
    ),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8) | st.binary(max_size=8) | st.sampled_from(sorted(REQUEST)), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def _replaced(message: dict, pack_one: Callable[[Any], bytes]) -> SearchStrategy[bytes]:
    """A valid message with one value replaced."""
    return st.builds(
        lambda key, value: pack_one(dict(message)) if key is None else _packed({**message, key: value}, pack_one),
        st.sampled_from([None, *message, "seed", "continuation", "imagine", "embodiment", "data"]), packed_values,
    )  # fmt: skip


def _packed(message: Any, pack_one: Callable[[Any], bytes]) -> bytes:
    try:
        return pack_one(message)
    except (TypeError, ValueError, OverflowError):
        return msgpack.packb(str(message))


def check_openpi(data: bytes) -> None:
    """A frame is a valid request of the policy, or raises WireError or RequestError."""
    try:
        message = unpack(data)
        request = parse_request(message, SPEC, WireKeys())
    except (WireError, RequestError):
        return
    assert request.observation.state.shape == (4,)
    assert np.isfinite(request.observation.state).all()
    assert request.observation.frame.dtype == np.uint8


def check_description(data: bytes) -> None:
    """A server's first message is a description of a policy, or raises ValueError."""
    try:
        read_description(unpack(data))
    except ValueError:
        return


def check_groot(data: bytes) -> None:
    """A message of GR00T's protocol holds valid observations, or raises WireError or RequestError."""
    try:
        message = unpack_groot(data)
        if not isinstance(message, dict):
            return
        observations, _ = parse_observations(flatten(message), ROBOT, "robot", GrootWire())
    except (WireError, RequestError):
        return
    assert all(np.isfinite(observation.state).all() for observation in observations)


class _Sink:
    """A writer that drops everything."""

    def write(self, data: bytes) -> None:
        """Do nothing."""

    async def drain(self) -> None:
        """Do nothing."""


def check_zmtp(data: bytes) -> None:
    """ZMTP bytes are requests of at most the allowed size, until ProtocolError or the end."""

    async def serve() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        peer = Peer(reader, _Sink(), max_message=1000)  # type: ignore[arg-type]
        await peer.handshake()
        while True:
            size = await peer.header()
            assert size <= 1000
            assert len(await peer.body(size)) == size

    try:
        asyncio.run(serve())
    except (ProtocolError, EOFError):
        return


def _frame(flags: int, contents: bytes) -> bytes:
    return bytes([flags | LONG]) + struct.pack(">Q", len(contents)) + contents


HELLO = GREETING + _frame(COMMAND, b"\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ")
TALK = HELLO + (_frame(MORE, b"") + _frame(0, b"request")) * 2 + _frame(COMMAND, b"\x04PING\x00\x64x")


# --- checkpoints -------------------------------------------------------------------------------------------------------


@functools.cache
def small_checkpoint() -> Path:
    """A checkpoint of a small model."""
    folder, config = scratch_folder() / "checkpoint", make_small_config()
    folder.mkdir()
    with torch.device("meta"):
        method = config.method.to_act().build()
    for part, module in method.parts().items():
        tensors = {name: torch.zeros(value.shape) for name, value in part_tensors({part: module}).items()}
        write_tensors(folder / f"{part}.safetensors", tensors)
    files.write_text(folder / "config.json", config.to_json())
    files.write_text(folder / "trainer.json", '{"step": 1}')
    described = [describe(np.random.default_rng(0).normal(size=(9, size))) for size in (5, 3)]
    stats = NormStats(method="min_max", state=described[0], action=described[1])
    NormStats.save_all({"tabletop": stats}, folder / "norm_stats.json")
    return folder


def _load_changed(changes: dict[str, bytes]) -> None:
    folder = small_checkpoint()
    originals = {name: (folder / name).read_bytes() for name in changes if (folder / name).is_file()}
    try:
        for name, content in changes.items():
            (folder / name).write_bytes(content)
        if "manifest.json" not in changes:
            names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
            files.write_text(folder / "manifest.json", json.dumps({n: files.sha256(folder / n) for n in names}))
        with reading(folder):
            verify(folder)
            config = read_config(folder)
            stats = NormStats.load_all(folder / "norm_stats.json")
            check_statistics(stats, config, folder)
            load_method(folder, config)
    except EXPECTED_ERRORS as error:
        _check_message(error)
    finally:
        for name in changes:
            (folder / name).unlink(missing_ok=True)
        for name, content in originals.items():
            (folder / name).write_bytes(content)


def _json_file(name: str) -> SearchStrategy[dict[str, bytes]]:
    content = json.loads((small_checkpoint() / name).read_text())
    return changed(content).map(lambda value: {name: json.dumps(value).encode()})


def _header(content: bytes) -> dict[str, bytes]:
    return {"model.safetensors": content}


checkpoints = st.one_of(
    _json_file("config.json"),
    _json_file("norm_stats.json"),
    changed({"config.json": "0" * 64, "model.safetensors": "1" * 64}).map(lambda v: {"manifest.json": json.dumps(v).encode()}),
    st.binary(max_size=60).map(lambda data: {"config.json": data}),
    st.builds(lambda size, rest: _header(struct.pack("<Q", size) + rest), st.integers(0, 2**64 - 1), st.binary(max_size=80)),
    changed({"w": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}}).map(
        lambda v: _header(struct.pack("<Q", len(json.dumps(v))) + json.dumps(v).encode() + bytes(8))
    ),
)  # fmt: skip


# --- datasets ----------------------------------------------------------------------------------------------------------

KINDS = {"v2.1": lambda root: write_v2(root, "v2.1"), "v3.0": write_v3, "gr1": write_gr1}


@functools.cache
def dataset(kind: str) -> Path:
    """A small dataset of a kind."""
    root = scratch_folder() / kind
    KINDS[kind](root)
    return root


def _metadata(kind: str) -> list[str]:
    root = dataset(kind)
    return sorted(p.relative_to(root).as_posix() for p in (root / "meta").rglob("*.json*"))


@st.composite
def changed_dataset(draw: Any) -> tuple[str, str, bytes]:
    """A kind, the name of one of its metadata files, and changed contents of that file."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    name = draw(st.sampled_from(_metadata(kind)))
    content = (dataset(kind) / name).read_text()
    if draw(st.integers(0, 9)) == 0:
        return kind, name, draw(damaged(content.encode()))
    if name.endswith(".json"):
        return kind, name, json.dumps(draw(changed(json.loads(content)))).encode()
    lines = content.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(draw(changed(json.loads(lines[at]))))
    return kind, name, "\n".join(lines).encode()


def check_dataset_metadata(drawn: tuple[str, str, bytes]) -> None:
    """A dataset is read, or raises an expected error. The doctor raises nothing at all."""
    kind, name, content = drawn
    root = dataset(kind)
    original = (root / name).read_bytes()
    (root / name).write_bytes(content)
    try:
        source = gr1_source("") if kind == "gr1" else SourceConfig(camera=CAMERAS[0])
        try:
            opened = LeRobotDataset(root, source=source)
            for index in range(min(opened.num_episodes, 3)):
                assert np.isfinite(opened.states(index)).all()
                opened.instruction(index)
        except EXPECTED_ERRORS as error:
            _check_message(error)
        check_dataset(root)
    finally:
        (root / name).write_bytes(original)


# --- annotations and samples -------------------------------------------------------------------------------------------

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 10}],
    "categories": [{"id": 1, "name": "hand"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 8, 1, 8, 9]]},
        {"id": 3, "image_id": 1, "category_id": 1, "segmentation": {"size": [12, 10], "counts": [20, 30, 70]}},
        {"id": 4, "image_id": 1, "category_id": 1, "segmentation": {"size": [12, 10], "counts": "Q1[2"}},
    ],
}
LABELME = {
    "imagePath": "a.png", "imageHeight": 12, "imageWidth": 10,
    "shapes": [
        {"label": "hand", "points": [[1, 1], [8, 1], [8, 9]], "shape_type": "polygon"},
        {"label": "hand", "points": [[1, 1], [3, 3]], "shape_type": "circle"},
    ],
}  # fmt: skip
CVAT = (
    b'<annotations><version>1.1</version><image id="0" name="a.png" width="10" height="12">'
    b'<polygon label="hand" points="1,1;8,1;8,9"/><box label="hand" xtl="1" ytl="1" xbr="3" ybr="3"/>'
    b'<ellipse label="hand" cx="4" cy="4" rx="2" ry="3"/><mask label="hand" rle="1,2,5" left="1" top="1" width="4" height="2"/>'
    b"</image></annotations>"
)
annotations = st.one_of(
    changed(COCO).map(lambda v: ("a.json", json.dumps(v).encode())),
    changed(LABELME).map(lambda v: ("a.json", json.dumps(v).encode())),
    damaged(json.dumps(COCO).encode()).map(lambda v: ("a.json", v)),
    damaged(CVAT).map(lambda v: ("a.xml", v)),
)


def check_annotations(drawn: tuple[str, bytes]) -> None:
    """Annotations are masks by name, or raise an expected error with the file's name."""
    path = scratch_folder() / drawn[0]
    path.write_bytes(drawn[1])
    try:
        for name, mask in read_masks(path).items():
            assert isinstance(name, str)
            assert mask.dtype == np.bool_
    except EXPECTED_ERRORS as error:
        _check_message(error, path.name)


@functools.cache
def samples() -> Path:
    """A folder of two probe samples."""
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    one = ProbeSample(
        trial="t", step=0, regime="semantic", instruction="go", embodiment="hands", state=np.zeros(3, np.float32),
        frames=frames, masks=np.zeros(frames.shape[:-1], bool),
    )  # fmt: skip
    save_samples([one, one], scratch_folder() / "samples")
    return scratch_folder() / "samples"


SAMPLES = {
    "samples": [
        {"trial": "t", "step": 0, "regime": "semantic", "instruction": "go", "embodiment": "hands"} for _ in range(2)
    ]
}


def check_samples(content: Any) -> None:
    """A folder of samples is read, or raises an expected error with its name."""
    (samples() / "samples.json").write_text(json.dumps(content))
    try:
        load_samples(samples())
    except EXPECTED_ERRORS as error:
        _check_message(error, "samples")


PROPERTIES = {
    "websocket requests": Property(
        st.binary(max_size=200) | damaged(pack(REQUEST)) | _replaced(REQUEST, pack), check_openpi
    ),
    "policy descriptions": Property(packed_values.map(lambda v: _packed(v, pack)), check_description),
    "GR00T's requests": Property(
        st.binary(max_size=200) | damaged(pack_groot(GROOT)) | _replaced(GROOT, pack_groot), check_groot
    ),
    "ZeroMQ frames": Property(damaged(TALK) | st.binary(max_size=300).map(lambda b: HELLO + b), check_zmtp),
    "checkpoint files": Property(checkpoints, _load_changed),
    "dataset metadata": Property(changed_dataset(), check_dataset_metadata),
    "annotations": Property(annotations, check_annotations),
    "probe samples": Property(changed(SAMPLES), check_samples),
}
