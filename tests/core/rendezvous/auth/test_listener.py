"""The listener, turned by hand: the test is the loop, so nothing depends on another thread."""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Callable

import pytest

from ferro.errors import AuthenticationError, RendezvousError
from ferro.rendezvous import Listener, listen
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.auth import listener as listener_module

SECRET = b"a job's secret"


class Loop:
    """A selector, a listener on it, and what the listener let in."""

    def __init__(self, listener: socket.socket, timeout_s: float = 60.0, limit: int = 128) -> None:
        self.address = listener.getsockname()
        self.selector = selectors.DefaultSelector()
        self.admitted: list[socket.socket] = []
        self.strangers: list[socket.socket] = []
        self.listener = Listener(
            listener,
            SECRET,
            purpose=b"store",
            selector=self.selector,
            admit=self.admitted.append,
            handshake_timeout_s=timeout_s,
            limit=limit,
        )

    def turn(self, until: Callable[[], bool]) -> None:
        """Turn the loop until something is so."""
        deadline = time.monotonic() + 10
        while not until():
            assert time.monotonic() < deadline, "the listener never came to it"
            self.listener.expire()
            for key, events in self.selector.select(0.01):
                key.data(events)

    def stranger(self) -> socket.socket:
        """A new connection, accepted by the listener."""
        accepted = self.accepted
        sock = socket.create_connection(self.address[:2], timeout=10)
        self.strangers.append(sock)
        self.turn(lambda: self.accepted == accepted + 1)
        return sock

    @property
    def accepted(self) -> int:
        """How many sockets besides the listener are on the selector."""
        return len(self.selector.get_map()) - 1

    def client(self) -> socket.socket:
        """Authenticate over a new connection, turn by turn."""
        sock = socket.create_connection(self.address[:2], timeout=10)
        self.strangers.append(sock)
        sock.setblocking(False)
        state = handshake.Handshake(handshake.client(SECRET, b"store"))
        sock.sendall(state.opening)

        def step() -> bool:
            try:
                sock.sendall(state.feed(sock.recv(state.wants)))
            except BlockingIOError:
                return False
            return state.wants == 0

        self.turn(step)
        return sock

    def close(self) -> None:
        self.listener.close()
        for sock in (*self.admitted, *self.strangers):
            sock.close()
        self.selector.close()


@pytest.fixture
def build():
    loops: list[Loop] = []

    def build(host: str = "127.0.0.1", **options: float) -> Loop:
        loops.append(Loop(listen(host), **options))
        return loops[-1]

    yield build
    for loop in loops:
        loop.close()


def gone(sock: socket.socket) -> bool:
    """Whether the other end closed without a word."""
    try:
        return sock.recv(64) == b""
    except ConnectionResetError:
        return True


def test_a_client_is_handed_on_blocking_and_off_the_selector(build):
    loop = build()
    client = loop.client()
    (admitted,) = loop.admitted
    assert admitted.getblocking()
    assert admitted.gettimeout() is None
    assert admitted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert loop.accepted == 0
    client.sendall(b"what follows is not the listener's")
    admitted.settimeout(10)
    assert admitted.recv(64) == b"what follows is not the listener's"


def test_bytes_sent_ahead_of_the_verdict_are_left_to_the_owner(build):
    loop = build()
    sock = loop.stranger()
    state = handshake.Handshake(handshake.client(SECRET, b"store"))
    sock.sendall(state.opening)
    loop.turn(lambda: bool(readable(sock)))
    proof = b""
    while not proof:
        proof = state.feed(sock.recv(state.wants))
    sock.sendall(proof + b"early")
    loop.turn(lambda: bool(loop.admitted))
    loop.admitted[0].settimeout(10)
    assert loop.admitted[0].recv(64) == b"early"


