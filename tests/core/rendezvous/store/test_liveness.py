"""Liveness: a value is appended when a process dies, not when it closes its store; so lost ranks are found."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ferro import BackendConfig
from ferro.errors import RendezvousError, UsageError
from ferro.rendezvous import MemoryStore, StoreClient, StoreServer, StoreTimeout, connect
from ferro.rendezvous.store import memory as memory_module
from ferro.rendezvous.store import wire
from ferro.rendezvous.store.interface import StoreGone
from ferro.rendezvous.store.liveness import FailureDetector

SECRET = b"a job's secret"
NOW = 0.0  # a deadline long past: ask once
CLIENT = """
import os, sys, time
from ferro.rendezvous import StoreClient
host, port, key, how = sys.argv[1:]
store = StoreClient((host, int(port)), b"a job's secret", deadline=time.monotonic() + 20)
store.prefix("world").append_on_disconnect(key, b"gone ")
if how == "fork":
    reading, writing = os.pipe()
    if not os.fork():
        os.close(writing)
        print("ready", os.getpid(), flush=True)
        os.read(reading, 1)  # until the parent is gone
        sys.stdin.read()
        os._exit(0)
else:
    print("ready", flush=True)
sys.stdin.read(1)
if how == "close":
    store.close()
os._exit(0)
"""


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


@pytest.fixture
def start(server):
    """Start a process that registers a value for `key`; return it once that is done."""
    started: list[subprocess.Popen[str]] = []

    def one(key: str = "key", how: str = "wait") -> subprocess.Popen[str]:
        host, port = server.address
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, host, str(port), key, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        return process

    yield one
    for process in started:
        process.kill()
        process.communicate(timeout=20)


def eventually(so) -> None:
    """Wait for the server's thread to have noticed."""
    tick = threading.Event()
    for _ in range(2000):
        if so():
            return
        tick.wait(0.005)
    pytest.fail("the server never came to it")


def test_a_value_is_appended_when_the_process_is_killed_and_wakes_those_that_wait(start, client):
    start().send_signal(signal.SIGKILL)
    assert client.get("world/key", deadline=soon()) == b"gone "


def test_a_value_is_appended_when_the_process_exits_without_closing(start, client):
    process = start()
    process.communicate("x", timeout=20)
    assert client.get("world/key", deadline=soon()) == b"gone "


def test_no_value_is_appended_when_the_process_closes_its_store(server, start, client):
    client.add("n", 1)  # so the server's thread has taken it in
    first = len(server._connections)
    start(how="close").communicate("x", timeout=20)
    eventually(lambda: len(server._connections) == first)
    with pytest.raises(StoreTimeout):
        client.get("world/key", deadline=NOW)


def test_children_do_not_keep_a_dead_process_alive(start, client):
    process = start(how="fork")
    os.kill(process.pid, signal.SIGKILL)
    assert client.get("world/key", deadline=soon()) == b"gone "


def test_values_for_one_key_follow_each_other(start, client):
    for _ in range(2):
        start().kill()
    eventually(lambda: client.get("world/key", deadline=soon()) == b"gone gone ")


def test_closing_the_client_closes_all_its_connections(server):
    with StoreClient(server.address, SECRET, deadline=soon()) as client:
        client.append_on_disconnect("key", b"gone")
        client.close()
        with pytest.raises(RendezvousError, match="was closed"):
            client.append_on_disconnect("key", b"gone")
    eventually(lambda: not server._connections)
    assert server._table.get(b"key") is None


def test_there_is_one_value_to_append_for_a_store_and_its_views(client):
    client.prefix("a").append_on_disconnect("key", b"1")
    for store in (client, client.prefix("b")):
        with pytest.raises(UsageError, match="has a value already"):
            store.append_on_disconnect("other", b"2")


@pytest.mark.parametrize("store", ["memory", "tcp"])
@pytest.mark.parametrize(("key", "value"), [("", b""), ("k" * 1025, b""), ("k", bytes(1025)), ("k", "text")])
def test_what_is_out_of_bounds_is_a_usage_error(client, store, key, value):
    chosen = client if store == "tcp" else MemoryStore()
    with pytest.raises(UsageError):
        chosen.append_on_disconnect(key, value)
    chosen.append_on_disconnect("k", bytes(1024))
    if store == "memory":
        chosen.close()
        with pytest.raises(RendezvousError):
            chosen.append_on_disconnect("k", b"")


def test_a_store_that_ended_is_not_looked_for_again(monkeypatch):
    with StoreServer(secret=SECRET) as server:
        client = StoreClient(server.address, SECRET, deadline=soon())
        client.append_on_disconnect("key", b"gone")
        assert client.add("n", 1) == 1
    monkeypatch.setattr(client, "_connect", lambda **_: pytest.fail("it was looked for"))
    with client:
        for _ in range(2):
            with pytest.raises(StoreGone, match="is gone"):
                client.add("n", 1)


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("orderly", [True, False])
def test_clients_of_a_store_that_ended_know_its_host_and_how_it_ended(orderly, registered, monkeypatch):
    monkeypatch.setattr("ferro.rendezvous.auth.connect.time.sleep", lambda _: pytest.fail("it was waited for"))
    server = StoreServer(secret=SECRET)
    with StoreClient(server.address, SECRET, deadline=soon(), host=3) as client:
        if registered:
            client.append_on_disconnect("key", b"gone")
        waiting = []
        thread = threading.Thread(target=lambda: waiting.append(gone_error(lambda: client.get("k", deadline=soon()))))
        thread.start()
        eventually(lambda: server._waiting)
        assert client.add("n", 1) == 1  # so there is an idle connection, too
        server.close(orderly=orderly)
        thread.join(20)
        errors = [*waiting, *(gone_error(lambda: client.add("n", 1)) for _ in range(2))]
        assert [error.peer for error in errors] == [3, 3, 3]
        assert [error.orderly for error in errors] == [orderly, orderly, orderly]
        assert ("in good order" in str(errors[0])) is orderly


