"""Liveness: a connection that tells the store when its process ends, and the detection of lost ranks by it."""

from __future__ import annotations

import os
import socket
import time
import weakref
from contextlib import suppress

from ferro.errors import FerroError
from ferro.rendezvous.store import wire
from ferro.rendezvous.store.interface import Store, StoreGone

_CANCEL_S = 1.0  # for a few bytes, which a working system takes at once
_LOST_KEY = "lost"  # holds ranks in decimal, each followed by a blank


class LivenessConnection:
    """A connection whose end makes the store append a value to `key`, unless `cancel` was called before."""

    def __init__(self, sock: socket.socket, key: bytes) -> None:
        self.sock = sock
        self._key = key
        self.store_left = False  # the store said, before it ended, that its host leaves in good order
        _connections.add(self)

    def register(self, request: wire.Request, deadline: float) -> wire.Reply:
        reply = wire.exchange(self.sock, request, deadline)
        self.sock.setblocking(False)
        return reply

    def ended(self) -> bool:
        """Say whether the store has ended, which closes all its connections."""
        try:
            # A store sends nothing here but a CLOSED reply.
            self.store_left = bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def cancel(self) -> None:
        """Close the connection with nothing appended. Idempotent; never raises."""
        with suppress(OSError):  # the store went first, or this was closed before
            self.sock.settimeout(_CANCEL_S)
            # The reply is not waited for: the store reads these bytes before it sees the end.
            self.sock.sendall(wire.encode_request(wire.Request(wire.StoreOp.CANCEL_APPEND, self._key)))
        self.sock.close()

    def break_off(self) -> None:
        """Close the connection as this process's death would. Idempotent."""
        with suppress(OSError):  # the store went first, or this was closed before
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


_connections: weakref.WeakSet[LivenessConnection] = weakref.WeakSet()


def _close_copies() -> None:
    for connection in _connections:
        connection.sock.close()


if hasattr(os, "register_at_fork"):
    # A child that outlives its parent must not keep the parent's connection alive.
    os.register_at_fork(after_in_child=_close_copies)


class FailureDetector:
    """Lists the lost ranks of a world when called, and registers this rank, so that the others learn of its end.

    A rank is lost when its process ends without closing its store, as one that is killed does, or when it fails: see
    `ProcessGroup.abandon`. The store then appends it to one key, so that one request finds all lost ranks. When the
    store is gone, the rank that hosted it is lost, unless it left in good order.

    The constructor raises RendezvousError when the store is gone.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._store_gone = False
        self._lost: frozenset[int] = frozenset()
        store.append_on_disconnect(_LOST_KEY, b"%d " % rank)

    def __call__(self) -> frozenset[int]:
        """Ask for the lost ranks other than this one; never raises. A store that is gone is not asked again."""
        if not self._store_gone:
            try:
                ranks = self._store.get(_LOST_KEY, deadline=time.monotonic())
                self._lost = frozenset(map(int, ranks.split()))
            except TimeoutError:  # no rank is lost, or the store is slow
                pass
            except FerroError as error:
                self._store_gone = True
                if isinstance(error, StoreGone) and error.peer is not None and not error.orderly:
                    self._lost |= {error.peer}
        return self._lost - {self._rank}
