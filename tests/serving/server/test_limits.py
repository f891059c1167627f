"""Memory, input ranges, draining and reloading of the server."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
import tracemalloc
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import websockets.sync.client
from websockets.exceptions import ConnectionClosed

from agra.serving.client import PolicyClient, ServerLost, ServerRefused
from agra.serving.protocol.messages import InferRequest, WireKeys, encode_request
from agra.serving.protocol.wire import pack, unpack
from agra.serving.protocol.zmtp import MORE
from agra.serving.server.app import PolicySource, reload, run, serve, watch
from agra.serving.server.batching import Batcher
from agra.serving.server.config import Limits, ServeConfig, check_key
from agra.serving.server.service import PolicyService
from agra.serving.server.websocket import SLACK, WebsocketServer
from agra.types import ActionChunk, Continuation, PolicyRequest
from tests.support.echo import (
    ACTION,
    HORIZON,
    STATE,
    Echo,
    connect,
    expected,
    get,
    observation,
    running,
    spec,
    wait_for,
)  # fmt: skip
from tests.support.groot import Both, GrootClient, flat_observation, handshake, zmtp_header

MIB = 2**20
BIG = (1024, 512)
"""A frame of 1.5 MiB."""
TIGHT = Limits(max_message=2 * MIB, max_pending=4 * MIB, max_connections=4)
"""A share of 256 KiB each, and one larger request at a time."""


def request(seed=0, size=(32, 48)):
    return pack(encode_request(InferRequest(observation=observation(seed, size=size)), WireKeys(), spec()))


class Gated(Echo):
    """Answers once `gate` is set."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate = threading.Event()

    def act_batch(self, requests):
        assert self.gate.wait(20)
        return super().act_batch(requests)


def test_large_requests_wait_for_a_slot_and_small_ones_do_not():
    policy = Gated()
    with running(policy, TIGHT) as server, ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(3)]
        senders = []
        for number, client in enumerate(clients):
            client.recv()
            senders.append(threading.Thread(target=client.send, args=(request(number, BIG),), daemon=True))
            senders[-1].start()
        small = stack.enter_context(connect(server))
        small.recv()
        small.send(request(9))
        wait_for(lambda: server.service.large_slots.in_use)
        wait_for(lambda: server.service.active == 2)  # the small request was read although there is no free slot
        time.sleep(0.3)
        *waiting, read = sorted(connection.unread for connection in server.server.clients)
        assert read >= 1_500_000
        assert max(waiting) <= TIGHT.share + SLACK
        policy.gate.set()
        assert np.array_equal(unpack(small.recv(timeout=10))["actions"], expected(observation(9)))
        for number, client in enumerate(clients):
            chunk = unpack(client.recv(timeout=10))["actions"]
            assert np.array_equal(chunk, expected(observation(number, size=BIG)))
        wait_for(lambda: not server.service.large_slots.in_use)


def test_pipelined_requests_are_read_one_at_a_time():
    policy = Gated()
    with running(policy, TIGHT) as server, connect(server) as client:
        client.recv()
        data = [request(number, BIG) for number in range(4)]
        threading.Thread(target=lambda: [client.send(message) for message in data], daemon=True).start()
        wait_for(lambda: server.service.active)
        time.sleep(0.3)
        (connection,) = server.server.clients
        assert connection.unread <= 2 * MIB + SLACK
        policy.gate.set()
        for number in range(4):
            assert np.array_equal(unpack(client.recv(timeout=10))["actions"], expected(observation(number, size=BIG)))
        wait_for(lambda: not server.service.large_slots.in_use)


@pytest.mark.parametrize("wire", ["openpi", "groot"])
def test_an_incomplete_large_request_loses_its_slot(wire):
    with Both(Echo(), replace(TIGHT, receive_timeout=0.3)) as both, ExitStack() as stack:
        if wire == "openpi":
            slow = stack.enter_context(connect(both.server))
            slow.recv()
            slow.socket.sendall(b"\x82\xff" + (1_500_000).to_bytes(8, "big") + bytes(4) + bytes(600_000))
        else:
            slow = stack.enter_context(handshake(both))
            slow.sendall(zmtp_header(MORE, 0) + zmtp_header(0, 1_500_000) + bytes(600_000))
        wait_for(lambda: both.server.service.large_slots.in_use)
        wait_for(lambda: not both.server.service.large_slots.in_use)
        client = PolicyClient(both.server.address)
        seen = observation(2, size=BIG)
        assert np.array_equal(client.act(seen).actions, expected(seen))


