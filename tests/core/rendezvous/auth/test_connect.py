"""The connecting end: what it waits for, what it does not, and what it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ferro.errors import AuthenticationError, RendezvousError
from ferro.rendezvous import StoreServer, connect, listen
from ferro.rendezvous.auth import connect as connect_module
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.store import server as server_module

SECRET = b"a job's secret"


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@contextmanager
def service(serve: Callable[[socket.socket], None], times: int = 1) -> Iterator[tuple[str, int]]:
    """A foreign service that treats so many connections with `serve`."""
    with listen("127.0.0.1") as listener:
        listener.settimeout(20)

        def run() -> None:
            for _ in range(times):
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(20)
                    serve(sock)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            thread.join(30)
            assert not thread.is_alive()


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more
        data += more
    return data


def test_the_socket_is_blocking_and_sends_small_messages_at_once():
    with (
        StoreServer(secret=SECRET) as server,
        connect(server.address, SECRET, purpose=b"store", deadline=soon()) as sock,
    ):
        assert sock.gettimeout() is None
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_service_that_starts_later_is_found(monkeypatch):
    refusals = []
    servers = []
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, but nobody listens: connections are refused

        def start_listening(host: str, port: int) -> socket.socket:
            bound.listen()
            return bound

        def pause(seconds: float) -> None:
            refusals.append(seconds)
            if len(refusals) == 3:
                servers.append(StoreServer(secret=SECRET))

        monkeypatch.setattr(server_module, "listen", start_listening)
        monkeypatch.setattr(connect_module.time, "sleep", pause)
        address = bound.getsockname()
        try:
            connect(address, SECRET, purpose=b"store", deadline=soon()).close()
        finally:
            for server in servers:
                server.close()
    assert refusals == [0.01, 0.02, 0.04]


def test_a_store_that_never_comes_is_reported_with_all_that_helps():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(RendezvousError) as error:
            connect(("localhost", port), SECRET, purpose=b"store", deadline=soon(0.5))
    message = str(error.value)
    assert type(error.value) is RendezvousError
    for part in (f"localhost:{port}", f"127.0.0.1:{port}", "refused", "pid", "firewall", " s;"):
        assert part in message


def test_a_deadline_that_has_passed_tries_nothing_in_vain():
    with pytest.raises(RendezvousError, match="deadline"):
        connect(("127.0.0.1", 1), SECRET, purpose=b"store", deadline=soon(-1))


def test_an_unknown_host_is_named(monkeypatch):
    def unknown(*_args: object, **_options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(RendezvousError, match="host name could not be resolved"):
        connect(("nowhere", 1), SECRET, purpose=b"store", deadline=soon(0.02))


def test_a_foreign_service_is_recognised_at_once():
    def http(sock: socket.socket) -> None:
        receive(sock, 40)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with service(http) as address, pytest.raises(RendezvousError, match="not ferro") as error:
        connect(address, SECRET, purpose=b"store", deadline=soon())
    assert "nothing else took it" in str(error.value)


def test_a_mirror_is_a_foreign_service():
    with (
        service(lambda sock: sock.sendall(receive(sock, 40))) as address,
        pytest.raises(RendezvousError, match="not ferro"),
    ):
        connect(address, SECRET, purpose=b"store", deadline=soon())


def test_a_service_that_says_nothing_is_not_waited_for_beyond_the_deadline():
    with listen("127.0.0.1") as silent, pytest.raises(RendezvousError, match="does not answer"):
        connect(silent.getsockname(), SECRET, purpose=b"store", deadline=soon(0.1))


def test_a_server_that_reflects_our_proof_is_refused():
    def reflect(sock: socket.socket) -> None:
        nonce = receive(sock, 40)[8:]
        sock.sendall(b"\xf3FERROS\1" + nonce)
        sock.sendall(receive(sock, 32))

    with service(reflect) as address, pytest.raises(AuthenticationError, match="could not prove"):
        connect(address, SECRET, purpose=b"store", deadline=soon())


def test_a_server_that_replays_a_recorded_one_is_refused():
    recorded = b""
    with StoreServer(secret=SECRET) as server, socket.create_connection(server.address, 20) as sock:
        state = handshake.Handshake(handshake.client(SECRET, b"store"))
        sock.sendall(state.opening)
        while state.wants:
            data = sock.recv(state.wants)
            recorded += data
            sock.sendall(state.feed(data))

    def replay(sock: socket.socket) -> None:
        receive(sock, 40)
        sock.sendall(recorded[:40])
        receive(sock, 32)
        sock.sendall(recorded[40:])

    assert len(recorded) == 72
    with service(replay) as address, pytest.raises(AuthenticationError, match="could not prove"):
        connect(address, SECRET, purpose=b"store", deadline=soon())


def hang_up_after_proof(sock: socket.socket) -> None:
    receive(sock, 40)
    sock.sendall(b"\xf3FERROS\1" + bytes(32))
    receive(sock, 32)


def test_hanging_up_after_our_proof_every_time_is_a_refusal():
    with service(hang_up_after_proof, times=3) as address, pytest.raises(AuthenticationError, match="FERRO_SECRET"):
        connect(address, SECRET, purpose=b"store", deadline=soon())


def test_being_dropped_before_the_verdict_once_is_bad_luck():
    calls = []

    def drop_then_serve(sock: socket.socket) -> None:
        calls.append(sock)
        if len(calls) == 1:
            hang_up_after_proof(sock)
            return
        state = handshake.Handshake(handshake.server(SECRET, b"store"))
        while state.wants:
            sock.sendall(state.feed(sock.recv(state.wants)))

    with service(drop_then_serve, times=2) as address:
        connect(address, SECRET, purpose=b"store", deadline=soon()).close()
    assert len(calls) == 2


@pytest.mark.parametrize("purpose", [b"mesh", b""])
def test_a_connection_for_another_purpose_does_not_get_in(purpose):
    with StoreServer(secret=SECRET) as server, pytest.raises(AuthenticationError, match="port to its"):
        connect(server.address, SECRET, purpose=purpose, deadline=soon())


def test_a_wrong_secret_is_told_at_once_and_not_retried(monkeypatch):
    monkeypatch.setattr(connect_module.time, "sleep", lambda _: pytest.fail("it was retried"))
    with (
        StoreServer(secret=SECRET) as server,
        pytest.raises(AuthenticationError, match=r"refused our secret.*FERRO_SECRET"),
    ):
        connect(server.address, b"another", purpose=b"store", deadline=soon(3600))


def test_an_absent_secret_is_told_before_anything_is_sent():
    with pytest.raises(AuthenticationError, match="empty"):
        connect(("127.0.0.1", 1), b"", purpose=b"store", deadline=soon())


def test_ipv6_loopback():
    try:
        server = StoreServer("::1", secret=SECRET)
    except RendezvousError as exc:
        pytest.skip(f"no IPv6 loopback here: {exc.__cause__}")
    with server:
        assert server.address[0] == "::1"
        with connect(server.address, SECRET, purpose=b"store", deadline=soon()) as sock:
            assert sock.family == socket.AF_INET6
        with pytest.raises(AuthenticationError, match=r"\[::1\]:"):
            connect(server.address, b"another", purpose=b"store", deadline=soon())
