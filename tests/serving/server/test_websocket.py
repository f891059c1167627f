"""The websocket server with valid, invalid and hostile clients, and a policy with a different chunk for each observation."""

import asyncio
import gc
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from agra.serving.client import PolicyClient, ServerLost, ServerRefused
from agra.serving.protocol.messages import InferRequest, WireKeys, encode_request
from agra.serving.protocol.wire import pack, unpack
from agra.serving.server.app import PolicySource, reload, watch
from agra.serving.server.config import Limits
from agra.types import Continuation
from tests.support.echo import Echo, connect, expected, get, observation, running, several_cameras, spec, wait_for


def request(seed=0, **changes):
    return pack({**encode_request(InferRequest(observation=observation(seed)), WireKeys(), spec()), **changes})


def test_the_client_gets_the_policys_chunk():
    with running(Echo()) as server:
        client = PolicyClient(server.address)
        assert client.spec == spec()
        client.reset(11)
        for seed in range(3):
            chunk = client.act(observation(seed))
            assert np.array_equal(chunk.actions, expected(observation(seed)))
            assert {"decode", "queue", "action", "total", "round_trip"} <= set(chunk.timings)
        assert server.policy.seeds == [11]
        client.reset(12)
        client.act(observation(), continuation=Continuation(actions=np.ones((2, 3), np.float32), delay=1))
        assert server.policy.seeds == [11, 12]
        assert server.policy.continuations[-1].delay == 1
        assert client.act_and_imagine(observation()).imagined is None  # not allowed, so not requested
        client.close()


def test_each_camera_is_sent_by_itself():
    class Seeing(Echo):
        def act_batch(self, requests):
            self.seen = requests[-1].observation
            return super().act_batch(requests)

    wrist = np.full((40, 60, 3), 7, np.uint8)
    with running(Seeing(several_cameras())) as server:
        server.call(server.service.start())
        client = PolicyClient(server.address)
        client.act(replace(observation(1), views={"wrist": wrist}))
        assert np.array_equal(server.policy.seen.frame, observation(1).frame)
        assert np.array_equal(server.policy.seen.views["wrist"], wrist)
        with pytest.raises(ValueError, match="expected the extra cameras wrist, got none"):
            client.act(observation(1))
        client.close()
        with connect(server) as raw:
            raw.recv()
            raw.send(pack(encode_request(InferRequest(observation=observation()), WireKeys(), spec())))
            assert "observation/wrist_image: missing" in raw.recv()


def test_the_client_gets_the_imagined_video_of_a_server_that_allows_it():
    with running(Echo(replace(spec(), imagines=True))) as server:
        client = PolicyClient(server.address)
        chunk = client.act_and_imagine(observation())
        assert np.array_equal(chunk.actions, expected(observation()))
        assert chunk.imagined.shape == (3, 32, 48, 3)
        assert client.act(observation()).imagined is None
        client.close()


def test_a_client_without_past_observations_is_logged_once(caplog):
    with running(Echo(replace(spec(), past=(-1,)))) as server:
        client, other = PolicyClient(server.address), PolicyClient(server.address)
        for seed in range(3):
            client.reset(seed)
            client.act(observation())  # an episode's first observation has no past
            client.act(replace(observation(), past=(observation(seed),)))
        assert not caplog.records
        for _ in range(2):
            client.act(observation())
            client.act(observation())
            client.reset(9)
        [record] = caplog.records
        assert "policy echo reads past observations (control steps -1)" in record.getMessage()
        for _ in range(2):
            other.act(observation())
        assert len(caplog.records) == 2
        client.close(), other.close()


def test_an_invalid_request_is_explained_and_keeps_the_connection():
    with running(Echo()) as server, connect(server) as connection:
        connection.recv()
        for invalid in (request(prompt=3), request(prompt="impossible"), pack([1])):
            connection.send(invalid)
            assert connection.recv().startswith("agra: ")
        connection.send(request(5))
        assert np.array_equal(unpack(connection.recv())["actions"], expected(observation(5)))
        client = PolicyClient(server.address)
        with pytest.raises(ServerRefused, match="nobody can do this"):
            client.act(observation(instruction="impossible"))
        assert np.array_equal(client.act(observation(2)).actions, expected(observation(2)))


@pytest.mark.parametrize("data", [b"\xc1", "text", b"", b"\x81\xa1a"], ids=repr)
def test_undecodable_bytes_close_the_connection(data):
    with running(Echo()) as server, connect(server) as connection:
        connection.recv()
        connection.send(data)
        assert connection.recv().startswith("agra: ")
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=5)
        assert connection.close_code == 1007


