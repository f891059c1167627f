"""GR00T's protocol, against a client written after its published protocol."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import zmq

from agra.serving.protocol.wire import pack_groot
from agra.serving.server.config import GrootWire, Limits
from agra.serving.server.groot import GrootServer
from tests.support.echo import Echo, expected, observation, running, several_cameras, spec, wait_for
from tests.support.groot import Both, GrootClient, flat_observation


def test_an_observation_gets_its_chunk():
    with Both(Echo()) as both:
        client = GrootClient(both.groot.port)
        assert client.call("ping")["status"] == "ok"
        assert client.call("reset", {"options": {"seed": 5}}) == {}
        response = client.call("get_action", flat_observation(3))
        assert np.array_equal(response["action.arm"], expected(observation(3)))
        assert both.policy.seeds == [5]


def test_the_newest_of_several_frames_and_another_annotation_key():
    with Both(Echo()) as both:
        request = flat_observation(3, 4)
        request["annotation.human.coarse_action"] = request.pop("annotation.human.action.task_description")
        response = GrootClient(both.groot.port).call("get_action", request)
        assert np.array_equal(response["action.arm"], expected(observation(4)))


class Recording(Echo):
    """Reads past observations. Keeps the observation of the last request."""

    def __init__(self):
        super().__init__(replace(spec(), past=(-4, -1)))

    def act_batch(self, requests):
        self.last = requests[-1].observation
        return super().act_batch(requests)


def test_past_observations_come_with_the_present_one(caplog):
    """Three steps are two past observations and the present one. Batches and N1.6's nested keys work alike."""
    with Both(Recording()) as both:
        client, flat = GrootClient(both.groot.port), flat_observation(1, 2, 3)
        config = client.call("get_modality_config")
        for modality in ("video", "state"):
            assert config[modality]["as_json"]["delta_indices"] == [-4, -1, 0]
        assert config["language"]["as_json"]["delta_indices"] == [0]
        for batched in (False, True):
            request = {key: value[None] if batched and key[0] in "vs" else value for key, value in flat.items()}
            actions = client.call("get_action", request)["action.arm"]
            assert np.array_equal(actions[0] if batched else actions, expected(observation(3)))
            last = both.policy.last
            for moment, seed in zip((*last.past, last), (1, 2, 3), strict=True):
                assert np.array_equal(moment.frame, observation(seed).frame)
                assert np.array_equal(moment.state, observation(seed).state)
        assert not caplog.records


def test_a_client_without_past_observations_is_logged_once(caplog):
    with Both(Recording()) as both:
        client = GrootClient(both.groot.port)
        for _ in range(3):
            client.call("reset")
            client.call("get_action", flat_observation(1))
        assert not caplog.records  # an episode's first observation has no past
        for _ in range(2):
            client.call("get_action", flat_observation(1, 2))
            client.call("get_action", flat_observation(1, 2, batched=True))
            client.call("reset")
        assert both.policy.last.past == ()
        [record] = caplog.records
        assert "policy echo reads past observations (control steps -4, -1)" in record.getMessage()
        another = GrootClient(both.groot.port)
        for _ in range(2):
            another.call("get_action", flat_observation(1))
        assert len(caplog.records) == 2


def with_wrist(request):
    """The request with a second camera, whose frames are those of the first upside down and smaller."""
    return {**request, "video.wrist": request["video.ego_view"][..., ::-2, :, :]}


@pytest.mark.parametrize("batched", [False, True])
def test_further_cameras_are_views(batched):
    policy = Recording()
    policy.spec = several_cameras(policy.spec)
    with Both(policy) as both:
        client = GrootClient(both.groot.port)
        config = client.call("get_modality_config")
        assert config["video"]["as_json"]["modality_keys"] == ["ego_view", "wrist"]
        request = flat_observation(1, 2, 3)
        request = {key: value[None] if batched and key[0] in "vs" else value for key, value in request.items()}
        assert "actions" not in client.call("get_action", with_wrist(request))
        last = policy.last
        for moment, seed in zip((*last.past, last), (1, 2, 3), strict=True):
            assert np.array_equal(moment.frame, observation(seed).frame)
            assert np.array_equal(moment.views["wrist"], observation(seed).frame[::-2])


def test_a_camera_that_is_missing_or_of_other_axes_is_refused():
    with Both(Echo(several_cameras())) as both:
        client = GrootClient(both.groot.port)
        request = with_wrist(flat_observation(1, 2, batched=True))
        for error, wrist in {
            "video.wrist: missing; expected the keys video.ego_view, video.wrist": None,
            r"video.wrist: expected the axes of video.ego_view, got (2, 16, 48, 3)": request["video.wrist"][:, 0],
            "video.wrist: expected 2 environments as in video.ego_view, got 1": request["video.wrist"][:1],
            "video.wrist: expected (T, H, W, 3) or (B, T, H, W, 3) uint8, got int 3": 3,
        }.items():
            changed = {k: v for k, v in {**request, "video.wrist": wrist}.items() if v is not None}
            assert error in client.call("get_action", changed)["error"]
        assert "action.arm" in client.call("get_action", request)


def test_the_first_camera_has_another_name_than_the_further_ones():
    with (
        pytest.raises(ValueError, match="--groot-camera wrist: expected the name of the first camera"),
        Both(Echo(several_cameras()), camera="wrist"),
    ):
        pass


def test_environments_in_a_batch():
    with Both(Echo()) as both:
        response = GrootClient(both.groot.port).call("get_action", flat_observation(1, 2, 3, batched=True))
        for row, seed in zip(response["action.arm"], (1, 2, 3), strict=True):
            assert np.array_equal(row, expected(observation(seed)))
        assert len(set(both.policy.seeds)) == 3


