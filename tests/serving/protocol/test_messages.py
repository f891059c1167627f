"""Valid requests become observations. Errors name the key, the expected value and the actual one."""

from dataclasses import replace

import numpy as np
import pytest

from agra.data.config import SourceConfig
from agra.serving.protocol.messages import (
    InferRequest,
    WireKeys,
    describe,
    encode_request,
    encode_response,
    read_description,
)
from agra.serving.protocol.validation import RequestError, parse_request
from agra.serving.protocol.wire import pack, unpack
from agra.types import ActionChunk, Continuation, EmbodimentSpec, PolicySpec
from tests.support.echo import observation, spec

KEYS = WireKeys()


def message(**changes):
    """A valid request with some keys changed, or removed by `...`."""
    valid = encode_request(InferRequest(observation=observation()), KEYS, spec())
    return {key: value for key, value in {**valid, **changes}.items() if value is not ...}


def test_a_request_round_trips():
    request = InferRequest(
        observation=observation(3),
        seed=7,
        continuation=Continuation(actions=np.ones((4, 3), np.float32), delay=2),
        request_id="a",
    )
    parsed = parse_request(unpack(pack(encode_request(request, KEYS, spec()))), spec(), KEYS)
    assert np.array_equal(parsed.observation.frame, request.observation.frame)
    assert np.array_equal(parsed.observation.state, request.observation.state)
    assert (parsed.seed, parsed.request_id, parsed.continuation.delay) == (7, "a", 2)
    assert np.array_equal(parsed.continuation.actions, request.continuation.actions)
    assert parsed.ignored == ()


def test_past_observations_round_trip():
    two = replace(spec(), past=(-5, -1), action_noise="zero", video_noise="fixed")
    asked = InferRequest(observation=replace(observation(3), past=(observation(1), observation(2))))
    sent = unpack(pack(encode_request(asked, KEYS, two)))
    parsed = parse_request(sent, two, KEYS)
    for past, same in zip(parsed.observation.past, asked.observation.past, strict=True):
        assert np.array_equal(past.frame, same.frame)
        assert np.array_equal(past.state, same.state)
    assert parsed.ignored == ()
    assert parse_request(message(), two, KEYS).observation.past == ()
    assert parse_request(sent, spec(), KEYS).ignored == ("past_image", "past_state")
    assert {"past_image", "past_state"} <= set(describe(two, KEYS)["optional_keys"])
    assert not {"past_image", "past_state"} & set(describe(spec(), KEYS)["optional_keys"])
    assert read_description(unpack(pack(describe(two, KEYS)))) == (two, KEYS)
    earlier = {key: value for key, value in describe(two, KEYS).items() if not key.endswith("_noise")}
    assert read_description(earlier)[0] == replace(two, action_noise="random", video_noise="random")
    with pytest.raises(ValueError, match=r"does not describe an agra policy .*video_noise 'half' is none of"):
        read_description(describe(two, KEYS) | {"video_noise": "half"})
    invalid = {
        r"past_image: expected \(2, H, W, 3\) uint8, got \(1, 32, 48, 3\) uint8": {
            "past_image": sent["past_image"][:1]
        },
        r"past_image: expected \(H, W, 3\) uint8 .* float32": {"past_image": np.zeros((2, 32, 48, 3), np.float32)},
        r"past_image: expected .* got nothing": {"past_image": None},
        r"past_state: expected \(2, 4\) float, got nothing": {"past_state": None},
        r"past_state: expected \(2, 4\) float, got \(2, 3\) float32": {"past_state": np.zeros((2, 3), np.float32)},
    }
    for complaint, change in invalid.items():
        with pytest.raises(RequestError, match=complaint):
            parse_request({**sent, **change}, two, KEYS)


