"""GR00T's protocol, against a client written after its published protocol."""

import json
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
import zmq

from agra.serving.protocol.wire import pack_groot
from agra.serving.server.config import GrootWire, Limits
from agra.serving.server.groot import GrootServer
from tests.support.echo import Echo, expected, observation, running, spec, wait_for
from tests.support.groot import Both, GrootClient, flat_observation


def test_an_action_for_an_observation():
    with Both(Echo()) as both:
        client = GrootClient(both.groot.port)
        assert client.call("ping")["status"] == "ok"
        assert client.call("reset", {"options": {"seed": 5}}) == {}
        answer = client.call("get_action", flat_observation(3))
        assert np.array_equal(answer["action.arm"], expected(observation(3)))
        assert both.policy.seeds == [5]


def test_the_newest_frame_of_several_and_another_annotation():
    with Both(Echo()) as both:
        asked = flat_observation(3, 4)
        asked["annotation.human.coarse_action"] = asked.pop("annotation.human.action.task_description")
        answer = GrootClient(both.groot.port).call("get_action", asked)
        assert np.array_equal(answer["action.arm"], expected(observation(4)))


def test_environments_in_a_batch():
    with Both(Echo()) as both:
        answer = GrootClient(both.groot.port).call("get_action", flat_observation(1, 2, 3, batched=True))
        for row, seed in zip(answer["action.arm"], (1, 2, 3), strict=True):
            assert np.array_equal(row, expected(observation(seed)))
        assert len(set(both.policy.seeds)) == 3


def test_the_newer_protocol():
    with Both(Echo()) as both:
        client, one = GrootClient(both.groot.port), flat_observation(7, batched=True)
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
        found = GrootClient(both.groot.port).call("get_modality_config")
        assert all(one["__ModalityConfig_class__"] is True for one in found.values())
        assert {name: one["as_json"] for name, one in found.items()} == {
            "video": {"delta_indices": [0], "modality_keys": ["ego_view"]},
            "state": {"delta_indices": [0], "modality_keys": ["arm", "hand"]},
            "action": {"delta_indices": [0, 1, 2, 3, 4], "modality_keys": ["arm"]},
            "language": {"delta_indices": [0], "modality_keys": ["annotation.human.action.task_description"]},
        }


def test_the_modalities_are_described_to_the_older_clients_as_text():
    with Both(Echo(), version="n1.5") as both:
        found = GrootClient(both.groot.port).call("get_modality_config")
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
        client = GrootClient(both.groot.port)
        asked = {key: value for key, value in {**flat_observation(1), **changes}.items() if value is not None}
        with pytest.raises(AssertionError, match=complaint):
            raise AssertionError(client.call("get_action", asked)["error"])
        assert "action.arm" in client.call("get_action", flat_observation(1))


def test_strangers_neither_stop_nor_enter_it():
    with Both(Echo(), api_key="right") as both:
        port = both.groot.port
        for token in (None, "wrong"):
            assert "api_token" in GrootClient(port, token).call("get_action", flat_observation(1))["error"]
        client = GrootClient(port, "right")
        assert "endpoint: expected one of" in client.call("kill")["error"]
        assert "not a valid msgpack message" in client.send(b"\xc1")["error"]
        assert "expected a map" in client.send(msgpack.packb([1]))["error"]
        assert np.array_equal(client.call("get_action", flat_observation(1))["action.arm"], expected(observation(1)))


def test_clients_do_not_wait_for_each_other_and_bare_messages_get_nothing():
    policy = Echo(seconds=0.02)
    with Both(policy, Limits(max_message=100_000)) as both:
        bare = zmq.Context.instance().socket(zmq.DEALER)
        bare.setsockopt(zmq.LINGER, 0)
        bare.connect(f"tcp://127.0.0.1:{both.groot.port}")
        bare.send(pack_groot({"endpoint": "ping"}))  # without the empty frame of a REQ
        huge = GrootClient(both.groot.port, timeout=300)
        with pytest.raises(zmq.Again):  # the connection is closed
            huge.send(bytes(200_000))

        def one(number):
            client = GrootClient(both.groot.port)
            for index in range(5):
                answer = client.call("get_action", flat_observation(10 * number + index))
                assert np.array_equal(answer["action.arm"], expected(observation(10 * number + index)))

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(one, range(6)))
        assert bare.poll(50) == 0
    assert max(policy.batches) > 1


def test_a_client_that_waits_to_be_told_holds_up_nobody():
    with Both(Echo(), Limits(bad_request_rate=0.5, max_connections=3)) as both:
        first, second, good = (GrootClient(both.groot.port) for _ in range(3))
        assert "not a valid msgpack message" in first.send(b"\xc1")["error"]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(second.send, b"\xc1")
            wait_for(lambda: b'outcome="garbage",wire="groot"} 2.0' in both.server.service.metrics())
            for seed in range(3):
                answer = good.call("get_action", flat_observation(seed))
                assert np.array_equal(answer["action.arm"], expected(observation(seed)))
            assert not waiting.done()
            assert "not a valid msgpack message" in waiting.result()["error"]


def test_the_embodiment_is_checked():
    with running(Echo(spec())) as server:
        with pytest.raises(ValueError, match="expected one of robot"):
            GrootServer(server.service, config=GrootWire(embodiment="other"))
