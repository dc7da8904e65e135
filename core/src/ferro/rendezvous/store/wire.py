"""The bytes of requests and replies between an authenticated client and the store.

    request   op u8 | number i64 | key bytes u16 | value bytes u32 | key | value
    reply     status u8 | number i64 | value bytes u32 | value

Numbers are big-endian. A connection carries one request at a time, then its reply, so neither
end ever holds more than one message of the other's. Sizes are checked as soon as the header is
there, before anything of the body is kept.

    op        number                     value           reply: number   value
    SET       0                          the value              0        nothing
    GET       microseconds to wait       nothing                0        the value
    ADD       what to add                nothing                the sum  nothing
    DELETE    0                          nothing                1 or 0   nothing
    WILL      0                          up to 1 KiB            0        nothing
    WITHDRAW  0                          nothing                1 or 0   nothing

A connection has at most one WILL: when it ends, however that happens, the store appends the
value to what `key` holds. WITHDRAW (of the same key) is the farewell after which it does not.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from ferro.rendezvous.store.table import MAX_KEY_BYTES, MAX_VALUE_BYTES, MAX_WILL_BYTES

PURPOSE = b"store"  # what a handshake on the way to the store is for

_REQUEST = struct.Struct("!BqHI")
_REPLY = struct.Struct("!BqI")

REPLY_HEADER_BYTES = _REPLY.size


class WireError(Exception):
    """The other end broke the protocol or its bounds; the connection is of no more use."""


class Op(enum.IntEnum):
    """What a request asks for."""

    SET = 1
    GET = 2
    ADD = 3
    DELETE = 4
    WILL = 5
    WITHDRAW = 6


class Status(enum.IntEnum):
    """What a reply says; the value of the last two is a message in UTF-8."""

    OK = 0
    TIMEOUT = 1
    MISUSED = 2
    REFUSED = 3


@dataclass(frozen=True, slots=True)
class Request:
    """One request; see the table above."""

    op: Op
    key: bytes
    number: int = 0
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply; see the table above."""

    status: Status
    number: int = 0
    value: bytes = b""


def encode_request(request: Request) -> bytes:
    """The whole message; the caller has checked the sizes."""
    header = _REQUEST.pack(request.op, request.number, len(request.key), len(request.value))
    return b"".join((header, request.key, request.value))


def request_bytes(received: bytearray) -> int | None:
    """How long the request that begins here is, or None while its header is incomplete.

    Raises:
        WireError: it is longer than any request may be.
    """
    if len(received) < _REQUEST.size:
        return None
    op, _, key_bytes, value_bytes = _REQUEST.unpack_from(received)
    most = MAX_WILL_BYTES if op == Op.WILL else MAX_VALUE_BYTES
    if not 0 < key_bytes <= MAX_KEY_BYTES or value_bytes > most:
        raise WireError(f"a request with a key of {key_bytes} and a value of {value_bytes} bytes")
    return int(_REQUEST.size + key_bytes + value_bytes)


def decode_request(message: bytearray) -> Request:
    """The request in a whole message.

    Raises:
        WireError: the operation is unknown.
    """
    op, number, key_bytes, _ = _REQUEST.unpack_from(message)
    if op not in Op.__members__.values():
        raise WireError(f"unknown operation {op}")
    with memoryview(message) as view:
        body = _REQUEST.size + key_bytes
        return Request(Op(op), bytes(view[_REQUEST.size : body]), number, bytes(view[body:]))


def encode_reply_header(reply: Reply) -> bytes:
    """What precedes `reply.value`, which is sent from where it is: many may share one value."""
    return _REPLY.pack(reply.status, reply.number, len(reply.value))


def decode_reply_header(header: bytes) -> tuple[Status, int, int]:
    """Status, number, and the size of the value that follows.

    Raises:
        WireError: the status is unknown, or the value larger than any may be.
    """
    status, number, value_bytes = _REPLY.unpack(header)
    if status not in Status.__members__.values() or value_bytes > MAX_VALUE_BYTES:
        raise WireError(f"a reply of status {status} with {value_bytes} bytes")
    return Status(status), number, value_bytes
