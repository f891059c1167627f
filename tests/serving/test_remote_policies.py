"""Policies on servers of other projects: encoding, key mappings, and evaluation on stand-in servers of both protocols."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from agra.evaluation.protocols import Protocol, regime_trials
from agra.evaluation.rollout import evaluate
from agra.serving.client import ServerLost, ServerRefused
from agra.serving.protocol.wire import pack, pack_groot, unpack, unpack_groot
from agra.serving.remote_policies import (
    KEY_MAPPINGS,
    GrootPolicy,
    KeyMapping,
    OpenpiPolicy,
    connect_policy,
    decode_actions,
    encode_observation,
    read_key_mapping,
    resize_with_pad,
)
from agra.types import Observation
from tests.support.point_world import PointWorld

OPENPI = KeyMapping(
    wire="openpi",
    images={"observation/image": "frame"},
    state={"observation/x": (0, 1), "observation/y": (1, 2)},
    actions={"actions": (0, 2)},
    instruction="prompt",
)
GROOT = KeyMapping(
    wire="groot",
    images={"video.ego_view": "frame"},
    state={"state.x": (0, 1), "state.y": (1, 2)},
    actions={"action.y": (1, 2), "action.x": (0, 1)},
    instruction="annotation.human.coarse_action",
)


def make_observation(size=(32, 48), views=()):
    frame = np.arange(np.prod(size) * 3, dtype=np.uint8).reshape(*size, 3)
    state = np.array([0.25, 0.75], np.float32)
    return Observation(
        frame=frame, state=state, instruction="go", embodiment="dot", views=dict.fromkeys(views, frame[::-1])
    )


def test_openpi_request():
    message = encode_observation(make_observation(), OPENPI)
    assert set(message) == {"observation/image", "observation/x", "observation/y", "prompt"}
    assert np.array_equal(message["observation/image"], make_observation().frame)
    assert (message["observation/y"], message["prompt"]) == (np.float32(0.75), "go")
    mapping = replace(OPENPI, images={"image": "wrist"}, image_size=(24, 24), constants={"task": 3})
    with pytest.raises(ValueError, match="the server expects 'wrist' as image, the simulator has frame"):
        encode_observation(make_observation(), mapping)
    message = encode_observation(make_observation(views=["wrist"]), mapping)
    assert (message["image"].shape, message["task"]) == ((24, 24, 3), 3)


def test_groot_request_has_a_time_axis():
    message = encode_observation(make_observation(), GROOT)
    assert message["video.ego_view"].shape == (1, 32, 48, 3)
    assert message["state.x"].tolist() == [[0.25]]
    assert message["annotation.human.coarse_action"] == ["go"]


def test_actions_are_put_in_our_order():
    chunk = decode_actions({"action.x": np.full((3, 1), 1.0), "action.y": np.full((3, 4), 2.0)}, GROOT)
    assert chunk.actions.tolist() == [[1, 2]] * 3
    n16 = decode_actions([{"action.x": np.ones((3, 1)), "action.y": np.ones((3, 1))}, {}], GROOT)
    assert n16.actions.shape == (3, 2)
    with pytest.raises(
        ServerRefused, match=r"action.y: expected \(K, 1\) numbers from the policy server, got NoneType"
    ):
        decode_actions({"action.x": np.ones((3, 1))}, GROOT)
    with pytest.raises(ServerRefused, match="error of the policy server: no GPU"):
        decode_actions({"error": "no GPU"}, GROOT)


def test_resize_keeps_the_aspect():
    white = np.full((40, 80, 3), 255, np.uint8)
    padded = resize_with_pad(white, 64, 64)
    assert padded.shape == (64, 64, 3)
    assert (padded[16:48] == 255).all()
    assert not padded[:16].any()
    assert not padded[48:].any()


def test_key_mappings(tmp_path):
    for name, mapping in KEY_MAPPINGS.items():
        assert read_key_mapping(name) is mapping
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"wire": "openpi", "images": {"image": "frame"}, "state": {"s": [0, 2]},
                                "actions": {"actions": [0, 2]}, "instruction": "prompt"}))  # fmt: skip
    assert decode_actions({"actions": np.ones((4, 2))}, read_key_mapping(str(path))).actions.shape == (4, 2)
    path.write_text('{"wire": "openpi"}')
    with pytest.raises(ValueError, match=r"mine\.json: expected a JSON object with the fields wire, images"):
        read_key_mapping(str(path))
    with pytest.raises(ValueError, match="key mapping 'pi0': expected one of openpi_libero"):
        read_key_mapping("pi0")
    with pytest.raises(ValueError, match="contiguous spans from 0"):
        replace(OPENPI, actions={"actions": (1, 3)})
    with pytest.raises(ValueError, match="expected tcp://HOST:PORT and a key mapping for groot"):
        GrootPolicy("tcp://127.0.0.1:1", OPENPI)


def act(message):
    """The stand-in policies: three actions towards the red square, located in the image."""
    image = message.get("observation/image", message.get("video.ego_view", [None])[0])
    rows, columns = np.nonzero(image[..., 0] == 200)
    return np.tile([[columns.mean() / 48, rows.mean() / 32]], (3, 1)).astype(np.float32)


def openpi_handler(connection):
    connection.send(pack({"policy": "remote"}))
    for data in connection:
        message = unpack(data)
        if message["prompt"] == "crash":
            connection.send("Traceback (most recent call last):\nRuntimeError: out of memory")
        else:
            connection.send(pack({"actions": act(message), "server_timing": {"infer_ms": 1.0}}))


def play(policy, path):
    env = PointWorld()
    return evaluate(
        policy,
        env,
        regime_trials(env, ["instance"], limit=6),
        policy_name="remote",
        protocol=Protocol(execute_steps=3),
        output=path,
        progress=False,
    )


@pytest.mark.filterwarnings("error:connect:DeprecationWarning")  # of websockets 17
def test_an_openpi_server_is_evaluated(tmp_path):
    from websockets.sync.server import serve

    with serve(openpi_handler, "127.0.0.1", 0, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        policy = connect_policy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", OPENPI)
        assert isinstance(policy, OpenpiPolicy)
        results = play(policy, tmp_path / "r.jsonl")
        with pytest.raises(ServerRefused, match="RuntimeError: out of memory"):
            policy.act(replace(make_observation(), instruction="crash"))
        server.shutdown()
    assert sum(trial.success for trial in results.trials) >= 5
    assert {trial.instruction for trial in results.trials} == {"go"}


def test_a_groot_server_is_evaluated(tmp_path):
    zmq = pytest.importorskip("zmq")
    socket = zmq.Context.instance().socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def serve_until_stopped():
        while (message := unpack_groot(socket.recv())) != "stop":
            assert message["endpoint"] == "get_action"
            actions = act(message["data"])
            socket.send(pack_groot({"action.x": actions[:, :1], "action.y": actions[:, 1:]}))
        socket.send(pack_groot({}))
        socket.close()

    thread = threading.Thread(target=serve_until_stopped, daemon=True)
    thread.start()
    results = play(connect_policy(f"tcp://127.0.0.1:{port}", GROOT), tmp_path / "r.jsonl")
    assert sum(trial.success for trial in results.trials) >= 5
    stopper = zmq.Context.instance().socket(zmq.REQ)
    stopper.connect(f"tcp://127.0.0.1:{port}")
    stopper.send(pack_groot("stop"))
    stopper.recv()
    stopper.close()
    thread.join(10)


def test_an_unreachable_server():
    with pytest.raises(ServerLost, match="no answer from the policy server"):
        OpenpiPolicy("ws://127.0.0.1:9", OPENPI, timeout=2).act(make_observation())
