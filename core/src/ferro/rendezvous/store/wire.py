"""The bytes of requests and replies between an authenticated client and the store.

    request   op u8 | number i64 | key bytes u16 | value bytes u32 | key | value
    reply     status u8 | number i64 | value bytes u32 | value

Numbers are big-endian. A connection carries one request at a time, then its reply, so neither end ever holds more than
one message of the other's. Sizes are checked as soon as the header is there, before anything of the body is kept.

    op                     number               value         reply: number   value
    SET                    0                    the value     0               nothing
    GET                    microseconds to wait nothing       0               the value
    ADD                    the amount to add    nothing       the sum         nothing
    DELETE                 0                    nothing       1 or 0          nothing
    APPEND_ON_DISCONNECT   0                    up to 1 KiB   0               nothing
    CANCEL_APPEND          0                    nothing       1 or 0          nothing

A server that is closed in good order sends a CLOSED reply on every connection, asked or not.

A connection has at most one APPEND_ON_DISCONNECT: when it ends, however that happens, the store appends the value to
that of `key`, unless CANCEL_APPEND (of the same key) came before.
"""

from __future__ import annotations

import enum
import socket
import struct
from typing import NamedTuple

from ferro.rendezvous.sockets import set_deadline

MAX_KEY_BYTES = 1024
MAX_VALUE_BYTES = 16 << 20
MAX_APPEND_BYTES = 1024

INT64 = range(-(1 << 63), 1 << 63)
PURPOSE = b"store"  # the purpose of handshakes with the store

_REQUEST = struct.Struct("!BqHI")
_REPLY = struct.Struct("!BqI")

REPLY_HEADER_BYTES = _REPLY.size


class WireError(Exception):
    """The other end broke the protocol or its bounds; the connection is of no more use."""


class StoreOp(enum.IntEnum):
    """The operations of the table above."""

    SET = 1
    GET = 2
    ADD = 3
    DELETE = 4
    APPEND_ON_DISCONNECT = 5
    CANCEL_APPEND = 6


class ReplyStatus(enum.IntEnum):
    """The status of a reply; with MISUSED and REFUSED the value is a message in UTF-8."""

    OK = 0
    TIMEOUT = 1
    MISUSED = 2
    REFUSED = 3
    CLOSED = 4


class Request(NamedTuple):
    """One request of the table above."""

    op: StoreOp
    key: bytes
    number: int = 0
    value: bytes = b""


class Reply(NamedTuple):
    """One reply of the table above."""

    status: ReplyStatus
    number: int = 0
    value: bytes = b""


def exchange(sock: socket.socket, request: Request, deadline: float) -> Reply:
    """Send a request and wait for its reply until `deadline`; after any error the connection is of no more use."""
    set_deadline(sock, deadline)
    sock.sendall(encode_request(request))
    status, number, value_bytes = decode_reply_header(_receive(sock, REPLY_HEADER_BYTES, deadline))
    return Reply(status, number, _receive(sock, value_bytes, deadline))


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


def encode_request(request: Request) -> bytes:
    op, key, number, value = request
    return b"".join((_REQUEST.pack(op, number, len(key), len(value)), key, value))


def request_bytes(received: bytearray) -> int | None:
    """Compute the size of the request that begins here, and check it; None while its header is incomplete."""
    if len(received) < _REQUEST.size:
        return None
    op, _, key_bytes, value_bytes = _REQUEST.unpack_from(received)
    most = MAX_APPEND_BYTES if op == StoreOp.APPEND_ON_DISCONNECT else MAX_VALUE_BYTES
    if not 0 < key_bytes <= MAX_KEY_BYTES or value_bytes > most:
        raise WireError(f"a request with a key of {key_bytes} and a value of {value_bytes} bytes")
    return int(_REQUEST.size + key_bytes + value_bytes)


def decode_request(message: bytearray) -> Request:
    op, number, key_bytes, _ = _REQUEST.unpack_from(message)
    if op not in StoreOp.__members__.values():
        raise WireError(f"unknown operation {op}")
    with memoryview(message) as view:
        body = _REQUEST.size + key_bytes
        return Request(StoreOp(op), bytes(view[_REQUEST.size : body]), number, bytes(view[body:]))


def encode_reply_header(reply: Reply) -> bytes:
    """Encode the header alone: `reply.value`, which many replies may share, is sent from where it is."""
    return _REPLY.pack(reply.status, reply.number, len(reply.value))


def decode_reply_header(header: bytes) -> tuple[ReplyStatus, int, int]:
    """Decode status, number, and the size of the value that follows, and check them."""
    status, number, value_bytes = _REPLY.unpack(header)
    if status not in ReplyStatus.__members__.values() or value_bytes > MAX_VALUE_BYTES:
        raise WireError(f"a reply of status {status} with {value_bytes} bytes")
    return ReplyStatus(status), number, value_bytes