def test_a_policy_error_reveals_nothing_and_spares_other_clients():
    with running(Echo()) as server, connect(server) as connection, connect(server) as other:
        connection.recv()
        other.recv()
        connection.send(request(prompt="crash"))
        reply = connection.recv()
        assert "failed" in reply
        assert "secret" not in reply
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=5)
        assert connection.close_code == 1011
        other.send(request(1))
        assert np.array_equal(unpack(other.recv())["actions"], expected(observation(1)))


def test_consecutive_invalid_requests_close_the_connection():
    with running(Echo(), Limits(max_bad_requests=3)) as server, connect(server) as connection:
        connection.recv()
        for _ in range(3):
            connection.send(pack({}))
            connection.recv()
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=5)
        assert connection.close_code == 1008


def test_error_replies_are_rate_limited_and_responses_are_not():
    with running(Echo(), Limits(bad_request_rate=0.5)) as server, connect(server) as first, connect(server) as second:
        client = PolicyClient(server.address)
        for connection in (first, second):
            connection.recv()
            connection.send(pack({}))
        start = time.perf_counter()
        replies = {connection: [] for connection in (first, second)}

        def listen(connection):
            replies[connection].append((connection.recv(timeout=10), time.perf_counter()))

        with ThreadPoolExecutor(2) as threads:
            threads.map(listen, (first, second))
            wait_for(lambda: replies[first] or replies[second])
            assert np.array_equal(client.act(observation(2)).actions, expected(observation(2)))
            assert not (replies[first] and replies[second])  # the second reply follows after two seconds
        received = [*replies[first], *replies[second]]
        assert [text[:6] for text, _ in received] == ["agra: "] * 2
        assert max(when for _, when in received) - start > 1.5


def test_error_replies_are_sent_between_forward_passes():
    class Gated(Echo):
        def act_batch(self, requests):
            entered.set()
            assert leave.wait(10)
            return super().act_batch(requests)

    entered, leave = threading.Event(), threading.Event()
    with running(Gated()) as server, connect(server) as invalid, connect(server) as valid:
        for connection in (invalid, valid):
            connection.recv()
        valid.send(request(1))
        assert entered.wait(10)
        invalid.send(pack({}))
        with pytest.raises(TimeoutError):
            invalid.recv(timeout=0.2)
        leave.set()
        assert invalid.recv(timeout=10).startswith("agra: ")
        assert np.array_equal(unpack(valid.recv())["actions"], expected(observation(1)))
        # A forward pass that does not end delays the reply by a second at most.
        entered.clear()
        leave.clear()
        valid.send(request(2))
        assert entered.wait(10)
        invalid.send(pack({}))
        assert invalid.recv(timeout=10).startswith("agra: ")
        leave.set()
        assert np.array_equal(unpack(valid.recv())["actions"], expected(observation(2)))


def test_size_fragments_and_idleness_are_limited():
    with running(Echo(), Limits(max_message=10_000, idle_timeout=0.3)) as server:
        with connect(server) as connection:
            connection.recv()
            connection.send(bytes(10_001))
            with pytest.raises(ConnectionClosed):
                connection.recv(timeout=5)
            assert connection.close_code == 1009
        with connect(server) as connection:
            connection.recv()
            with pytest.raises(ConnectionClosed):
                connection.recv(timeout=5)
            assert connection.close_code == 1008
    with running(Echo()) as server, connect(server) as connection:
        connection.recv()
        with pytest.raises(ConnectionClosed):
            connection.send(b"" for _ in range(10**9))
        assert connection.close_code == 1008
    with running(Echo()) as server, connect(server) as connection:
        connection.recv()
        connection.send(request(**{WireKeys().image: np.zeros((4096, 4096, 3), np.uint8)}))
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.recv(timeout=5)


def test_a_client_that_never_reads_is_disconnected():
    with running(Echo()) as server, socket.create_connection(("127.0.0.1", server.server.port)) as raw:
        raw.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        raw.settimeout(60)
        pings = (b"\x89\xfd" + bytes(4) + bytes(125)) * 100_000
        with pytest.raises(OSError, match=r"reset|pipe|abort"):
            raw.sendall(pings * 10)
        client = PolicyClient(server.address)
        assert np.array_equal(client.act(observation(2)).actions, expected(observation(2)))