def readable(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def test_the_silent_are_dropped_when_their_time_is_up(build):
    loop = build(timeout_s=0.05)
    assert loop.listener.expire() is None
    sock = loop.stranger()
    due = loop.listener.expire()
    assert due is None or due <= time.monotonic() + 0.05
    loop.turn(lambda: loop.accepted == 0)
    assert gone(sock)
    assert loop.listener.expire() is None
    assert loop.admitted == []


def test_over_the_limit_the_oldest_stranger_goes_and_clients_still_come(build):
    loop = build(limit=3)
    strangers = [loop.stranger() for _ in range(3)]
    loop.client()
    assert len(loop.admitted) == 1
    assert gone(strangers[0])
    assert loop.accepted == 2
    newest = socket.create_connection(loop.address[:2], timeout=10)
    loop.strangers.append(newest)
    loop.turn(lambda: loop.accepted == 3)
    loop.client()
    assert gone(strangers[1])
    assert len(loop.admitted) == 2


def test_a_connection_that_leaves_is_forgotten(build):
    loop = build()
    loop.stranger().close()
    loop.turn(lambda: loop.accepted == 0)
    assert loop.admitted == []


def test_a_connection_dropped_in_the_same_turn_is_not_heard_again(build):
    loop = build(limit=1)
    first = loop.stranger()
    # Both the first connection's bytes and the second's arrival are ready in one select.
    first.sendall(b"GET / HTTP/1.1\r\n\r\n")
    second = socket.create_connection(loop.address[:2], timeout=10)
    loop.strangers.append(second)
    loop.turn(lambda: gone_now(first))
    loop.client()
    assert len(loop.admitted) == 1


def gone_now(sock: socket.socket) -> bool:
    return readable(sock) and gone(sock)


class Exhausted(socket.socket):
    """A listener in a process that is, twice, out of file descriptors."""

    failures = 2

    def accept(self):
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_file_descriptors_the_listener_pauses_and_comes_back(monkeypatch):
    monkeypatch.setattr(listener_module, "_ACCEPT_PAUSE_S", 0.01)
    listener = Exhausted(fileno=listen("127.0.0.1").detach())
    loop = Loop(listener)
    try:
        loop.client()
        assert listener.failures == 0
        assert len(loop.admitted) == 1
    finally:
        loop.close()


class Full(socket.socket):
    """An accepted socket without room for even a small reply."""

    def send(self, data: bytes) -> int:
        raise BlockingIOError


def test_a_connection_without_room_for_the_reply_is_dropped(build):
    loop = build()
    sock = loop.stranger()
    (accepted,) = loop.listener._pending
    full = Full(fileno=accepted.detach())
    loop.listener._pending = {full: loop.listener._pending.pop(accepted)}
    state = handshake.Handshake(handshake.server(SECRET, b"store"))
    loop.selector._fd_to_key[full.fileno()] = loop.selector.get_map()[full.fileno()]._replace(
        fileobj=full, data=lambda events: loop.listener._read(full, state, events)
    )
    sock.sendall(handshake.Handshake(handshake.client(SECRET, b"store")).opening)
    loop.turn(lambda: loop.accepted == 0)
    assert gone(sock)


def test_close_leaves_nothing_and_may_be_repeated(build):
    loop = build()
    sock = loop.stranger()
    loop.listener.close()
    loop.listener.close()
    assert gone(sock)
    assert len(loop.selector.get_map()) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(loop.address[:2], timeout=10)


def test_an_empty_secret_guards_nothing():
    with listen("127.0.0.1") as listener, selectors.DefaultSelector() as selector:
        with pytest.raises(AuthenticationError, match="empty"):
            Listener(listener, b"", purpose=b"x", selector=selector, admit=print)
        assert len(selector.get_map()) == 0


def test_a_port_in_use_is_named_with_its_remedy():
    with listen("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError, match=rf"127\.0\.0\.1:{port}.*in use.*another port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(RendezvousError, match=r"192\.0\.2\.1:0.*address of this machine"):
        listen("192.0.2.1")
