"""The store over TCP: connections, endings and failures, seen from its clients."""

from __future__ import annotations

import gc
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import pytest

from ferro.errors import AuthenticationError, RendezvousError
from ferro.rendezvous import StoreClient, StoreServer, StoreTimeout, connect
from ferro.rendezvous.store import client as client_module
from ferro.rendezvous.store import wire

SECRET = b"a job's secret"
NOW = 0.0  # a deadline long past: ask once


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture(autouse=True)
def nothing_leaks():
    yield
    gc.collect()  # a socket left open is a ResourceWarning here, and so an error
    assert [t.name for t in threading.enumerate() if t.name.startswith("ferro-store")] == []


@pytest.fixture
def server():
    with StoreServer(secret=SECRET) as server:
        yield server


@pytest.fixture
def client(server):
    with StoreClient(server.address, SECRET, deadline=soon()) as client:
        yield client


def eventually(so) -> None:
    """Wait for the server's thread to have noticed."""
    tick = threading.Event()
    for _ in range(2000):
        if so():
            return
        tick.wait(0.005)
    pytest.fail("the server never came to it")


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, f"closed after {len(data)} of {size} bytes"
        data += more
    return data


def raw(server: StoreServer) -> socket.socket:
    sock = connect(server.address, SECRET, purpose=wire.PURPOSE, deadline=soon())
    sock.settimeout(20)
    return sock


def test_the_address_carries_the_chosen_port(server):
    host, port = server.address
    assert host == "127.0.0.1"
    assert port > 0


def test_clients_share_one_store(server, client):
    with StoreClient(server.address, SECRET, deadline=soon()) as other:
        client.set("key", b"value")
        assert other.get("key", deadline=NOW) == b"value"


def test_a_client_knows_both_ends(client):
    assert client.local_host == "127.0.0.1"
    assert client.remote_host == "127.0.0.1"


def test_over_ipv6():
    try:
        server = StoreServer("::1", secret=SECRET)
    except RendezvousError as exc:
        pytest.skip(f"no IPv6 loopback here: {exc.__cause__}")
    with server, StoreClient(server.address, SECRET, deadline=soon()) as client:
        assert client.add("n", 1) == 1
        assert (client.local_host, client.remote_host) == ("::1", "::1")


def test_requests_in_turn_use_one_connection(server, client):
    for _ in range(20):
        client.add("n", 1)
    assert len(server._connections) == 1


def test_a_waiting_get_holds_up_nobody(server, client):
    with ThreadPoolExecutor(1) as pool:
        get = pool.submit(client.get, "late", deadline=soon())
        eventually(lambda: server._next_deadline is not None)
        assert client.add("n", 1) == 1
        client.set("late", b"now")
        assert get.result(20) == b"now"


def test_each_get_times_out_on_its_own(server, client):
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(client.get, "key", deadline=soon())
        eventually(lambda: server._next_deadline is not None)
        for _ in range(2):
            with pytest.raises(StoreTimeout):
                pool.submit(client.get, "key", deadline=soon(0.02)).result(20)
        assert not long.done()
        client.set("key", b"value")
        assert long.result(20) == b"value"


def test_over_the_limit_of_connections_requests_wait_their_turn(server, monkeypatch):
    monkeypatch.setattr(client_module, "MAX_CONNECTIONS", 1)
    with (
        StoreClient(server.address, SECRET, deadline=soon(), request_timeout_s=0.05) as client,
        StoreClient(server.address, SECRET, deadline=soon()) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        get = pool.submit(client.get, "late", deadline=soon())
        eventually(lambda: server._next_deadline is not None)
        with pytest.raises(RendezvousError, match=r"did not answer set within 0\.05 s.*in use"):
            client.set("key", b"value")
        queued = pool.submit(client.get, "late", deadline=soon())
        other.set("late", b"now")
        assert [get.result(20), queued.result(20)] == [b"now", b"now"]
        client.set("key", b"value")
        assert len(server._connections) == 2


def test_a_client_that_leaves_is_forgotten_with_its_parked_get(server):
    with raw(server) as sock:
        sock.sendall(wire.encode_request(wire.Request(wire.StoreOp.GET, b"never", 60_000_000)))
        eventually(lambda: server._waiting)
    eventually(lambda: not server._connections)
    assert not server._waiting


def test_a_store_that_ends_wakes_its_waiting_clients(server, client):
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.get, "never", deadline=soon()) for _ in range(2)]
        eventually(lambda: sum(map(len, server._waiting.values())) == 2)
        server.close()
        for get in waiting:
            with pytest.raises(RendezvousError, match=r"store at 127\.0\.0\.1:\d+ is gone.*left in good order"):
                get.result(20)


def test_a_store_that_is_gone_is_a_clear_error(server, client):
    client.set("key", b"value")
    server.close(orderly=False)
    with pytest.raises(RendezvousError, match=r"is gone \(.*\).*read its log first"):
        client.set("key", b"value")


def test_a_lost_connection_is_replaced_by_the_next_request(server, client):
    eventually(lambda: server._connections)
    for connection in tuple(server._connections):
        connection._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(RendezvousError, match="gone"):
        client.add("n", 1)
    assert client.add("n", 1) == 1


