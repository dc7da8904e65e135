"""One authenticated connection of the store's server, on its selector.

A member sends one request and waits for the reply. So there is never more to hold than one
request or one reply, and a member that sends ahead of its reply is disconnected.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

from ferro.rendezvous.store import wire

_READ_BYTES = 256 << 10


class Member:
    """Reads a request, hands it to `answer`, writes the reply given to `reply`, and again.

    Attributes:
        will: key, and what the server appends to it when this connection ends; None for nothing.
    """

    def __init__(
        self,
        sock: socket.socket,
        selector: selectors.BaseSelector,
        *,
        answer: Callable[[Member, wire.Request], None],
        forget: Callable[[Member], None],
    ) -> None:
        """Register on `selector`.

        Args:
            sock: authenticated; the member owns it from here on.
            selector: driven by the server's loop.
            answer: called with each request; calls `reply` at once or later.
            forget: called once, just before the connection is closed.
        """
        self.will: tuple[bytes, bytes] | None = None
        self._sock = sock
        self._selector = selector
        self._answer = answer
        self._forget = forget
        self._received = bytearray()
        self._unsent: list[memoryview] = []
        self._waits = False  # for the reply to its request
        self._closed = False
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, self._on_event)

    def reply(self, reply: wire.Reply) -> None:
        """Send the reply, now as far as possible and the rest when there is room."""
        if self._closed:
            return
        parts = (wire.encode_reply_header(reply), reply.value)
        self._unsent = [memoryview(part) for part in parts if part]
        try:
            self._write()
        except OSError:
            self.close()
            return
        if self._unsent:
            self._selector.modify(self._sock, selectors.EVENT_WRITE, self._on_event)

    def close(self) -> None:
        """Disconnect; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._forget(self)
        self._selector.unregister(self._sock)
        self._sock.close()

    def _on_event(self, _events: int) -> None:
        if self._closed:
            return  # closed by an earlier event of the same turn
        try:
            if self._unsent:
                self._write()
                if not self._unsent:
                    self._selector.modify(self._sock, selectors.EVENT_READ, self._on_event)
            else:
                self._read()
        except BlockingIOError:
            pass
        except (OSError, wire.WireError):
            self.close()

    def _read(self) -> None:
        data = self._sock.recv(_READ_BYTES)
        if not data or self._waits:
            raise wire.WireError("left, or sent something before its reply came")
        self._received += data
        size = wire.request_bytes(self._received)
        if size is None or len(self._received) < size:
            return
        if len(self._received) > size:
            raise wire.WireError("more than one request at a time")
        request = wire.decode_request(self._received)
        self._received = bytearray()
        self._waits = True
        self._answer(self, request)

    def _write(self) -> None:
        try:
            sent = self._sock.sendmsg(self._unsent)
        except BlockingIOError:
            return
        while self._unsent and sent >= len(self._unsent[0]):
            sent -= len(self._unsent.pop(0))
        if self._unsent:
            self._unsent[0] = self._unsent[0][sent:]
        self._waits = bool(self._unsent)
