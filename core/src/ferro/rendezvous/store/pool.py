"""The connections of one store client: lent to one request each, then kept for the next."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ferro.errors import RendezvousError
from ferro.rendezvous.auth.addresses import remaining_s

MAX_CONNECTIONS = 64

# The store answered before, so a further connection comes at once or, after a retry or two,
# not at all.
_CONNECT_S = 5.0


class ConnectionPool:
    """Up to 64 authenticated connections, opened as needed. Thread-safe."""

    def __init__(self, open_one: Callable[[float], socket.socket]) -> None:
        """Start empty.

        Args:
            open_one: makes a connection before the deadline it is given.
        """
        self._open_one = open_one
        self._changed = threading.Condition()
        self._idle: list[socket.socket] = []
        self._lent: set[socket.socket] = set()
        self._opening = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def put(self, sock: socket.socket) -> None:
        """Add a connection, or close it when the pool is closed."""
        with self._changed:
            self._lent.discard(sock)
            if self._closed:
                sock.close()
            else:
                self._idle.append(sock)
                self._changed.notify()

    @contextmanager
    def lend(self, deadline: float) -> Iterator[socket.socket]:
        """A connection for one request; whatever leaves the block by exception closes it.

        Raises:
            TimeoutError: all connections were in use until the deadline.
            RendezvousError: a new one could not be made, or the pool is closed.
        """
        sock = self._take(deadline)
        try:
            yield sock
        except BaseException:
            # Half a request or half a reply may be under way: nobody can use it again.
            with self._changed:
                self._lent.discard(sock)
                self._changed.notify()
            sock.close()
            raise
        self.put(sock)

    def close(self) -> None:
        """Close idle connections and wake whoever waits on another; idempotent."""
        with self._changed:
            self._closed = True
            for sock in self._idle:
                sock.close()
            self._idle.clear()
            for sock in self._lent:
                with suppress(OSError):  # the store may have gone first
                    sock.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()

    def _take(self, deadline: float) -> socket.socket:
        with self._changed:
            while True:
                if self._closed:
                    raise RendezvousError("this store client was closed")
                if self._idle:
                    sock = self._idle.pop()
                    self._lent.add(sock)
                    return sock
                if len(self._lent) + self._opening < MAX_CONNECTIONS:
                    self._opening += 1
                    break
                if not self._changed.wait(remaining_s(deadline)):
                    raise TimeoutError(f"all {MAX_CONNECTIONS} connections are in use")
        return self._open(min(deadline, time.monotonic() + _CONNECT_S))

    def _open(self, deadline: float) -> socket.socket:
        try:
            sock = self._open_one(deadline)
        except BaseException:
            with self._changed:
                self._opening -= 1
                self._changed.notify()
            raise
        with self._changed:
            self._opening -= 1
            if not self._closed:
                self._lent.add(sock)
                return sock
        sock.close()
        raise RendezvousError("this store client was closed")
