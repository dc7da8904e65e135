"""Third parties against a live store: none gets in, and none stops the clients.

Each test ends by asking a client that was there before, and one that comes new, whether all is
as it was.
"""

from __future__ import annotations

import gc
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from ferro.errors import AuthenticationError
from ferro.rendezvous import StoreClient, StoreServer, connect
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.store import server as server_module
from ferro.rendezvous.store import wire

SECRET = b"a job's secret"
NOW = 0.0  # a deadline long past: ask once


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


class Job:
    """A live store with a client on it."""

    def __init__(self) -> None:
        self.server = StoreServer(secret=SECRET)
        self.client = StoreClient(self.server.address, SECRET, deadline=soon())
        self.client.set("state", b"as it was")
        self.rounds = 0

    def serve_client(self) -> None:
        self.rounds += 1
        assert self.client.add("rounds", 1) == self.rounds

    def check_unharmed(self) -> None:
        self.serve_client()
        with StoreClient(self.server.address, SECRET, deadline=soon()) as newcomer:
            assert newcomer.get("state", deadline=NOW) == b"as it was"
            assert newcomer.get("rounds", deadline=NOW) == str(self.rounds).encode()
        assert set(self.server._table._values) == {b"state", b"rounds"}

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.server.address, timeout=20)

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def job():
    job = Job()
    yield job
    job.close()
    gc.collect()  # a socket left open is a ResourceWarning here, and so an error
    assert [t.name for t in threading.enumerate() if t.name.startswith("ferro-store")] == []


def everything_from(sock: socket.socket) -> bytes:
    """All that the server says before it closes the connection, which it must."""
    said = b""
    with suppress(ConnectionResetError):  # it closed with some of our noise unread
        while more := sock.recv(4096):
            said += more
    return said


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, f"closed after {len(data)} of {size} bytes"
        data += more
    return data


HELLO = b"\xf3FERROC\1" + bytes(32)
REQUEST = wire.encode_request(wire.Request(wire.StoreOp.SET, b"state", value=b"stolen"))


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: ferro\r\n\r\n",
        bytes(4096),
        b"\xff" * 100_000,
        struct.pack("!Q", 2**64 - 1) + b"huge",
        b"\x80\x04\x95pickle",
        b"\xf3FERROS\1" + bytes(32),
        REQUEST,
    ],
    ids=["http", "zeros", "flood", "huge length", "pickle", "a server's hello", "a request"],
)
def test_garbage_is_closed_without_a_word(job, noise):
    with job.stranger() as stranger:
        with suppress(ConnectionError):
            stranger.sendall(noise)
        assert everything_from(stranger) == b""
    job.check_unharmed()


def test_another_version_hears_only_ours(job):
    with job.stranger() as stranger:
        stranger.sendall(b"\xf3FERROC\7" + bytes(32))
        assert everything_from(stranger) == b"\xf3FERROS\1"
    job.check_unharmed()


def test_a_request_instead_of_a_proof_is_refused_and_not_acted_on(job):
    with job.stranger() as stranger:
        stranger.sendall(HELLO + REQUEST.ljust(32, b"\0"))
        assert everything_from(stranger)[40:] == bytes(32)
    job.check_unharmed()


def test_byte_by_byte_without_the_secret(job):
    with job.stranger() as stranger:
        for i in range(len(HELLO)):
            stranger.sendall(HELLO[i : i + 1])
            job.serve_client()
        assert len(receive(stranger, 40)) == 40
        for _ in range(32):
            stranger.sendall(b"\1")
            job.serve_client()
        assert everything_from(stranger) == bytes(32)
    job.check_unharmed()


def test_two_hundred_silent_strangers_keep_nobody_out(job):
    with ExitStack() as stack:
        strangers = [stack.enter_context(job.stranger()) for _ in range(200)]
        job.check_unharmed()
        # The newcomer was accepted after them all, so the oldest have had to go.
        assert everything_from(strangers[0]) == b""
        assert len(job.server._listener._pending) <= 128
        for _ in range(5):
            strangers += [stack.enter_context(job.stranger()) for _ in range(20)]
            job.check_unharmed()


def test_strangers_stuck_halfway_keep_nobody_out(job):
    with ExitStack() as stack:
        for sent in (1, 8, 20, 40):
            for _ in range(20):
                stranger = stack.enter_context(job.stranger())
                stranger.sendall(HELLO[:sent])
        job.check_unharmed()


def test_those_who_connect_and_vanish_leave_nothing(job):
    for linger in (False, True):
        for _ in range(50):
            with job.stranger() as stranger:
                if linger:  # a reset instead of an orderly end
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    job.check_unharmed()


def test_a_wrong_secret(job):
    for secret in (b"wrong", SECRET + b"\0", SECRET[:-1], SECRET.upper()):
        with pytest.raises(AuthenticationError, match="FERRO_SECRET"):
            StoreClient(job.server.address, secret, deadline=soon(3600))
    job.check_unharmed()


def test_an_absent_secret(job):
    with pytest.raises(AuthenticationError, match="empty"):
        StoreClient(job.server.address, b"", deadline=soon())
    job.check_unharmed()