INVALID = {
    "prompt: missing": {"prompt": ...},
    "prompt: expected a text of 1 to 1000 characters, got nothing": {"prompt": None},
    "prompt: expected a text of 1 to 1000 characters, got 5000 characters": {"prompt": "x" * 5000},
    "prompt: expected a text of 1 to 1000 characters, got 1 characters": {"prompt": " "},
    "observation/image: missing": {"observation/image": ...},
    r"observation/image: expected \(H, W, 3\) uint8 .* got \(3, 32, 32\) uint8": {
        "observation/image": np.zeros((3, 32, 32), np.uint8)
    },
    r"observation/image: .* got \(32, 32, 3\) float32": {"observation/image": np.zeros((32, 32, 3), np.float32)},
    r"observation/image: .* got \(5000, 32, 3\) uint8": {"observation/image": np.zeros((5000, 32, 3), np.uint8)},
    "observation/image: .* got a list": {"observation/image": [[0]]},
    r"observation/state: expected \(4,\) float, got \(5,\) float32": {"observation/state": np.zeros(5, np.float32)},
    r"observation/state: .* got \(4,\) int64": {"observation/state": np.zeros(4, np.int64)},
    r"observation/state: .* got float 1.0": {"observation/state": 1.0},
    r"observation/state: expected finite numbers, got nan at \[2\]": {
        "observation/state": np.array([0, 0, np.nan, 0], np.float32)
    },
    r"observation/state: expected finite numbers, got 1e\+300": {"observation/state": np.full(4, 1e300)},
    "embodiment: expected one of robot, got humanoid": {"embodiment": "humanoid"},
    "seed: expected an integer from 0 to .*, got int -1": {"seed": -1},
    "seed: .* got bool True": {"seed": True},
    "seed: .* got a str": {"seed": "7"},
    r"continuation: expected \(P, 3\) float, got \(4, 2\) float64": {"continuation": np.zeros((4, 2))},
    r"continuation: expected \(P, 3\) float, got \(0, 3\) float64": {"continuation": np.zeros((0, 3))},
    "continuation_delay: .* got int 9": {"continuation": np.zeros((4, 3)), "continuation_delay": 9},
    "imagine: expected true or false, got int 1": {"imagine": 1},
    "imagine: not enabled; start the server with --imagine": {"imagine": True},
    "request_id: expected integer, or text of at most 100": {"request_id": "x" * 101},
}


@pytest.mark.parametrize(("error", "changes"), INVALID.items(), ids=INVALID)
def test_invalid_requests_are_explained(error, changes):
    with pytest.raises(RequestError, match=error):
        parse_request(message(**changes), spec(), KEYS)


@pytest.mark.parametrize("value", [None, [], "x", 3, np.zeros(2)], ids=repr)
def test_a_request_is_a_map(value):
    with pytest.raises(RequestError, match="request: expected a map"):
        parse_request(value, spec(), KEYS)


def test_unknown_keys_are_ignored_and_listed():
    assert parse_request(message(wrist=1, **{"x" * 200: 2}), spec(), KEYS).ignored == ("wrist", "x" * 57 + "...")


def test_a_policy_with_two_embodiments_needs_the_name():
    one = spec().embodiments["robot"]
    two = PolicySpec(name="two", horizon=5, frame_size=(32, 48), embodiments={"robot": one, "other": one})
    with pytest.raises(RequestError, match="expected one of robot, other, got none"):
        parse_request(message(embodiment=...), two, KEYS)
    assert parse_request(message(embodiment=...), spec(), KEYS).observation.embodiment == "robot"


def test_renamed_keys_and_a_state_in_parts():
    keys = WireKeys(image="cam", state=("joints", "grip"), prompt="task")
    request = InferRequest(observation=observation(1))
    sent = encode_request(request, keys, spec())
    assert {"cam", "joints", "grip", "task"} < set(sent)
    parsed = parse_request(unpack(pack(sent)), spec(), keys)
    assert np.array_equal(parsed.observation.state, request.observation.state)
    with pytest.raises(RequestError, match="joints and grip: expected 4 numbers in total, got joints 2, grip 1"):
        parse_request({**sent, "joints": np.zeros(2)}, spec(), keys)
    with pytest.raises(ValueError, match="different names"):
        WireKeys(image="a", prompt="a")


def test_the_description_round_trips():
    keys = WireKeys(image="cam", state=("a", "b"))
    parsed, same = read_description(unpack(pack(describe(spec(), keys))))
    assert (parsed, same) == (spec(), keys)
    for wrong in ({}, [], {**describe(spec(), keys), "agra_wire": 2}, {**describe(spec(), keys), "embodiments": 3}):
        with pytest.raises(ValueError, match=r"does not describe an agra policy|version 2"):
            read_description(wrong)


