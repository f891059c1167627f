"""GR00T's port under hostile bytes. The size of a request is checked before it is read, in any number of parts."""

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
    """All bytes until the server closes the connection."""
    received = b""
    try:
        while data := raw.recv(2**16):
            received += data
    except ConnectionResetError:
        pass
    return received


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
def test_a_wrong_greeting_closes_the_connection(data):
    with Both(Echo()) as both, socket.create_connection(("127.0.0.1", both.groot.port), timeout=10) as raw:
        raw.sendall(data)
        assert b"READY" not in read_all(raw)


def test_only_req_and_dealer_sockets_are_served():
    with Both(Echo()) as both:
        for kind in (b"PUB", b"REP", b""):
            with handshake(both, kind) as raw:
                assert b"expected a REQ or DEALER socket" in read_all(raw)
        with socket.create_connection(("127.0.0.1", both.groot.port), timeout=10) as raw:
            raw.sendall(GREETING + zmtp_frame(COMMAND, READY + b"\xff"))  # truncated metadata
            assert b"READY" not in read_all(raw)


def test_silent_and_slow_connections_end():
    limits = Limits(handshake_timeout=0.2, receive_timeout=0.2, idle_timeout=0.4)
    with Both(Echo(), limits) as both:
        with socket.create_connection(("127.0.0.1", both.groot.port), timeout=10) as raw:
            assert read_all(raw) == GREETING
        for sent in (b"", zmtp_header(MORE, 0) + zmtp_header(0, 1000) + bytes(10)):
            with handshake(both) as raw:
                raw.sendall(sent)
                start = time.monotonic()
                read_all(raw)
                assert time.monotonic() - start < 5


def test_a_ping_within_a_message_gets_a_pong():
    with Both(Echo()) as both, handshake(both) as raw:
        raw.sendall(zmtp_header(MORE, 0) + zmtp_frame(COMMAND, b"\x04PING\x00\x64here") + zmtp_frame(0, b"\xc1"))
        received = b""
        while b"not a valid msgpack message" not in received:
            received += raw.recv(2**16)
        assert b"\x04PONGhere" in received


def test_libzmqs_heartbeats_and_identities_work():
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


def test_each_connection_has_its_own_queue_and_excess_ones_wait_unconnected():
    policy = Echo(seconds=0.02)
    with Both(policy, Limits(max_connections=2)) as both:
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"tcp://127.0.0.1:{both.groot.port}")
        for seed in range(10):
            dealer.send_multipart([b"", pack_groot({"endpoint": "get_action", "data": flat_observation(seed)})])
        good = GrootClient(both.groot.port)
        for seed in range(3):  # its own queue: not refused
            assert np.array_equal(
                good.call("get_action", flat_observation(seed))["action.arm"], expected(observation(seed))
            )
        for seed in range(10):
            response = unpack_groot(dealer.recv_multipart()[1])
            assert np.array_equal(response["action.arm"], expected(observation(seed)))
        late = GrootClient(both.groot.port, timeout=300)
        late.socket.send(b"\xc1")
        assert late.socket.poll(300) == 0
        dealer.close()
        assert late.socket.poll(10_000)


def test_a_stopping_server_answers_read_requests_and_refuses_later_ones():
    policy = Echo(seconds=0.3)
    with Both(policy) as both:
        first, second = GrootClient(both.groot.port), GrootClient(both.groot.port)
        assert second.call("ping")["status"] == "ok"
        first.socket.send(pack_groot({"endpoint": "get_action", "data": flat_observation(4)}))
        wait_for(lambda: policy.batches)
        both.server.service.draining = True
        assert "stopping" in second.call("ping")["error"]
        assert np.array_equal(unpack_groot(first.socket.recv())["action.arm"], expected(observation(4)))