def test_the_servers_own_bytes_sent_back(job):
    with job.stranger() as stranger:
        stranger.sendall(HELLO)
        challenge = receive(stranger, 40)
        stranger.sendall(challenge[8:])
        assert everything_from(stranger) == bytes(32)
    with job.stranger() as stranger:
        stranger.sendall(challenge)
        assert everything_from(stranger) == b""
    job.check_unharmed()


def test_the_servers_nonce_played_into_a_second_connection(job):
    with job.stranger() as first, job.stranger() as second:
        first.sendall(HELLO)
        nonce = receive(first, 40)[8:]
        second.sendall(HELLO[:8] + nonce)
        assert receive(second, 40)[:8] == b"\xf3FERROS\1"
        second.sendall(nonce)
        answer = everything_from(second)
        assert answer == bytes(32)
        first.sendall(answer)
        assert everything_from(first) == bytes(32)
    job.check_unharmed()


def test_a_recorded_handshake_replayed(job):
    sent = []
    with job.stranger() as client:
        state = handshake.Handshake(handshake.client(SECRET, wire.PURPOSE))
        sent.append(state.opening)
        client.sendall(state.opening)
        while state.wants:
            sent.append(state.feed(client.recv(state.wants)))
            client.sendall(sent[-1])
    recording = b"".join(sent)
    assert len(recording) == 72
    with job.stranger() as stranger:
        stranger.sendall(recording + REQUEST)
        said = everything_from(stranger)
    assert len(said) <= 72
    assert said[40:] in (b"", bytes(32))  # refused; a reset may overtake the refusal
    job.check_unharmed()


@pytest.mark.parametrize(
    "breach",
    [
        struct.pack("!BqHI", 1, 0, 5, 0xFFFFFFFF) + b"state",
        struct.pack("!BqHI", 1, 0, 0xFFFF, 0) + bytes(2000),
        struct.pack("!BqHI", 1, 0, 0, 0),
        struct.pack("!BqHI", 99, 0, 5, 0) + b"state",
        wire.encode_request(wire.Request(wire.StoreOp.GET, b"state")) * 2,
        wire.encode_request(wire.Request(wire.StoreOp.GET, b"never", 10**12)) + b"more",
    ],
    ids=["huge value", "huge key", "no key", "unknown op", "two at once", "ahead of the reply"],
)
def test_a_client_that_breaks_the_protocol_is_disconnected(job, breach):
    with connect(job.server.address, SECRET, purpose=wire.PURPOSE, deadline=soon()) as client:
        client.settimeout(20)
        client.sendall(breach)
        assert everything_from(client) == b""
    job.check_unharmed()


def test_a_waiting_client_that_sends_more_is_disconnected(job):
    with connect(job.server.address, SECRET, purpose=wire.PURPOSE, deadline=soon()) as client:
        client.settimeout(20)
        client.sendall(wire.encode_request(wire.Request(wire.StoreOp.GET, b"never", 10**12)))
        while not job.server._waiting:
            job.serve_client()
        client.sendall(b"more")
        assert everything_from(client) == b""
    assert not job.server._waiting
    job.check_unharmed()


@pytest.mark.parametrize("wait_us", [-(2**63), 2**63 - 1])
def test_a_wait_of_any_length_is_harmless(job, wait_us):
    with connect(job.server.address, SECRET, purpose=wire.PURPOSE, deadline=soon()) as client:
        client.sendall(wire.encode_request(wire.Request(wire.StoreOp.GET, b"never", wait_us)))
        job.check_unharmed()
    job.check_unharmed()


def test_half_a_request_then_silence_holds_up_nobody(job):
    with connect(job.server.address, SECRET, purpose=wire.PURPOSE, deadline=soon()) as client:
        client.sendall(REQUEST[:-1])
        job.check_unharmed()
    job.check_unharmed()


def test_incomplete_requests_are_bounded_in_sum(job, monkeypatch):
    """A request that finds no room is refused at its end; the store holds nothing of it, and its client may go on."""
    monkeypatch.setattr(server_module, "MAX_TOTAL_BYTES", 100_000)
    whole = wire.encode_request(wire.Request(wire.StoreOp.SET, b"large", value=bytes(60_000)))
    with ExitStack() as stack:
        clients = [connect(job.server.address, SECRET, purpose=wire.PURPOSE, deadline=soon()) for _ in range(8)]
        for client in clients:
            stack.enter_context(client).settimeout(20)
            client.sendall(whole[:40_000])
        deadline = soon()
        while job.server.unfinished_bytes < 40_000 or not any(c._to_discard for c in job.server._connections):
            assert time.monotonic() < deadline
            job.serve_client()
        assert job.server.unfinished_bytes <= 100_000
        statuses = []
        for client in clients:
            client.sendall(whole[40_000:])
            statuses.append(wire.decode_reply_header(receive(client, wire.REPLY_HEADER_BYTES))[::2])
            receive(client, statuses[-1][1])
        assert {status for status, _ in statuses} == {wire.ReplyStatus.OK, wire.ReplyStatus.REFUSED}
        client.sendall(wire.encode_request(wire.Request(wire.StoreOp.DELETE, b"large")))
        assert wire.decode_reply_header(receive(client, wire.REPLY_HEADER_BYTES))[:2] == (wire.ReplyStatus.OK, 1)
    job.check_unharmed()
    assert job.server.unfinished_bytes == 0
