"""The driver's end of the connection to one rank."""

from __future__ import annotations

import json
import socket
from typing import Any

from ferro.errors import BackendError
from ferro_bench.rank.channel import LENGTH, MAX_MESSAGE_BYTES, encode

_SEND_S = 5.0  # an order fits into the socket's buffer
_READ_BYTES = 1 << 16


class Link:
    """Messages to and from one rank, received without blocking."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over an authenticated socket."""
        sock.settimeout(_SEND_S)
        self._sock = sock
        self._received = bytearray()

    def fileno(self) -> int:
        """Return the socket's descriptor, for a selector."""
        return self._sock.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            OSError: the rank has left.
        """
        self._sock.sendall(encode(message))

    def receive(self) -> dict[str, Any] | None:
        """Read once; return the message when it is whole.

        Raises:
            EOFError: the rank has left.
            BackendError: the rank announces a message that is too large.
        """
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            raise EOFError
        self._received += data
        if len(self._received) < LENGTH.size:
            return None
        (size,) = LENGTH.unpack_from(self._received)
        if size > MAX_MESSAGE_BYTES:
            raise BackendError(f"a rank announced a message of {size} bytes; it is damaged")
        if len(self._received) < LENGTH.size + size:
            return None
        # A rank sends only replies, so no further message can follow.
        message: dict[str, Any] = json.loads(self._received[LENGTH.size :])
        self._received.clear()
        return message

    def close(self) -> None:
        """Close the connection: the rank ends, unless it already has."""
        self._sock.close()