def test_connections_without_a_handshake_are_bounded(monkeypatch):
    monkeypatch.setattr("agra.serving.server.websocket.MAX_HANDSHAKES", 3)
    with running(Echo(), Limits(max_connections=1)) as server:
        import socket

        half_open = [socket.create_connection(("127.0.0.1", server.server.port)) for _ in range(4)]
        wait_for(lambda: len(server.server.sockets) == 4)
        with socket.create_connection(("127.0.0.1", server.server.port)) as fifth:
            fifth.settimeout(5)
            assert fifth.recv(1) == b""
        for connection in half_open:
            connection.close()
        assert np.array_equal(PolicyClient(server.address).act(observation()).actions, expected(observation()))


# --- ranges and finite numbers -----------------------------------------------------------------------------------------


class Statistics:
    def __init__(self):
        self.state = {"min": np.array([-1.0, -1, 0, 5]), "max": np.array([1.0, 1, 1, 5])}
        self.action = {"min": np.zeros(ACTION), "max": np.full(ACTION, 255.0)}


class Trained(Echo):
    """Has statistics of its training data, in which the last state dimension is constant."""

    stats = {"robot": Statistics()}  # noqa: RUF012


def with_state(*state):
    return replace(observation(), state=np.array(state, np.float32))


def test_states_far_outside_the_training_data_are_refused_on_both_wires():
    with Both(Trained(replace(spec(), past=(-1,))), Limits(input_stretch=10)) as both:
        client = PolicyClient(both.server.address)
        for state in (
            (0, 0, 0, 5),
            (-21, 21, 11, 5),
            (0, 0, 0, 1e6),
        ):  # ten widths outside; the constant dimension is not checked
            client.act(with_state(*state))
        for state in ((1e20, 0, 0, 5), (0, -21.1, 0, 5), (0, 0, 11.1, 5)):
            with pytest.raises(ServerRefused, match="more than 10 widths outside the range of the training data"):
                client.act(with_state(*state))
        past = replace(with_state(0, 0, 0, 5), past=(with_state(0, 1e20, 0, 5),))
        with pytest.raises(ServerRefused, match=r"past_state: 1e\+20 in dimension 1"):
            client.act(past)
        actions = np.array([[1, 3e38, 1]], np.float32)
        with pytest.raises(ServerRefused, match=r"continuation: 3e\+38 in dimension 1"):
            client.act(with_state(0, 0, 0, 5), continuation=Continuation(actions=actions, delay=0))
        request_data = flat_observation(1)
        request_data["state.arm"] = np.array([[0, 1e20, 0]], np.float32)
        assert "state: 1e+20 in dimension 1" in GrootClient(both.groot.port).call("get_action", request_data)["error"]


class SometimesNan(Echo):
    def act_batch(self, requests):
        chunks = super().act_batch(requests)
        broken = np.full((HORIZON, ACTION), np.nan, np.float32)
        return [ActionChunk(actions=broken) if r.observation.instruction == "nan" else c
                for r, c in zip(requests, chunks, strict=True)]  # fmt: skip


def test_answers_that_are_not_finite_are_never_sent():
    with Both(SometimesNan()) as both, connect(both.server) as connection:
        connection.recv()
        connection.send(
            pack(encode_request(InferRequest(observation=observation(instruction="nan")), WireKeys(), spec()))
        )
        assert "the answer is nan in step 0" in connection.recv()
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=5)
        assert connection.close_code == 1011
        request_data = flat_observation(1) | {"annotation.human.action.task_description": ["nan"]}
        assert "the answer is nan" in GrootClient(both.groot.port).call("get_action", request_data)["error"]
        assert b'outcome="failed",wire="openpi"} 1.0' in both.server.service.metrics()


# --- stopping ----------------------------------------------------------------------------------------------------------