def test_a_store_that_hangs_is_given_up(server, monkeypatch):
    monkeypatch.setattr(client_module, "_GRACE_S", 0.02)
    monkeypatch.setattr(server, "answer", lambda _member, _request: None)
    with StoreClient(server.address, SECRET, deadline=soon(), request_timeout_s=0.05) as client:
        with pytest.raises(RendezvousError, match=r"did not answer delete within 0\.05 s"):
            client.delete("key")
        with pytest.raises(StoreTimeout, match="did not answer either"):
            client.get("key", deadline=NOW)


def test_a_reply_out_of_bounds_is_not_believed(server, client, monkeypatch):
    monkeypatch.setattr(wire, "encode_reply_header", lambda _reply: b"\0" * 9 + b"\xff" * 4)
    with pytest.raises(RendezvousError, match="4294967295 bytes"):
        client.add("n", 1)


def test_a_slow_reader_of_large_values_holds_up_nobody(server, client):
    value = bytes(range(256)) * (1 << 16)  # 16 MiB: more than socket buffers take
    client.set("large", value)
    with raw(server) as slow:
        slow.sendall(wire.encode_request(wire.Request(wire.StoreOp.GET, b"large")))
        header = receive(slow, wire.REPLY_HEADER_BYTES)
        eventually(lambda: any(connection._unsent for connection in server._connections))
        assert [client.add("n", 1) for _ in range(5)] == [1, 2, 3, 4, 5]
        assert wire.decode_reply_header(header) == (wire.ReplyStatus.OK, 0, len(value))
        assert receive(slow, len(value)) == value
        # And the connection is good for the next request.
        slow.sendall(wire.encode_request(wire.Request(wire.StoreOp.ADD, b"n", 1)))
        header = receive(slow, wire.REPLY_HEADER_BYTES)
        assert wire.decode_reply_header(header) == (wire.ReplyStatus.OK, 6, 0)


def test_a_slow_reader_that_leaves_is_forgotten(server, client):
    client.set("large", bytes(16 << 20))
    with raw(server) as slow:
        slow.sendall(wire.encode_request(wire.Request(wire.StoreOp.GET, b"large")))
        eventually(lambda: any(connection._unsent for connection in server._connections))
    eventually(lambda: len(server._connections) == 1)
    assert client.add("n", 1) == 1


def test_a_request_in_small_pieces_is_understood(server):
    request = wire.encode_request(wire.Request(wire.StoreOp.ADD, b"n", 7))
    with raw(server) as sock:
        for first, last in pairwise(range(len(request) + 1)):
            sock.sendall(request[first:last])
        header = receive(sock, wire.REPLY_HEADER_BYTES)
        assert wire.decode_reply_header(header) == (wire.ReplyStatus.OK, 7, 0)


@pytest.mark.parametrize("waiting", [0, 3])
def test_close_may_be_repeated_and_ends_the_thread(waiting):
    server = StoreServer(secret=SECRET)
    socks = [raw(server) for _ in range(waiting)]
    for sock in socks:
        sock.sendall(wire.encode_request(wire.Request(wire.StoreOp.GET, b"never", 60_000_000)))
    eventually(lambda: sum(map(len, server._waiting.values())) == waiting)
    server.close()
    server.close()
    assert not server._thread.is_alive()
    closed = wire.encode_reply_header(wire.Reply(wire.ReplyStatus.CLOSED))
    for sock in socks:
        with sock:
            assert sock.recv(wire.REPLY_HEADER_BYTES + 1, socket.MSG_WAITALL) == closed
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address, timeout=20)


def test_the_port_is_free_again_after_close():
    with StoreServer(secret=SECRET) as first:
        port = first.address[1]
        with pytest.raises(RendezvousError, match=f":{port}.*in use"):
            StoreServer(port=port, secret=SECRET)
        with StoreClient(first.address, SECRET, deadline=soon()) as client:
            client.set("key", b"of the first")
    with (
        StoreServer(port=port, secret=SECRET) as second,
        StoreClient(second.address, SECRET, deadline=soon()) as client,
        pytest.raises(StoreTimeout),
    ):
        client.get("key", deadline=NOW)


def test_an_empty_secret_opens_no_store():
    with pytest.raises(AuthenticationError, match="empty"):
        StoreServer(secret=b"")


def test_a_store_that_cannot_be_reached_is_told_by_the_constructor():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, but nobody listens
        with pytest.raises(RendezvousError, match=r"the store at .* could not be reached"):
            StoreClient(bound.getsockname(), SECRET, deadline=soon(0.02))


def test_two_stores_with_two_secrets_do_not_mix(server, client):
    with StoreServer(secret=b"another job's") as foreign:
        with pytest.raises(AuthenticationError):
            StoreClient(foreign.address, SECRET, deadline=soon())
        with StoreClient(foreign.address, b"another job's", deadline=soon()) as stranger:
            stranger.set("key", b"theirs")
    with pytest.raises(StoreTimeout):
        client.get("key", deadline=NOW)


def test_many_clients_at_once(server):
    def rank(number: int) -> int:
        with StoreClient(server.address, SECRET, deadline=soon()) as client:
            client.add("arrived", 1)
            if number == 0:
                client.set("go", b"")
            client.get("go", deadline=soon())
            return client.add("passed", 1)

    with ThreadPoolExecutor(32) as pool:
        ranks = [pool.submit(rank, number) for number in range(32)]
        assert not wait(ranks, timeout=30).not_done
    assert sorted(r.result() for r in ranks) == list(range(1, 33))
