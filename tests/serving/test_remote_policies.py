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
from tests.support.echo import Echo, expected, observation
from tests.support.groot import Both, N16Server
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
N16 = KeyMapping(
    wire="groot_n16",
    images={"ego_view": "frame"},
    state={"x": (0, 1), "y": (1, 2)},
    actions={"y": (1, 2), "x": (0, 1)},
    instruction="annotation.human.task_description",
    instruction_prefix="unlocked_waist: ",
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


def test_n16_request_is_nested_and_has_a_batch_axis():
    message = encode_observation(make_observation(), N16)
    assert message["video"]["ego_view"].shape == (1, 1, 32, 48, 3)
    assert {key: values.tolist() for key, values in message["state"].items()} == {"x": [[[0.25]]], "y": [[[0.75]]]}
    assert message["language"] == {"annotation.human.task_description": [["unlocked_waist: go"]]}
    with pytest.raises(ValueError, match="groot_n16 has no further keys"):
        replace(N16, constants={"task": 3})


def test_gr1_of_n16_has_the_names_of_its_modality_configuration():
    mapping = KEY_MAPPINGS["groot_n16_gr1"]
    parts = {"left_arm": 7, "right_arm": 7, "left_hand": 6, "right_hand": 6, "waist": 3}
    assert {key: end - start for key, (start, end) in mapping.state.items()} == parts
    assert {key: end - start for key, (start, end) in mapping.actions.items()} == parts
    assert (list(mapping.images), mapping.instruction) == (["ego_view_bg_crop_pad_res256_freq20"], "task")


def test_actions_are_put_in_our_order():
    chunk = decode_actions({"action.x": np.full((3, 1), 1.0), "action.y": np.full((3, 4), 2.0)}, GROOT)
    assert chunk.actions.tolist() == [[1, 2]] * 3
    flat = decode_actions([{"action.x": np.ones((3, 1)), "action.y": np.ones((3, 1))}, {}], GROOT)
    assert flat.actions.shape == (3, 2)
    n16 = decode_actions([{"x": np.full((1, 3, 1), 1.0), "y": np.full((1, 3, 1), 2.0)}, {}], N16)
    assert n16.actions.tolist() == [[1, 2]] * 3
    with pytest.raises(ServerRefused, match=r"y: expected \(K, 1\) numbers from the policy server, got \(2, 3, 1\)"):
        decode_actions([{"x": np.ones((1, 3, 1)), "y": np.ones((2, 3, 1))}, {}], N16)
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


def n16_act(observation):
    actions = act({"video.ego_view": observation["video"]["ego_view"][0]})[None]
    return {"x": actions[..., :1], "y": actions[..., 1:]}


def test_an_n16_server_is_evaluated(tmp_path):
    """Against a stand-in that speaks the messages of N1.6's policy server and checks them as it does."""
    names = {"video": ["ego_view"], "state": ["x", "y"], "language": "annotation.human.task_description"}
    with N16Server(n16_act, **names, token="secret") as server:
        address = f"tcp://127.0.0.1:{server.port}"
        results = play(connect_policy(address, N16, api_key="secret"), tmp_path / "r.jsonl")
        assert sum(trial.success for trial in results.trials) >= 5
        assert server.requests.count("reset") == 6  # one an episode
        with pytest.raises(ServerRefused, match="Unauthorized"):
            connect_policy(address, N16).reset(0)
        other = connect_policy(address, replace(N16, instruction="task"), api_key="secret")
        with pytest.raises(ServerRefused, match=r"expected \['annotation\.human\.task_description'\], got \['task'\]"):
            other.act(make_observation())
        n15 = connect_policy(address, GROOT, api_key="secret")
        with pytest.raises(ServerRefused, match="unexpected keyword argument"):
            n15.act(make_observation())


def test_the_n16_client_and_our_server_of_gr00ts_protocol_agree():
    mapping = KeyMapping(
        wire="groot_n16",
        images={"ego_view": "frame"},
        state={"arm": (0, 3), "hand": (3, 4)},
        actions={"arm": (0, 3)},
        instruction="annotation.human.action.task_description",
    )
    with Both(Echo()) as both:
        policy = connect_policy(f"tcp://127.0.0.1:{both.groot.port}", mapping)
        policy.reset(5)
        np.testing.assert_array_equal(policy.act(observation(3)).actions, expected(observation(3)))
        assert both.policy.seeds[-1] == 5


def interrupted(timeout):
    raise KeyboardInterrupt


def moved():
    """An observation with the red square in its last column, unlike `make_observation`'s."""
    frame = np.full((32, 48, 3), 120, np.uint8)
    frame[16, 47] = (200, 0, 0)
    return replace(make_observation(), frame=frame)


def test_an_interrupted_openpi_call_leaves_no_answer_behind(monkeypatch):
    from websockets.sync.server import serve

    with serve(openpi_handler, "127.0.0.1", 0, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        policy = OpenpiPolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", OPENPI)
        first = policy.act(make_observation()).actions
        monkeypatch.setattr(policy._connection, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.act(make_observation())
        monkeypatch.undo()
        actions = policy.act(moved()).actions
        server.shutdown()
    np.testing.assert_allclose(actions, np.tile([47 / 48, 16 / 32], (3, 1)))
    assert not np.allclose(actions, first)


def test_an_interrupted_groot_call_leaves_a_usable_client(monkeypatch):
    zmq = pytest.importorskip("zmq")
    names = {"video": ["ego_view"], "state": ["x", "y"], "language": "annotation.human.task_description"}
    with N16Server(n16_act, **names) as server, monkeypatch.context() as patch:
        policy = GrootPolicy(f"tcp://127.0.0.1:{server.port}", N16)
        patch.setattr(zmq.Socket, "poll", lambda socket, timeout: interrupted(timeout))
        with pytest.raises(KeyboardInterrupt):
            policy.act(make_observation())
        patch.undo()
        np.testing.assert_allclose(policy.act(moved()).actions, np.tile([47 / 48, 16 / 32], (3, 1)))


def test_an_unreachable_server():
    pytest.importorskip("zmq")
    policy = GrootPolicy("tcp://127.0.0.1", GROOT, timeout=1)
    for _ in range(2):
        with pytest.raises(ServerLost, match=r"tcp://127\.0\.0\.1: no answer .* expected a server at tcp://HOST:PORT"):
            policy.act(make_observation())
    with pytest.raises(ServerLost, match="no answer from the policy server"):
        OpenpiPolicy("ws://127.0.0.1:9", OPENPI, timeout=2).act(make_observation())
