"""The client's end of a connection to the store: one request out, its reply in."""

from __future__ import annotations

import socket

from ferro.rendezvous.auth.addresses import set_deadline
from ferro.rendezvous.store import wire


def exchange(sock: socket.socket, request: wire.Request, deadline: float) -> wire.Reply:
    """Send a request and wait for its reply, until `deadline` (`time.monotonic()`).

    After any error the connection is of no more use.

    Raises:
        TimeoutError: the reply did not come in time.
        OSError: the connection broke.
        wire.WireError: what came is no reply.
    """
    set_deadline(sock, deadline)
    sock.sendall(wire.encode_request(request))
    header = _receive(sock, wire.REPLY_HEADER_BYTES, deadline)
    status, number, value_bytes = wire.decode_reply_header(header)
    return wire.Reply(status, number, _receive(sock, value_bytes, deadline))


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray(size)
    view = memoryview(received)
    while view:
        set_deadline(sock, deadline)
        count = sock.recv_into(view)
        if not count:
            raise ConnectionResetError("it closed the connection")
        view = view[count:]
    return bytes(received)