def test_the_protocol_of_n16():
    with Both(Echo()) as both:
        client, flat = GrootClient(both.groot.port), flat_observation(7, batched=True)
        nested = {
            "video": {"ego_view": flat["video.ego_view"]},
            "state": {"arm": flat["state.arm"], "hand": flat["state.hand"]},
            "language": {"annotation.human.action.task_description": [["go"]]},
        }
        action, info = client.call("get_action", {"observation": nested, "options": None})
        assert np.array_equal(action["arm"][0], expected(observation(7)))
        assert info == {}
        action, _ = client.call("get_action", {"observation": flat, "options": None})
        assert np.array_equal(action["action.arm"][0], expected(observation(7)))


def test_the_modality_config_of_n16():
    with Both(Echo()) as both:
        config = GrootClient(both.groot.port).call("get_modality_config")
        assert all(modality["__ModalityConfig_class__"] is True for modality in config.values())
        assert {name: modality["as_json"] for name, modality in config.items()} == {
            "video": {"delta_indices": [0], "modality_keys": ["ego_view"]},
            "state": {"delta_indices": [0], "modality_keys": ["arm", "hand"]},
            "action": {"delta_indices": [0, 1, 2, 3, 4], "modality_keys": ["arm"]},
            "language": {"delta_indices": [0], "modality_keys": ["annotation.human.action.task_description"]},
        }


def test_the_modality_config_of_n15_is_a_json_text():
    with Both(Echo(), version="n1.5") as both:
        config = GrootClient(both.groot.port).call("get_modality_config")
        parts = {name: json.loads(modality["as_json"]) for name, modality in config.items()}
        assert parts["state"] == {"delta_indices": [0], "modality_keys": ["state.arm", "state.hand"]}
        assert parts["action"] == {"delta_indices": [0, 1, 2, 3, 4], "modality_keys": ["action.arm"]}


INVALID = {
    "video.ego_view: missing": {"video.ego_view": None},
    r"state.arm: expected \(T, 3\) float, got \(1, 2\) float32": {"state.arm": np.zeros((1, 2), np.float32)},
    r"video.ego_view: expected \(T, H, W, 3\)": {"video.ego_view": np.zeros((32, 48, 3), np.uint8)},
    r"video.ego_view: expected \(H, W, 3\) uint8": {"video.ego_view": np.zeros((1, 32, 48, 3), np.float32)},
    "annotation.human.action.task_description: expected": {"annotation.human.action.task_description": [3]},
}


@pytest.mark.parametrize(("error", "changes"), INVALID.items(), ids=INVALID)
def test_invalid_requests_are_explained(error, changes):
    with Both(Echo()) as both:
        client = GrootClient(both.groot.port)
        request = {key: value for key, value in {**flat_observation(1), **changes}.items() if value is not None}
        with pytest.raises(AssertionError, match=error):
            raise AssertionError(client.call("get_action", request)["error"])
        assert "action.arm" in client.call("get_action", flat_observation(1))


def test_invalid_keys_and_the_kill_endpoint_are_refused():
    with Both(Echo(), api_key="right") as both:
        port = both.groot.port
        for token in (None, "wrong"):
            assert "api_token" in GrootClient(port, token).call("get_action", flat_observation(1))["error"]
        client = GrootClient(port, "right")
        assert "endpoint: expected one of" in client.call("kill")["error"]
        assert "not a valid msgpack message" in client.send(b"\xc1")["error"]
        assert "expected a map" in client.send(msgpack.packb([1]))["error"]
        assert np.array_equal(client.call("get_action", flat_observation(1))["action.arm"], expected(observation(1)))


def test_clients_are_independent_and_bare_messages_get_no_response():
    policy = Echo(seconds=0.02)
    with Both(policy, Limits(max_message=100_000)) as both:
        bare = zmq.Context.instance().socket(zmq.DEALER)
        bare.setsockopt(zmq.LINGER, 0)
        bare.connect(f"tcp://127.0.0.1:{both.groot.port}")
        bare.send(pack_groot({"endpoint": "ping"}))  # without the empty part of a REQ socket
        huge = GrootClient(both.groot.port, timeout=300)
        with pytest.raises(zmq.Again):  # the connection is closed
            huge.send(bytes(200_000))

        def run_client(number):
            client = GrootClient(both.groot.port)
            for index in range(5):
                response = client.call("get_action", flat_observation(10 * number + index))
                assert np.array_equal(response["action.arm"], expected(observation(10 * number + index)))

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(run_client, range(6)))
        assert bare.poll(50) == 0
    assert max(policy.batches) > 1


def test_a_delayed_error_reply_does_not_block_other_clients():
    with Both(Echo(), Limits(bad_request_rate=0.5, max_connections=3)) as both:
        first, second, good = (GrootClient(both.groot.port) for _ in range(3))
        assert "not a valid msgpack message" in first.send(b"\xc1")["error"]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(second.send, b"\xc1")
            wait_for(lambda: b'outcome="garbage",wire="groot"} 2.0' in both.server.service.metrics())
            for seed in range(3):
                response = good.call("get_action", flat_observation(seed))
                assert np.array_equal(response["action.arm"], expected(observation(seed)))
            assert not waiting.done()
            assert "not a valid msgpack message" in waiting.result()["error"]


def test_the_embodiment_is_checked():
    with running(Echo(spec())) as server:
        with pytest.raises(ValueError, match="expected one of robot"):
            GrootServer(server.service, config=GrootWire(embodiment="other"))
