"""The listening end: hands on connections that hold the secret, and lets strangers hold nothing up.

A listener lives on a selector that its owner drives: `for key, events in selector.select(t): key.data(events)`. Pending
connections are authenticated side by side, without blocking; each costs a socket and at most 32 bytes of what it sent.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

from ferro.errors import RendezvousError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.sockets import set_options, show_address

_BACKLOG = 1024
_ACCEPTS_PER_EVENT = 16  # then the selector's other sockets get their turn
_ACCEPT_PAUSE_S = 0.1  # after the system could not give us another socket

_log = logging.getLogger(__name__)


def listen(host: str, port: int = 0) -> socket.socket:
    """Open a listening socket at an IPv4 or IPv6 address or a name; "" means all addresses, port 0 a free one.

    Raises:
        RendezvousError: the address is taken, is not ours, or cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, sockaddr = found[0]
        with ExitStack() as stack:
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(sockaddr)
            sock.listen(_BACKLOG)
            stack.pop_all()
            return sock
    except OSError as exc:
        raise RendezvousError(
            f"cannot listen on {show_address(host, port)}: {exc.strerror or exc}. Another job may still use that port: "
            "end it or choose another port (0 takes a free one); and check that the host is an address of this "
            "machine."
        ) from exc


@dataclass(slots=True, eq=False)
class _PendingConnection:
    """A connection that has not yet proved anything."""

    sock: socket.socket
    state: handshake.Handshake
    deadline: float


@dataclass(eq=False, repr=False)
class Listener:
    """Accepts connections, authenticates them, and hands on those that hold the secret.

    Not thread-safe: the thread that drives the selector makes every call. An empty secret raises AuthenticationError,
    and leaves the socket untouched.
    """

    sock: socket.socket  # from `listen`; this object owns it from here on
    secret: bytes
    _: KW_ONLY
    purpose: bytes  # the service that listens, such as b"store"
    selector: selectors.BaseSelector
    admit: Callable[[socket.socket], None]  # is given each authenticated socket: blocking, and no longer registered
    handshake_timeout_s: float = 5.0
    limit: int = 128  # of pending connections; one more, and the oldest is dropped
    refused: int = field(default=0, init=False)  # counts the connections that came with another secret
    _pending: dict[_PendingConnection, None] = field(default_factory=dict, init=False)  # in order of their deadlines
    _paused_until: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        handshake.require_secret(self.secret)
        self.sock.setblocking(False)
        self.selector.register(self.sock, selectors.EVENT_READ, self._accept)

    def expire(self) -> float | None:
        """Drop connections that took too long; return the second by which to call again, None when nothing is due.

        The caller does this once per turn of its loop.
        """
        now = time.monotonic()
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            self.selector.register(self.sock, selectors.EVENT_READ, self._accept)
        while self._pending and self._oldest().deadline <= now:
            self._drop(self._oldest())
        due = [self._oldest().deadline] if self._pending else []
        if self._paused_until is not None:
            due.append(self._paused_until)
        return min(due, default=None)

    def close(self) -> None:
        """Close the listener and every pending connection; idempotent."""
        if self.sock.fileno() < 0:
            return
        for pending in tuple(self._pending):
            self._drop(pending)
        if self._paused_until is None:
            self.selector.unregister(self.sock)
        self.sock.close()

    def _accept(self, _events: int) -> None:
        for _ in range(_ACCEPTS_PER_EVENT):
            try:
                sock, _address = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                self._pause(exc)
                return
            if len(self._pending) >= self.limit:
                self._drop(self._oldest())
            sock.setblocking(False)
            state = handshake.server(self.secret, self.purpose)
            pending = _PendingConnection(sock, state, time.monotonic() + self.handshake_timeout_s)
            self._pending[pending] = None
            self.selector.register(sock, selectors.EVENT_READ, partial(self._read, pending))

    def _pause(self, exc: OSError) -> None:
        """Stop accepting for a while: without a free file descriptor the loop would spin."""
        _log.warning("the %r listener pauses for %s s: %s", self.purpose, _ACCEPT_PAUSE_S, exc)
        if self._pending:
            self._drop(self._oldest())
        self.selector.unregister(self.sock)
        self._paused_until = time.monotonic() + _ACCEPT_PAUSE_S

    def _read(self, pending: _PendingConnection, _events: int) -> None:
        if pending not in self._pending:
            return  # an earlier event of the same turn dropped it
        state, sock = pending.state, pending.sock
        try:
            data = sock.recv(state.wants)
            reply = state.feed(data)
            # At most 40 bytes go into an empty buffer: a connection without room for them is dropped.
            good = bool(data) and sock.send(reply) == len(reply)
            if good and state.wants:
                return
            if good:
                set_options(sock)
        except BlockingIOError:
            return
        except OSError:  # it may have left right after its proof
            good = False
        except handshake.HandshakeError as exc:
            self.refused += isinstance(exc, handshake.WrongSecretError)
            _log.info("the %r listener turned a connection away: %s", self.purpose, exc)
            with suppress(OSError):
                sock.send(exc.reply)
            good = False
        self._forget(pending)
        if good:
            sock.setblocking(True)
            self.admit(sock)
        else:
            sock.close()

    def _forget(self, pending: _PendingConnection) -> None:
        del self._pending[pending]
        self.selector.unregister(pending.sock)

    def _oldest(self) -> _PendingConnection:
        return next(iter(self._pending))

    def _drop(self, pending: _PendingConnection) -> None:
        self._forget(pending)
        pending.sock.close()
