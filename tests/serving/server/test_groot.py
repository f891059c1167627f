"""GR00T's wire, against a client written after its published protocol: REQ socket, msgpack, arrays as .npy bytes."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import zmq

from agra.serving.server.groot import GrootNames, GrootServer
from agra.serving.server.service import Limits
from agra.serving.protocol.wire import pack_groot

from .echo import Echo, expected, observation, running, spec, wait_for


class Client:
    """What GR00T's BaseInferenceClient does on the wire."""

    def __init__(self, port, token=None, timeout=10_000):
        self.socket = zmq.Context.instance().socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, timeout)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.token = token

    def call(self, endpoint, data=None):
        request = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        return self.send(msgpack.packb(request | ({"api_token": self.token} if self.token else {}), default=_encode))

    def send(self, data):
        self.socket.send(data)
        return msgpack.unpackb(self.socket.recv(), object_hook=_decode)


def _encode(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def _decode(entries):
    if "__ndarray_class__" in entries:
        return np.load(io.BytesIO(entries["as_npy"]), allow_pickle=False)
    return entries


class Both:
    """A running service with GR00T's wire beside the websocket."""

    def __init__(self, policy, limits=None, **options):
        self.policy, self.limits, self.options = policy, limits, options

    def __enter__(self):
        self.context = running(self.policy, self.limits)
        self.server = self.context.__enter__()

        async def start():
            self.groot = GrootServer(self.server.service, port=0, **self.options)
            await self.groot.start()

        self.server.call(start())
        return self

    def __exit__(self, *raised):
        self.server.call(self.groot.stop())
        self.context.__exit__(*raised)


def flat(*seeds, batched=False):
    """N1.5's observation; the echo policy's state parts are arm (3) and hand (1)."""
    seen = [observation(seed) for seed in seeds]
    frames, states = np.stack([o.frame for o in seen]), np.stack([o.state for o in seen])
    if batched:
        frames, states = frames[:, None], states[:, None]
    return {
        "video.ego_view": frames,
        "state.arm": states[..., :3],
        "state.hand": states[..., 3:],
        "annotation.human.action.task_description": ["go"] * len(seeds) if batched else ["go"],
    }


def test_an_action_for_an_observation():
    with Both(Echo()) as both:
        client = Client(both.groot.port)
        assert client.call("ping")["status"] == "ok"
        assert client.call("reset", {"options": {"seed": 5}}) == {}
        answer = client.call("get_action", flat(3))
        assert np.array_equal(answer["action.arm"], expected(observation(3)))
        assert both.policy.seeds == [5]


def test_the_newest_frame_of_several_and_another_annotation():
    with Both(Echo()) as both:
        asked = flat(3, 4)
        asked["annotation.human.coarse_action"] = asked.pop("annotation.human.action.task_description")
        answer = Client(both.groot.port).call("get_action", asked)
        assert np.array_equal(answer["action.arm"], expected(observation(4)))


def test_environments_in_a_batch():
    with Both(Echo()) as both:
        answer = Client(both.groot.port).call("get_action", flat(1, 2, 3, batched=True))
        for row, seed in zip(answer["action.arm"], (1, 2, 3), strict=True):
            assert np.array_equal(row, expected(observation(seed)))
        assert len(set(both.policy.seeds)) == 3


def test_the_newer_protocol():
    with Both(Echo()) as both:
        client, one = Client(both.groot.port), flat(7, batched=True)
        nested = {
            "video": {"ego_view": one["video.ego_view"]},
            "state": {"arm": one["state.arm"], "hand": one["state.hand"]},
            "language": {"annotation.human.action.task_description": [["go"]]},
        }
        action, info = client.call("get_action", {"observation": nested, "options": None})
        assert np.array_equal(action["arm"][0], expected(observation(7)))
        assert info == {}
        action, _ = client.call("get_action", {"observation": one, "options": None})
        assert np.array_equal(action["action.arm"][0], expected(observation(7)))


def test_the_modalities_are_described():
    with Both(Echo()) as both:
        found = Client(both.groot.port).call("get_modality_config")
        assert all(one["__ModalityConfig_class__"] is True for one in found.values())
        assert {name: one["as_json"] for name, one in found.items()} == {
            "video": {"delta_indices": [0], "modality_keys": ["ego_view"]},
            "state": {"delta_indices": [0], "modality_keys": ["arm", "hand"]},
            "action": {"delta_indices": [0, 1, 2, 3, 4], "modality_keys": ["arm"]},
            "language": {"delta_indices": [0], "modality_keys": ["annotation.human.action.task_description"]},
        }


def test_the_modalities_are_described_to_the_older_clients_as_text():
    with Both(Echo(), names=GrootNames(version="n1.5")) as both:
        found = Client(both.groot.port).call("get_modality_config")
        parts = {name: json.loads(one["as_json"]) for name, one in found.items()}
        assert parts["state"] == {"delta_indices": [0], "modality_keys": ["state.arm", "state.hand"]}
        assert parts["action"] == {"delta_indices": [0, 1, 2, 3, 4], "modality_keys": ["action.arm"]}


WRONG = {
    "video.ego_view: missing": {"video.ego_view": None},
    r"state.arm: expected \(T, 3\) float, got \(1, 2\) float32": {"state.arm": np.zeros((1, 2), np.float32)},
    r"video.ego_view: expected \(T, H, W, 3\)": {"video.ego_view": np.zeros((32, 48, 3), np.uint8)},
    r"video.ego_view: expected \(H, W, 3\) uint8": {"video.ego_view": np.zeros((1, 32, 48, 3), np.float32)},
    "annotation.human.action.task_description: expected": {"annotation.human.action.task_description": [3]},
}


@pytest.mark.parametrize(("complaint", "changes"), WRONG.items(), ids=WRONG)
def test_wrong_requests_are_explained(complaint, changes):
    with Both(Echo()) as both:
        client = Client(both.groot.port)
        asked = {key: value for key, value in {**flat(1), **changes}.items() if value is not None}
        with pytest.raises(AssertionError, match=complaint):
            raise AssertionError(client.call("get_action", asked)["error"])
        assert "action.arm" in client.call("get_action", flat(1))


def test_strangers_neither_stop_nor_enter_it():
    with Both(Echo(), api_key="right") as both:
        port = both.groot.port
        for token in (None, "wrong"):
            assert "api_token" in Client(port, token).call("get_action", flat(1))["error"]
        client = Client(port, "right")
        assert "endpoint: expected one of" in client.call("kill")["error"]
        assert "not a msgpack message" in client.send(b"\xc1")["error"]
        assert "expected a map" in client.send(msgpack.packb([1]))["error"]
        assert np.array_equal(client.call("get_action", flat(1))["action.arm"], expected(observation(1)))


def test_clients_do_not_wait_for_each_other_and_bare_messages_get_nothing():
    policy = Echo(seconds=0.02)
    with Both(policy, Limits(max_message=100_000)) as both:
        bare = zmq.Context.instance().socket(zmq.DEALER)
        bare.setsockopt(zmq.LINGER, 0)
        bare.connect(f"tcp://127.0.0.1:{both.groot.port}")
        bare.send(pack_groot({"endpoint": "ping"}))  # without the empty frame of a REQ
        huge = Client(both.groot.port, timeout=300)
        with pytest.raises(zmq.Again):  # the connection is closed
            huge.send(bytes(200_000))

        def one(number):
            client = Client(both.groot.port)
            for index in range(5):
                answer = client.call("get_action", flat(10 * number + index))
                assert np.array_equal(answer["action.arm"], expected(observation(10 * number + index)))

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(one, range(6)))
        assert bare.poll(50) == 0
    assert max(policy.batches) > 1


def test_a_client_that_waits_to_be_told_holds_up_nobody():
    with Both(Echo(), Limits(bad_request_rate=0.5, max_connections=3)) as both:
        first, second, good = (Client(both.groot.port) for _ in range(3))
        assert "not a msgpack message" in first.send(b"\xc1")["error"]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(second.send, b"\xc1")
            wait_for(lambda: b'outcome="garbage",wire="groot"} 2.0' in both.server.service.metrics())
            for seed in range(3):
                answer = good.call("get_action", flat(seed))
                assert np.array_equal(answer["action.arm"], expected(observation(seed)))
            assert not waiting.done()
            assert "not a msgpack message" in waiting.result()["error"]


def test_the_embodiment_is_checked():
    with running(Echo(spec())) as server:
        with pytest.raises(ValueError, match="expected one of robot"):
            GrootServer(server.service, embodiment="other")