def test_stopping_under_load_answers_read_requests_and_ends_at_once():
    policy = Echo(seconds=0.1)
    ended, wrong = [], []

    def hammer(server, number):
        with connect(server) as connection:
            connection.recv()
            for index in range(10**6):
                try:
                    connection.send(request(number + index))
                    chunk = unpack(connection.recv(timeout=10))["actions"]
                except ConnectionClosed:
                    ended.append(connection.close_code)
                    return
                if not np.array_equal(chunk, expected(observation(number + index))):
                    wrong.append(index)

    with running(policy) as server:
        threads = [threading.Thread(target=hammer, args=(server, 1000 * n), daemon=True) for n in range(12)]
        for thread in threads:
            thread.start()
        wait_for(lambda: sum(policy.batches) > 24)
        start = time.monotonic()
        server.call(server.server.stop(10))
        assert time.monotonic() - start < 4
        for thread in threads:
            thread.join(10)
    assert ended == [1001] * 12
    assert not wrong


def test_sigterm_of_the_whole_server(caplog):
    """The server runs in the main thread, which gets the signals. Clients send requests without pause from other threads."""
    caplog.set_level(logging.INFO, logger="agra.serving")
    policy, results = Echo(seconds=0.05), []

    def run_client(port):
        client = PolicyClient(f"ws://127.0.0.1:{port}")
        try:
            while np.array_equal(client.act(observation(3)).actions, expected(observation(3))):
                pass
        except ServerLost:
            results.append("lost, after correct chunks")

    async def serve():
        service = PolicyService(policy, Limits())
        server = WebsocketServer(service, port=0)

        def started():
            for _ in range(4):
                threading.Thread(target=run_client, args=(server.port,), daemon=True).start()
            asyncio.get_running_loop().call_later(1.0, os.kill, os.getpid(), signal.SIGTERM)

        source = PolicySource(load=lambda: policy, stamp=lambda: 0)
        await run(service, server, source, reload_interval=0.1, loaded=0, grace=10, started=started)

    start = time.monotonic()
    asyncio.run(serve())
    assert time.monotonic() - start < 8
    wait_for(lambda: len(results) == 4)
    assert "still running" not in caplog.text


# --- a new checkpoint --------------------------------------------------------------------------------------------------