def gone_error(request) -> StoreGone:
    with pytest.raises(StoreGone) as caught:
        request()
    return caught.value


def raw(server):
    sock = connect(server.address, SECRET, purpose=wire.PURPOSE, deadline=soon())
    sock.settimeout(20)
    return sock


def ask(sock, op, key=b"key", value=b"") -> wire.ReplyStatus:
    sock.sendall(wire.encode_request(wire.Request(op, key, value=value)))
    header = b""
    while len(header) < wire.REPLY_HEADER_BYTES:
        more = sock.recv(wire.REPLY_HEADER_BYTES - len(header))
        assert more, "closed"
        header += more
    status, number, size = wire.decode_reply_header(header)
    while size:
        size -= len(sock.recv(size))
    return status, number


def test_the_server_keeps_one_value_for_a_connection_until_it_is_cancelled(server, client):
    with raw(server) as sock:
        assert ask(sock, wire.StoreOp.CANCEL_APPEND) == (wire.ReplyStatus.OK, 0)
        assert ask(sock, wire.StoreOp.APPEND_ON_DISCONNECT, value=b"1") == (wire.ReplyStatus.OK, 0)
        assert ask(sock, wire.StoreOp.APPEND_ON_DISCONNECT, value=b"2")[0] == wire.ReplyStatus.MISUSED
        assert ask(sock, wire.StoreOp.CANCEL_APPEND, b"other") == (wire.ReplyStatus.OK, 0)
        assert ask(sock, wire.StoreOp.CANCEL_APPEND) == (wire.ReplyStatus.OK, 1)
        assert ask(sock, wire.StoreOp.APPEND_ON_DISCONNECT, value=b"3") == (wire.ReplyStatus.OK, 0)
    assert client.get("key", deadline=soon()) == b"3"


def test_a_client_that_breaks_the_protocol_is_disconnected_as_well(server, client):
    with raw(server) as sock:
        ask(sock, wire.StoreOp.APPEND_ON_DISCONNECT, value=b"1")
        sock.sendall(b"\xff" * 100)
        assert client.get("key", deadline=soon()) == b"1"


def test_a_value_too_large_is_refused_by_its_header(server, client):
    with raw(server) as sock:
        request = wire.Request(wire.StoreOp.APPEND_ON_DISCONNECT, b"key", value=bytes(1025))
        sock.sendall(wire.encode_request(request)[:20])
        assert sock.recv(1) == b""
    assert client.add("key", 1) == 1


def test_a_value_for_which_there_is_no_room_harms_nobody(server, client, monkeypatch, caplog):
    client.set("key", bytes(90))
    monkeypatch.setattr(memory_module, "MAX_VALUE_BYTES", 100)
    with raw(server) as sock:
        ask(sock, wire.StoreOp.APPEND_ON_DISCONNECT, value=bytes(11))
    eventually(lambda: "was not appended" in caplog.text)
    assert client.get("key", deadline=NOW) == bytes(90)


def detector_on(server, rank: int, host: int | None = None) -> tuple[StoreClient, FailureDetector]:
    store = StoreClient(server.address, SECRET, deadline=soon(), host=host)
    return store, FailureDetector(store.prefix("world0"), rank)


def test_ranks_that_died_are_lost_and_no_others(server):
    (zero, lost), (one, _), (_two, _) = (detector_on(server, rank) for rank in (0, 1, 12))
    assert lost() == frozenset()
    one.close()  # in good order
    for connection in tuple(server._connections):
        if connection.on_disconnect == {b"world0/lost": b"12 "}:
            connection._sock.shutdown(2)  # as if its process had died
    eventually(lambda: lost() == {12})
    zero.close()
    _two.close()
    assert server._table.get(b"world0/lost") == b"12 "


def test_a_rank_that_fails_is_lost_before_it_leaves_the_store(server):
    (zero, lost), (one, _) = (detector_on(server, rank) for rank in (0, 1))
    with zero, one:
        one.declare_lost()
        eventually(lambda: lost() == {1})
        one.declare_lost()
        assert one.add("n", 1) == 1
        one.close()
        one.declare_lost()
    assert server._table.get(b"world0/lost") == b"1 "


@pytest.mark.parametrize(
    ("host", "orderly", "told"), [(0, False, {0}), (0, True, set()), (None, False, set()), (None, True, set())]
)
def test_when_the_store_is_gone_the_rank_that_hosted_it_is_lost_unless_it_left_in_good_order(host, orderly, told):
    server = StoreServer(secret=SECRET)
    store, lost = detector_on(server, 1, host)
    own, mine = detector_on(server, 0, host)
    server.close(orderly=orderly)
    with store, own:
        assert lost() == told
        assert lost() == told
        assert mine() == frozenset()


def test_alone_or_without_a_store_no_rank_is_lost():
    assert FailureDetector(MemoryStore(), 0)() == frozenset()
    assert BackendConfig(rank=0, world_size=1, store=MemoryStore()).lost() == frozenset()