def test_further_cameras_have_keys_of_their_own():
    (name, robot) = next(iter(spec().embodiments.items()))
    robot = replace(robot, views=("wrist",), recorded_sizes=((32, 48), (40, 60)))
    several = replace(spec(), embodiments={name: robot}, past=(-2, -1))
    described = unpack(pack(describe(several, KEYS)))
    assert read_description(described) == (several, KEYS)
    assert "observation/wrist_image" in described["keys"]
    wrist = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    moments = [replace(observation(seed), views={"wrist": wrist[seed]}) for seed in range(3)]
    seen = replace(moments[2], views={"wrist": wrist[2], "other": wrist[0]}, past=tuple(moments[:2]))
    sent = encode_request(InferRequest(observation=seen), KEYS, several)
    parsed = parse_request(unpack(pack(sent)), several, KEYS)
    for moment, expected in zip((*parsed.observation.past, parsed.observation), moments, strict=True):
        assert np.array_equal(moment.frame, expected.frame)
        assert moment.views.keys() == {"wrist"}
        assert np.array_equal(moment.views["wrist"], expected.views["wrist"])
    assert parsed.ignored == ()
    renamed = encode_request(InferRequest(observation=seen), WireKeys(view="cameras/{view}"), several)
    assert np.array_equal(renamed["cameras/wrist"], wrist[2])
    for complaint, changes in {
        r"observation/wrist_image: missing; the policy reads each camera by itself, and clients of version 0.1 send one": {
            "observation/wrist_image": ...
        },
        r"observation/wrist_image: expected \(H, W, 3\) uint8": {"observation/wrist_image": wrist},
        r"past_views: expected a map of wrist, got nothing": {"past_views": ...},
        r"past_views: expected a map of wrist, got hand": {"past_views": {"hand": wrist[:2]}},
        r"past_views.wrist: expected \(2, H, W, 3\) uint8, got \(1, 40, 60, 3\)": {"past_views": {"wrist": wrist[:1]}},
    }.items():
        wrong = {key: value for key, value in {**sent, **changes}.items() if value is not ...}
        with pytest.raises(RequestError, match=complaint):
            parse_request(wrong, several, KEYS)


def test_one_camera_is_not_sent_as_several():
    (name, robot) = next(iter(spec().embodiments.items()))
    several = replace(spec(), embodiments={name: replace(robot, views=("wrist",))})
    with pytest.raises(ValueError, match="expected the extra cameras wrist, got none"):
        encode_request(InferRequest(observation=observation(3)), KEYS, several)
    with pytest.raises(ValueError, match="the server takes each camera by itself; expected wrist in views"):
        encode_request(InferRequest(observation=replace(observation(3), joined=True)), KEYS, several)
    with pytest.raises(ValueError, match=r"expected \{view\} in the pattern of further cameras, got 'wrist'"):
        WireKeys(view="wrist")
    with pytest.raises(ValueError, match="'observation/image' is the key of a camera and of another quantity"):
        WireKeys(view="observation/{view}").views(("image",))


def test_an_earlier_server_gets_all_cameras_side_by_side():
    (name, robot) = next(iter(spec().embodiments.items()))
    several = replace(spec(), embodiments={name: replace(robot, views=("wrist",))}, past=(-1,))
    described = describe(several, KEYS)
    del described["roles"]["view"]
    parsed, keys = read_description(unpack(pack(described)))
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    seen = replace(observation(3), views={"wrist": noise, "other": noise})
    source = SourceConfig(extra_cameras=("observation.images.wrist",))
    picture = source.picture([seen.frame[None], noise[None]], ["frame", "wrist"])[0]
    assert picture.shape[1] > seen.frame.shape[1]
    sent = encode_request(InferRequest(observation=replace(seen, past=(seen,))), keys, parsed)
    assert np.array_equal(sent[keys.image], picture)
    assert np.array_equal(sent["past_image"], picture[None])
    assert "observation/wrist_image" not in sent
    assert "past_views" not in sent
    with pytest.raises(ValueError, match="expected the extra cameras wrist, got other"):
        encode_request(InferRequest(observation=replace(seen, views={"other": noise})), keys, parsed)
    assert np.array_equal(encode_request(InferRequest(observation=seen), KEYS, spec())[KEYS.image], seen.frame)


def test_a_response_has_the_keys_that_openpi_reads():
    chunk = ActionChunk(actions=np.ones((5, 3), np.float32))
    request = InferRequest(observation=observation(), request_id=4, ignored=("wrist",))
    parsed = unpack(pack(encode_response(chunk, request, {"infer_ms": 1.0})))
    assert np.array_equal(parsed["actions"], chunk.actions)
    assert parsed["server_timing"] == {"infer_ms": 1.0}
    assert (parsed["request_id"], parsed["ignored"]) == (4, ["wrist"])


def test_embodiment_spec_counts_dimensions():
    one = EmbodimentSpec(state={"a": (0, 2), "b": (2, 7)}, action={"a": (0, 3)})
    assert (one.state_dim, one.action_dim) == (7, 3)
