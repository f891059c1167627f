"""GR00T's port under hostile bytes: a request's size is bounded before it is read, whatever parts it comes in."""

import socket
import time

import numpy as np
import pytest
import zmq

from agra.serving.protocol.wire import pack_groot, unpack_groot
from agra.serving.protocol.zmtp import COMMAND, GREETING, MORE
from agra.serving.server.config import Limits
from tests.support.echo import Echo, expected, observation, wait_for
from tests.support.groot import READY, Both, GrootClient, flat_observation, handshake, zmtp_frame, zmtp_header


def read_all(raw):
    """Everything until the server closes the connection."""
    found = b""
    try:
        while data := raw.recv(2**16):
            found += data
    except ConnectionResetError:
        pass
    return found


MIB = 2**20
HOSTILE = {
    "a part of 9 MiB": zmtp_header(MORE, 0) + zmtp_header(0, 9 * MIB),
    "a part of 2^63 bytes": zmtp_header(MORE, 0) + zmtp_header(0, 2**63),
    "many parts": zmtp_header(MORE, 0) + zmtp_header(MORE, 7 * MIB),
    "many empty parts": zmtp_header(MORE, 0) + zmtp_header(MORE, 0),
    "no empty part": zmtp_frame(0, b"\x80"),
    "a large first part": zmtp_header(MORE, 7 * MIB),
    "a command of 1 MiB": zmtp_header(COMMAND, MIB),
    "an unknown command": zmtp_frame(COMMAND, b"\x04KILL"),
    "a command without a name": zmtp_frame(COMMAND, b""),
    "unknown flags": b"\x80\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_close_the_connection_at_their_header(name):
    with Both(Echo(), Limits(max_message=8 * MIB), api_key="right") as both, handshake(both) as raw:
        raw.sendall(HOSTILE[name])
        assert b"READY" in read_all(raw)
        assert np.array_equal(
            GrootClient(both.groot.port, "right").call("get_action", flat_observation(1))["action.arm"],
            expected(observation(1)),
        )


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n" + bytes(80), bytes(64), GREETING[:10] + b"\x02" + bytes(60)]
)
def test_what_is_no_greeting_is_closed(data):
    with Both(Echo()) as both, socket.create_connection(("127.0.0.1", both.groot.port), timeout=10) as raw:
        raw.sendall(data)
        assert b"READY" not in read_all(raw)


def test_only_sockets_that_ask_are_served():
    with Both(Echo()) as both:
        for kind in (b"PUB", b"REP", b""):
            with handshake(both, kind) as raw:
                assert b"expected a REQ or DEALER socket" in read_all(raw)
        with socket.create_connection(("127.0.0.1", both.groot.port), timeout=10) as raw:
            raw.sendall(GREETING + zmtp_frame(COMMAND, READY + b"\xff"))  # metadata cut off
            assert b"READY" not in read_all(raw)


def test_silent_and_slow_connections_end():
    limits = Limits(handshake_timeout=0.2, receive_timeout=0.2, idle_timeout=0.4)
    with Both(Echo(), limits) as both:
        with socket.create_connection(("127.0.0.1", both.groot.port), timeout=10) as raw:
            assert read_all(raw) == GREETING
        for sent in (b"", zmtp_header(MORE, 0) + zmtp_header(0, 1000) + bytes(10)):
            with handshake(both) as raw:
                raw.sendall(sent)
                begun = time.monotonic()
                read_all(raw)
                assert time.monotonic() - begun < 5


def test_a_ping_is_answered_also_within_a_message():
    with Both(Echo()) as both, handshake(both) as raw:
        raw.sendall(zmtp_header(MORE, 0) + zmtp_frame(COMMAND, b"\x04PING\x00\x64here") + zmtp_frame(0, b"\xc1"))
        found = b""
        while b"not a valid msgpack message" not in found:
            found += raw.recv(2**16)
        assert b"\x04PONGhere" in found


def test_libzmqs_heartbeats_and_names_are_understood():
    with Both(Echo()) as both:
        client = GrootClient(both.groot.port)
        for option, value in ((zmq.HEARTBEAT_IVL, 50), (zmq.HEARTBEAT_TIMEOUT, 200), (zmq.ROUTING_ID, b"me")):
            client.socket.setsockopt(option, value)
        client.socket.disconnect(f"tcp://127.0.0.1:{both.groot.port}")
        client.socket.connect(f"tcp://127.0.0.1:{both.groot.port}")
        for seed in range(3):
            time.sleep(0.3)
            assert np.array_equal(
                client.call("get_action", flat_observation(seed))["action.arm"], expected(observation(seed))
            )


def test_messages_of_many_parts_from_libzmq_take_no_memory():
    with Both(Echo(), Limits(max_message=MIB)) as both:
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"tcp://127.0.0.1:{both.groot.port}")
        dealer.send_multipart([bytes(MIB // 2)] * 100, copy=False)
        assert dealer.poll(300) == 0
        dealer.close()


def test_a_connection_is_a_queue_of_its_own_and_further_ones_wait_outside():
    policy = Echo(seconds=0.02)
    with Both(policy, Limits(max_connections=2)) as both:
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"tcp://127.0.0.1:{both.groot.port}")
        for seed in range(10):
            dealer.send_multipart([b"", pack_groot({"endpoint": "get_action", "data": flat_observation(seed)})])
        good = GrootClient(both.groot.port)
        for seed in range(3):  # not refused: it has a queue of its own
            assert np.array_equal(
                good.call("get_action", flat_observation(seed))["action.arm"], expected(observation(seed))
            )
        for seed in range(10):
            answer = unpack_groot(dealer.recv_multipart()[1])
            assert np.array_equal(answer["action.arm"], expected(observation(seed)))
        late = GrootClient(both.groot.port, timeout=300)
        late.socket.send(b"\xc1")
        assert late.socket.poll(300) == 0
        dealer.close()
        wait_for(lambda: both.groot.clients < 2)
        assert late.socket.poll(10_000)


def test_stopping_answers_what_was_read_and_tells_later_requests():
    policy = Echo(seconds=0.3)
    with Both(policy) as both:
        one, other = GrootClient(both.groot.port), GrootClient(both.groot.port)
        assert other.call("ping")["status"] == "ok"
        one.socket.send(pack_groot({"endpoint": "get_action", "data": flat_observation(4)}))
        wait_for(lambda: policy.batches)
        both.server.service.draining = True
        assert "stopping" in other.call("ping")["error"]
        assert np.array_equal(unpack_groot(one.socket.recv())["action.arm"], expected(observation(4)))
