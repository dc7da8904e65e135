"""The listening end: lets members in, and keeps strangers from holding anything up.

A gate lives on a selector that its owner drives: `for key, events in selector.select(t):
key.data(events)`. All visitors are authenticated at once, without blocking; each costs one
socket and at most 32 bytes of what it sent.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from ferro.errors import RendezvousError
from ferro.rendezvous.auth import handshake
from ferro.rendezvous.auth.addresses import show_address, tune

_BACKLOG = 1024
_ACCEPTS_PER_EVENT = 16  # then members get their turn
_REST_S = 0.1  # after the system could not give us another socket

_log = logging.getLogger(__name__)


def listen(host: str, port: int = 0) -> socket.socket:
    """Open a listening socket.

    Args:
        host: the address to listen on, IPv4, IPv6 or a name; "" for all addresses.
        port: 0 lets the system choose; `getsockname()` tells.

    Raises:
        RendezvousError: the address is taken, is not ours, or cannot be resolved.
    """
    where = show_address(host, port)
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, sockaddr = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(sockaddr)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        raise RendezvousError(
            f"cannot listen on {where}: {exc.strerror or exc}. Another job may still use that "
            f"port: end it or choose another port (0 takes a free one); and check that the host "
            f"is an address of this machine."
        ) from exc
    return sock


@dataclass(slots=True, eq=False)
class _Visitor:
    """A connection that has not yet proved anything."""

    sock: socket.socket
    conversation: handshake.Handshake
    deadline: float


class Listener:
    """Accepts connections, authenticates them, and hands on those that hold the secret.

    Not thread-safe: the thread that drives the selector makes every call.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: bytes,
        *,
        purpose: bytes,
        selector: selectors.BaseSelector,
        admit: Callable[[socket.socket], None],
        handshake_timeout_s: float = 5.0,
        limit: int = 128,
    ) -> None:
        """Start accepting, as soon as the selector is driven.

        Args:
            listener: from `listen`; the gate owns it from here on.
            secret: the job's.
            purpose: the service behind this gate, such as b"store".
            selector: driven by the caller, whose `key.data` are called with the events.
            admit: is given each authenticated socket: blocking, and no longer registered.
            handshake_timeout_s: how long a visitor may take to prove itself.
            limit: how many visitors there may be; one more, and the oldest is dropped.

        Raises:
            AuthenticationError: `secret` is empty; the listener is untouched.
        """
        handshake.require_secret(secret)
        self._listener = listener
        self._secret = secret
        self._purpose = purpose
        self._selector = selector
        self._admit = admit
        self._timeout_s = handshake_timeout_s
        self._limit = limit
        # In order of arrival, and so of deadlines.
        self._visitors: dict[_Visitor, None] = {}
        self._rests_until: float | None = None
        self.refused = 0  # how many came with another secret
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def expire(self) -> float | None:
        """Drop visitors that took too long; call it once per turn of the loop.

        Returns:
            The `time.monotonic()` second by which to call again, or None when nothing is due.
        """
        now = time.monotonic()
        if self._rests_until is not None and self._rests_until <= now:
            self._rests_until = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        while self._visitors and self._oldest().deadline <= now:
            self._drop(self._oldest())
        due = [self._oldest().deadline] if self._visitors else []
        if self._rests_until is not None:
            due.append(self._rests_until)
        return min(due, default=None)

    def close(self) -> None:
        """Close the listener and every connection not yet admitted; idempotent."""
        if self._listener.fileno() < 0:
            return
        for visitor in tuple(self._visitors):
            self._drop(visitor)
        if self._rests_until is None:
            self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self, _events: int) -> None:
        for _ in range(_ACCEPTS_PER_EVENT):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                self._rest(exc)
                return
            self._greet(sock)

    def _rest(self, exc: OSError) -> None:
        """Without a free file descriptor the listener stays readable, and the loop would spin."""
        _log.warning("the %r gate rests for %s s: %s", self._purpose, _REST_S, exc)
        if self._visitors:
            self._drop(self._oldest())
        self._selector.unregister(self._listener)
        self._rests_until = time.monotonic() + _REST_S

    def _greet(self, sock: socket.socket) -> None:
        if len(self._visitors) >= self._limit:
            self._drop(self._oldest())
        sock.setblocking(False)
        conversation = handshake.server(self._secret, self._purpose)
        visitor = _Visitor(sock, conversation, time.monotonic() + self._timeout_s)
        self._visitors[visitor] = None
        self._selector.register(sock, selectors.EVENT_READ, partial(self._hear, visitor))

    def _hear(self, visitor: _Visitor, _events: int) -> None:
        if visitor not in self._visitors:
            return  # dropped by an earlier event of the same turn
        conversation, sock = visitor.conversation, visitor.sock
        try:
            data = sock.recv(conversation.wants)
            reply = conversation.feed(data)
            # At most 40 bytes into an empty buffer: whoever has no room for them stays out.
            delivered = bool(data) and sock.send(reply) == len(reply)
        except BlockingIOError:
            return
        except OSError:
            delivered = False
        except handshake.HandshakeError as exc:
            self.refused += isinstance(exc, handshake.WrongSecretError)
            _log.info("the %r gate turned a connection away: %s", self._purpose, exc)
            with suppress(OSError):
                sock.send(exc.reply)
            delivered = False
        if not delivered:
            self._drop(visitor)
        elif not conversation.wants:
            self._let_in(visitor)

    def _let_in(self, visitor: _Visitor) -> None:
        del self._visitors[visitor]
        self._selector.unregister(visitor.sock)
        visitor.sock.setblocking(True)
        try:
            tune(visitor.sock)
        except OSError:  # it left right after its proof
            visitor.sock.close()
            return
        self._admit(visitor.sock)

    def _oldest(self) -> _Visitor:
        return next(iter(self._visitors))

    def _drop(self, visitor: _Visitor) -> None:
        del self._visitors[visitor]
        self._selector.unregister(visitor.sock)
        visitor.sock.close()