def test_a_fast_client_is_slowed_down_alone():
    with running(Echo(), Limits(request_rate=20)) as server:
        client, other = PolicyClient(server.address), PolicyClient(server.address)
        start = time.perf_counter()
        for seed in range(5):
            client.act(observation(seed))
        assert time.perf_counter() - start > 4 / 20
        assert np.array_equal(other.act(observation()).actions, expected(observation()))


def test_without_the_key_everything_but_healthz_is_refused():
    with running(Echo(), api_key="right") as server:
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "right"}):
            with pytest.raises(InvalidStatus) as refused:
                connect(server, additional_headers=headers)
            assert refused.value.response.status_code == 401
            assert get(server, "/metrics", headers)[0] == 401
            assert get(server, "/readyz", headers)[0] == 401
        with pytest.raises(ServerLost, match="401"):
            PolicyClient(server.address, api_key="wrong").act(observation())
        assert np.array_equal(
            PolicyClient(server.address, api_key="right").act(observation()).actions, expected(observation())
        )
        assert get(server, "/metrics", {"Authorization": "Bearer right"})[0] == 200
        assert get(server, "/healthz")[0] == 200


def test_browsers_are_refused():
    with running(Echo()) as server:
        with pytest.raises(InvalidStatus) as refused:
            connect(server, origin="http://evil.example")
        assert refused.value.response.status_code == 403


def test_health_readiness_and_metrics():
    with running(Echo(), Limits(max_connections=2)) as server:
        client = PolicyClient(server.address)
        client.act(observation())
        with pytest.raises(ServerRefused):
            client.act(observation(instruction="impossible"))
        assert get(server, "/healthz") == (200, "OK\n")
        assert get(server, "/readyz") == (200, "ready\n")
        status, metrics = get(server, "/metrics")
        assert status == 200
        assert 'agra_requests_total{outcome="answered",wire="openpi"} 1.0' in metrics
        assert 'agra_requests_total{outcome="refused",wire="openpi"} 1.0' in metrics
        assert "agra_connections 1.0" in metrics
        with connect(server), pytest.raises(InvalidStatus):
            connect(server)
        server.service.draining = True
        assert get(server, "/readyz")[0] == 503
        server.service.draining = False


def test_requests_are_batched_and_each_gets_its_own_chunk():
    policy = Echo(seconds=0.02)
    with running(policy, Limits(max_batch=8)) as server:

        def run_client(number):
            client = PolicyClient(server.address)
            for index in range(10):
                sent = observation(100 * number + index)
                assert np.array_equal(client.act(sent).actions, expected(sent))
            return 10

        with ThreadPoolExecutor(12) as threads:
            assert sum(threads.map(run_client, range(12))) == 120
    assert sum(policy.batches) == 120
    assert max(policy.batches) > 3
    assert max(policy.batches) <= 8


def test_a_refused_request_does_not_affect_its_batch():
    policy = Echo(seconds=0.05)
    with running(policy) as server:

        def run_client(number):
            sent = observation(number, instruction="impossible" if number == 3 else "go")
            client = PolicyClient(server.address)
            if number == 3:
                with pytest.raises(ServerRefused, match="nobody"):
                    client.act(sent)
            else:
                assert np.array_equal(client.act(sent).actions, expected(sent))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(run_client, range(8)))


def test_a_busy_policy_refuses_and_skips_cancelled_requests():
    policy = Echo(seconds=0.5)
    with running(policy, Limits(request_timeout=0.2, stuck_after=0.1)) as server:
        client = PolicyClient(server.address)
        with pytest.raises(ServerRefused, match="busy"):
            client.act(observation())
        wait_for(lambda: get(server, "/readyz")[0] == 200)
        assert policy.batches == [1]


def test_stopping_finishes_running_requests():
    policy = Echo(seconds=0.4)
    answers = []
    with running(policy) as server:
        client = PolicyClient(server.address)
        client.spec  # noqa: B018  connects
        asking = threading.Thread(target=lambda: answers.append(client.act(observation(4)).actions))
        asking.start()
        wait_for(lambda: policy.batches)
        server.call(server.server.stop(5))
        asking.join()
        assert np.array_equal(answers[0], expected(observation(4)))
        with pytest.raises(ServerLost):
            client.act(observation())


