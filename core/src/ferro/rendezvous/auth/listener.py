"""The server's end of a connection: accept many side by side, and hand on those whose client holds the secret.

A listener lives on a selector that its owner drives: `for key, events in selector.select(t): key.data(events)`. Pending
connections are authenticated without blocking, so none delays another; each costs a socket and at most 32 bytes.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

from ferro.errors import RendezvousError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.sockets import bound_socket, close_in_children, set_options
from ferro.runtime.environment import format_address

_BACKLOG = 1024
_ACCEPTS_PER_EVENT = 16  # afterwards the selector's other sockets are served
_ACCEPT_PAUSE_S = 0.1  # after the system could not give us another socket

_log = logging.getLogger(__name__)


def listen(host: str, port: int = 0) -> socket.socket:
    """Open a listening socket; host and port are as in `bound_socket`, and port 0 is a free one."""
    try:
        with ExitStack() as stack:
            sock = stack.enter_context(bound_socket(host, port))
            sock.listen(_BACKLOG)
            stack.pop_all()
            return sock
    except OSError as exc:
        where = format_address((host, port)) if host else f"port {port} of all addresses"
        raise RendezvousError(
            f"cannot listen on {where}: {exc.strerror or exc}. Another job may still use that port: end it or choose "
            "another port (0 takes a free one); and check that the host is an address of this machine."
        ) from exc


@dataclass(eq=False, repr=False)
class Listener:
    """Accepts connections, authenticates them, and hands on those whose client holds the secret.

    Not thread-safe: the thread that drives the selector makes every call. An empty secret raises AuthenticationError,
    and leaves the socket untouched.
    """

    sock: socket.socket  # from `listen`; this object owns it from here on
    secret: bytes
    _: KW_ONLY
    purpose: bytes  # the service that listens, such as b"store"
    selector: selectors.BaseSelector
    admit: Callable[[socket.socket], None]  # takes each authenticated socket: blocking, and no longer registered
    handshake_timeout_s: float = 5.0
    limit: int = 128  # of pending connections; a further one replaces the oldest
    refused: int = field(default=0, init=False)  # counts the connections that came with another secret
    # The connections that are not authenticated yet, each with its deadline, the earliest first.
    _pending: dict[socket.socket, float] = field(default_factory=dict, init=False)
    _paused_until: float | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        handshake.require_secret(self.secret)
        self.sock.setblocking(False)
        self.selector.register(self.sock, selectors.EVENT_READ, self._accept)

    def expire(self) -> float | None:
        """Drop connections that took too long; return the next deadline. The owner's loop calls it in each turn."""
        now = time.monotonic()
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            self.selector.register(self.sock, selectors.EVENT_READ, self._accept)
        for sock, deadline in tuple(self._pending.items()):
            if deadline <= now:
                self._drop(sock)
        return min((at for at in (*self._pending.values(), self._paused_until) if at is not None), default=None)

    def close(self) -> None:
        """Close the listener and every pending connection; idempotent."""
        if self.sock.fileno() < 0:
            return
        for sock in tuple(self._pending):
            self._drop(sock)
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
                self._drop_oldest()
            close_in_children(sock).setblocking(False)
            self._pending[sock] = time.monotonic() + self.handshake_timeout_s
            state = handshake.Handshake(handshake.server(self.secret, self.purpose))
            self.selector.register(sock, selectors.EVENT_READ, partial(self._read, sock, state))

    def _pause(self, exc: OSError) -> None:
        """Stop accepting for a while: without a free file descriptor the loop would spin."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "ferro: the %s at port %d cannot take another connection (%s), and tries again: allow this process, "
                "%d, more open files (ulimit -n), or start fewer ranks",
                *(self.purpose.decode(errors="replace"), self.sock.getsockname()[1], exc, os.getpid()),
            )
        if self._pending:
            self._drop_oldest()
        self.selector.unregister(self.sock)
        self._paused_until = time.monotonic() + _ACCEPT_PAUSE_S

    def _read(self, sock: socket.socket, state: handshake.Handshake, _events: int) -> None:
        if sock not in self._pending:
            return  # an earlier event of the same turn dropped it
        try:
            try:
                data = sock.recv(state.wants)
            except BlockingIOError:
                return
            reply = state.feed(data)
            # At most 40 bytes go into an empty buffer: a connection without room for them is dropped.
            if not data or sock.send(reply) != len(reply):
                raise ConnectionResetError
            if state.wants:
                return
            set_options(sock)
        except OSError:  # the client may have left right after its proof, or there was no room for the reply
            self._drop(sock)
        except handshake.HandshakeError as exc:
            self.refused += isinstance(exc, handshake.WrongSecretError)
            _log.info("the %r listener turned a connection away: %s", self.purpose, exc)
            with suppress(OSError):
                sock.send(exc.reply)
            self._drop(sock)
        else:
            self._forget(sock)
            sock.setblocking(True)
            self.admit(sock)

    def _forget(self, sock: socket.socket) -> None:
        del self._pending[sock]
        self.selector.unregister(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._pending)))
