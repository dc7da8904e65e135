"""A client's last will: a connection whose end tells the store that this process has ended."""

from __future__ import annotations

import os
import socket
import weakref
from contextlib import suppress

from ferro.rendezvous.store import wire
from ferro.rendezvous.store.exchange import exchange

_FAREWELL_S = 1.0  # for a few bytes that the system takes at once, unless all is lost anyway


class Will:
    """A connection kept for its end alone; the store acts when it breaks without a farewell.

    Args:
        sock: authenticated; the will owns it from here on.
        key: what the store is to append to.
    """

    def __init__(self, sock: socket.socket, key: bytes) -> None:
        self._sock = sock
        self._key = key
        _wills.add(self)

    def register(self, value: bytes, deadline: float) -> wire.Reply:
        """Ask the store to keep it; return the store's reply. See `exchange`."""
        request = wire.Request(wire.Op.WILL, self._key, value=value)
        reply = exchange(self._sock, request, deadline)
        self._sock.setblocking(False)
        return reply

    def broken(self) -> bool:
        """Say whether the store's end of the connection is closed: it closes all when it ends."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def withdraw(self) -> None:
        """Say farewell and close the connection. Idempotent; never raises.

        The reply is not waited for: the store reads these bytes before it sees the end.
        """
        with suppress(OSError):  # the store went first, or this was closed before
            self._sock.settimeout(_FAREWELL_S)
            self._sock.sendall(wire.encode_request(wire.Request(wire.Op.WITHDRAW, self._key)))
        self._sock.close()

    def carry_out(self) -> None:
        """Close the connection without a farewell, as this process's death would. Idempotent."""
        with suppress(OSError):  # the store went first, or this was closed before
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def disown(self) -> None:
        """Close this process's copy of the connection, which is another one's."""
        self._sock.close()


_wills: weakref.WeakSet[Will] = weakref.WeakSet()


def _disown_all() -> None:
    for will in _wills:
        will.disown()


if hasattr(os, "register_at_fork"):
    # A child that outlives its parent must not keep the parent's connection alive.
    os.register_at_fork(after_in_child=_disown_all)