class Broken(Echo):
    """Loads, but does not answer."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def act_batch(self, requests):
        return [self.act() for _ in requests]


def fail(error):
    raise error


CANDIDATES = {
    "no embodiment": lambda: Echo(replace(spec(), embodiments={})),
    "not finite": lambda: Broken(lambda: ActionChunk(actions=np.full((HORIZON, ACTION), np.inf, np.float32))),
    "another shape": lambda: Broken(lambda: ActionChunk(actions=np.zeros((HORIZON, ACTION + 1), np.float32))),
    "TypeError": lambda: Broken(lambda: fail(TypeError("a scalar"))),
    "ValueError": lambda: Broken(lambda: fail(ValueError("too small"))),
    "does not load": lambda: fail(AttributeError("a list")),
    "RuntimeError": lambda: fail(RuntimeError("out of memory")),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_failing_candidate_is_logged_and_changes_nothing(name, caplog):
    with running(Echo()) as server:
        client = PolicyClient(server.address)
        source = PolicySource(load=CANDIDATES[name], stamp=lambda: 0)
        assert not server.call(reload(server.service, server.server, source))
        assert "kept the present policy" in caplog.text
        assert "Traceback" in caplog.text
        assert np.array_equal(client.act(observation()).actions, expected(observation()))
        assert server.service.generation == 0


def test_a_candidate_that_takes_too_long_changes_nothing():
    slow = Echo(seconds=1)
    with running(Echo(), Limits(check_timeout=0.2)) as server:
        assert not server.call(reload(server.service, server.server, PolicySource(load=lambda: slow, stamp=lambda: 0)))


def test_the_watch_continues_after_any_error(caplog):
    stamps = iter([RuntimeError("the folder is gone"), 2, 3, 4, *[4] * 10**6])
    policies = iter([*(make for name, make in CANDIDATES.items() if name in ("no embodiment", "RuntimeError"))])

    def stamp():
        newest = next(stamps)
        return fail(newest) if isinstance(newest, Exception) else newest

    def load():
        make = next(policies, None)
        return Echo(spec("good")) if make is None else make()

    with running(Echo()) as server:

        async def watch_until_swapped():
            source = PolicySource(load=load, stamp=stamp)
            task = asyncio.create_task(watch(server.service, server.server, source, loaded=1, interval=0.01))
            while server.service.generation == 0:
                await asyncio.sleep(0.01)
            task.cancel()

        server.call(watch_until_swapped())
        assert server.service.spec.name == "good"
    assert "cannot check for a newer checkpoint" in caplog.text
    assert caplog.text.count("kept the present policy") == 2


def test_a_policy_that_does_not_answer_is_not_served():
    async def serve():
        service = PolicyService(Broken(lambda: ActionChunk(actions=np.full((HORIZON, ACTION), np.nan, np.float32))))
        try:
            await service.start()
        finally:
            await service.close()

    with pytest.raises(ValueError, match="policy echo, embodiment robot: the answer is nan"):
        asyncio.run(serve())


def test_a_policy_that_crops_is_checked_with_a_larger_frame():
    class Cropped(Echo):
        def act_batch(self, requests):
            if any(r.observation.frame.shape[0] < 100 for r in requests):
                raise ValueError("expected at least 100 rows")
            return super().act_batch(requests)

    with running(Echo()) as server:
        server.call(server.service.check(Cropped()))


class Compiled(Echo):
    """A policy that warms up and adopts weights. Records the threads of both."""

    def __init__(self, name="compiled", *, adopts=True, offset=0.0):
        super().__init__(spec(name), offset=offset)
        self.adopts, self.warmed, self.threads, self.recompiles = adopts, [], set(), 0
        self.gate = threading.Event()
        self.gate.set()

    def warm_up(self, max_batch):
        assert self.gate.wait(20)
        self.warmed.append((max_batch, threading.current_thread().name))

    def adopt(self, other):
        if self.adopts:
            self.offset = other.offset
        return self.adopts

    def act_batch(self, requests):
        self.threads.add(threading.current_thread().name)
        return super().act_batch(requests)


def test_a_policy_is_warmed_up_in_its_own_thread_before_the_service_is_ready():
    policy = Compiled()
    policy.gate.clear()
    with running(policy, Limits(max_batch=3)) as server:
        starting = asyncio.run_coroutine_threadsafe(server.service.start(), server.loop)
        assert get(server, "/readyz")[0] == 503
        assert get(server, "/healthz")[0] == 200
        with pytest.raises(ServerLost, match="503"):
            PolicyClient(server.address).act(observation())
        policy.gate.set()
        starting.result(10)
        assert get(server, "/readyz")[0] == 200
        policy.threads.clear()
        PolicyClient(server.address).act(observation())
        assert policy.warmed == [(3, *policy.threads)]
        policy.recompiles = 2
        assert "agra_policy_recompiles 2.0" in get(server, "/metrics")[1]


def test_weights_are_adopted_in_place_or_the_candidate_is_warmed_up_first():
    first, second = Compiled(), Compiled("second", offset=1000)
    with running(first, Limits(max_batch=2)) as server:
        server.call(server.service.start())
        client = PolicyClient(server.address)
        assert server.call(reload(server.service, server.server, PolicySource(load=lambda: second, stamp=lambda: 0)))
        assert np.array_equal(client.act(observation()).actions, expected(observation()) + 1000)
        assert not second.warmed, "its weights were adopted, it does not serve itself"
        assert server.service.spec.name == "second"
        first.adopts = False
        third = Compiled("third", offset=3000, adopts=False)
        assert server.call(reload(server.service, server.server, PolicySource(load=lambda: third, stamp=lambda: 0)))
        third.threads.clear()
        assert np.array_equal(client.act(observation()).actions, expected(observation()) + 3000)
        assert third.warmed == [(2, *third.threads)]
        assert server.service.ready

        class Uncompilable(Compiled):
            def warm_up(self, max_batch):
                raise RuntimeError("cannot compile")

        assert not server.call(reload(server.service, server.server, PolicySource(load=Uncompilable, stamp=lambda: 0)))
        assert server.service.ready
        assert np.array_equal(client.act(observation()).actions, expected(observation()) + 3000)


def test_a_checkpoint_saved_while_the_server_starts_is_loaded():
    newest, loaded = [1], []

    class Warming(Compiled):
        def warm_up(self, max_batch):
            newest[0] = 2

    def load():
        loaded.append(newest[0])
        if len(loaded) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return Warming(adopts=False)

    source = PolicySource(load=load, stamp=lambda: newest[0])
    config = ServeConfig(port=0, reload_interval=0.01)
    asyncio.run(asyncio.wait_for(serve(config, source), timeout=20))
    assert loaded == [1, 2]


# --- access ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/healthz"])
def test_web_pages_are_refused_on_every_path(path):
    with running(Echo()) as server:
        assert get(server, path, {"Origin": "http://evil.example"})[0] == 403
        assert get(server, path, {"Host": "evil.example"})[0] == 403  # DNS rebinding
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "192.0.2.7"):
            assert get(server, path, {"Host": host})[0] == 200


def test_keys_are_ascii_stripped_and_sent_once():
    with running(Echo(), api_key=" right\n") as server:
        assert get(server, "/metrics", {"Authorization": "Api-Key right"})[0] == 200
        assert get(server, "/metrics", {"Authorization": "Api-Key s\xe9same"})[0] == 401
        with websockets.sync.client.connect(
            server.address, compression=None, additional_headers=[("Authorization", "Api-Key right")]
        ) as connection:
            connection.recv()
        import http.client

        twice = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=10)
        twice.putrequest("GET", "/metrics")
        twice.putheader("Authorization", "Api-Key right")
        twice.putheader("Authorization", "Api-Key right")
        twice.endheaders()
        assert twice.getresponse().status == 401
    for key in ("s\xe9same", " \n", "a\x00b"):
        with pytest.raises(ValueError, match="API key: expected"):
            check_key(key)


def test_limits_are_checked():
    with pytest.raises(ValueError, match="max_pending: expected at least twice max_message"):
        Limits(max_message=MIB, max_pending=MIB)
    assert (Limits().share, Limits().large_requests) == (MIB, 16)
    assert STATE == 4


def test_a_small_frame_does_not_wait_for_all_large_ones():
    policy = Gated()
    limits = Limits(max_message=2 * MIB, max_pending=64 * MIB, max_connections=64)
    with running(policy, limits) as server, ExitStack() as stack:
        first = stack.enter_context(connect(server))
        first.recv()
        first.send(request(99))
        wait_for(lambda: server.service.active == 1)
        large = [stack.enter_context(connect(server)) for _ in range(6)]
        for number, client in enumerate(large):
            client.recv()
            client.send(request(number, BIG))
        wait_for(lambda: server.service.active == 7)
        small = stack.enter_context(connect(server))
        small.recv()
        small.send(request(50))
        wait_for(lambda: server.service.active == 8)
        policy.gate.set()
        for number, client in enumerate(large):
            assert np.array_equal(unpack(client.recv(timeout=10))["actions"], expected(observation(number, size=BIG)))
        assert np.array_equal(unpack(small.recv(timeout=10))["actions"], expected(observation(50)))
        assert policy.batches == [
            1,
            3,
            2,
            2,
        ]  # the small request came last and is in the first batch after the running one


@pytest.mark.parametrize("further", ["past", "views"])
def test_past_frames_and_views_count_as_large(further):
    """A frame has 768 bytes. With three further ones a request is large, and two of those fit into a forward pass."""
    policy = Gated()
    one = observation(size=(16, 16))
    views = dict.fromkeys(("left", "right", "wrist"), one.frame)
    large = replace(one, past=(one,) * 3) if further == "past" else replace(one, views=views)

    async def submit():
        batcher = Batcher(policy, small=1000, max_large=2 * 4 * 768)
        running = [asyncio.ensure_future(batcher.submit(PolicyRequest(observation=one, episode=0)))]
        while batcher.running_since is None:
            await asyncio.sleep(0.01)
        for waiting in (*[large] * 4, one):
            running.append(asyncio.ensure_future(batcher.submit(PolicyRequest(observation=waiting, episode=0))))
        await asyncio.sleep(0)
        policy.gate.set()
        await asyncio.gather(*running)
        await batcher.close()

    asyncio.run(submit())
    assert policy.batches == [1, 3, 2]


def test_answered_requests_are_not_kept():
    with running(Echo(), replace(TIGHT, max_connections=8)) as server, ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(6)]
        for client in clients:
            client.recv()
        tracemalloc.start()
        try:
            for number, client in enumerate(clients):
                client.send(request(number, BIG))
                client.recv(timeout=20)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 3 * MIB  # six open connections, 1.5 MiB read on each
        finally:
            tracemalloc.stop()