def test_a_policy_is_swapped_between_two_requests():
    with running(Echo()) as server:
        client = PolicyClient(server.address)
        client.reset(5)
        client.act(observation())
        newer = Echo(spec("newer"), offset=1000)
        source = PolicySource(load=lambda: newer, stamp=lambda: 0)
        assert server.call(reload(server.service, server.server, source))
        assert np.array_equal(client.act(observation()).actions, expected(observation()) + 1000)
        assert newer.seeds == [0, 5], "checked with seed 0, then the episode restarts from its seed"

        def broken():
            raise ValueError("damaged")

        assert not server.call(reload(server.service, server.server, PolicySource(load=broken, stamp=lambda: 0)))
        assert np.array_equal(client.act(observation()).actions, expected(observation()) + 1000)
        other = Echo(spec("wider", state=6))
        assert server.call(reload(server.service, server.server, PolicySource(load=lambda: other, stamp=lambda: 0)))
        with pytest.raises(ServerLost):
            client.act(observation())
        with pytest.raises(ServerRefused, match=r"expected \(6,\) float"):
            client.act(observation())
        another = Echo(replace(other.spec, past=(-1,)))
        assert server.call(reload(server.service, server.server, PolicySource(load=lambda: another, stamp=lambda: 0)))
        with pytest.raises(ServerLost):  # so that it reads the new description
            client.act(observation())


def test_live_objects_are_frozen_and_a_replaced_policy_is_freed():
    loaded = []

    def load():
        policy = Echo()
        policy.itself = policy  # a cycle, which only the collector frees
        loaded.append(weakref.ref(policy))
        return policy

    try:
        with running(Echo()) as server:
            client = PolicyClient(server.address)
            for number in range(2):
                assert server.call(reload(server.service, server.server, PolicySource(load=load, stamp=lambda: 0)))
                assert gc.get_freeze_count() > 0
                assert np.array_equal(client.act(observation(number)).actions, expected(observation(number)))
            assert [policy() is None for policy in loaded] == [True, False]
    finally:
        gc.unfreeze()


def test_newer_checkpoints_are_found():
    newest = [1]
    with running(Echo()) as server:
        source = PolicySource(load=lambda: Echo(spec("newer")), stamp=lambda: newest[0])

        async def watch_once():
            task = asyncio.create_task(watch(server.service, server.server, source, loaded=1, interval=0.01))
            await asyncio.sleep(0.1)
            before = server.service.generation
            newest[0] = 2
            while server.service.generation == before:
                await asyncio.sleep(0.01)
            task.cancel()
            return before, server.service.spec.name

        assert server.call(watch_once()) == (0, "newer")


def test_the_client_reconnects_after_a_loss():
    client = None
    with running(Echo()) as server:
        port = server.server.port
        client = PolicyClient(server.address)
        client.reset(9)
        client.act(observation())
    with pytest.raises(ServerLost):
        client.act(observation())
    with pytest.raises(ServerLost, match="cannot reach a policy server"):
        client.act(observation())
    with running(Echo(), port=port) as server:
        assert np.array_equal(client.act(observation(1)).actions, expected(observation(1)))
        assert server.policy.seeds == [9]


def test_a_late_response_is_not_taken_for_another():
    with running(Echo(seconds=0.3)) as server:
        client = PolicyClient(server.address, timeout=0.1)
        client.spec  # noqa: B018
        with pytest.raises(ServerLost, match=r"within 0.1 s"):
            client.act(observation(1))
        client.timeout = 5
        assert np.array_equal(client.act(observation(2)).actions, expected(observation(2)))


def test_an_interrupted_call_leaves_no_answer_behind(monkeypatch):
    def interrupted(timeout):
        raise KeyboardInterrupt

    with running(Echo()) as server:
        client = PolicyClient(server.address)
        client.spec  # noqa: B018
        monkeypatch.setattr(client._connection, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.act(observation(1))
        monkeypatch.undo()
        assert np.array_equal(client.act(observation(2)).actions, expected(observation(2)))


def test_a_response_to_another_request_ends_the_connection():
    with running(Echo()) as server:
        client = PolicyClient(server.address)
        connection = client._connect()
        connection.send(request(request_id=99))  # an answer that is never read
        with pytest.raises(ServerLost, match="the message is not a response to request 1"):
            client.act(observation(1))
        assert np.array_equal(client.act(observation(2)).actions, expected(observation(2)))


def test_invalid_settings_are_refused():
    for address in ("http://x", "127.0.0.1:8000"):
        with pytest.raises(ValueError, match="expected ws://"):
            PolicyClient(address)
    with pytest.raises(ValueError, match="max_message"):
        Limits(max_message=0)
    with pytest.raises(ServerLost):
        PolicyClient("ws://127.0.0.1:9", timeout=1).act(observation())
