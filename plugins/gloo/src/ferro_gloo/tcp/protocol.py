"""The protocol of the mesh: the layout of a frame, and the errors of a transfer.

    | length 4 | kind 1 | 3 unused | tag 8 | label 56 | body: length bytes |

All numbers are little-endian. The tag names the group and the operation that a frame belongs to.
The label describes the call as the sender understands it; the receiver compares it with its own
before it uses a byte of the body.
"""

from __future__ import annotations

import struct

from ferro.collectives.label import LABEL_BYTES

_HEADER = struct.Struct(f"<IB3xQ{LABEL_BYTES}s")
HEADER_BYTES = _HEADER.size

# A larger buffer is sent as several frames, so that no group's transfer delays another's for long, and so that the
# reader can refuse a length that no rank would send.
MAX_BODY = 4 << 20

DATA = 0
ABORT = 1
# The kinds of flow control (see `connection`); the tag of the last three is a number instead.
OFFER = 2  # of a frame whose body, of `length` bytes, is sent only when it is accepted
ACCEPT = 3  # of the offer with this number, counted in each direction of a connection from 0
ACCEPTED = 4  # the body of the offer with this number
CREDIT = 5  # for so many bytes of frames that their receiver keeps no longer


NO_LABEL = bytes(LABEL_BYTES)


def pack(length: int, kind: int, tag: int, label: bytes) -> bytes:
    """Pack a frame's header."""
    return _HEADER.pack(length, kind, tag, label)


def unpack(data: memoryview) -> tuple[int, int, int, bytes]:
    """Unpack length, kind, tag and label from the header at the beginning of `data`."""
    length, kind, tag, label = _HEADER.unpack_from(data)
    return length, kind, tag, label


class DeadlinePassedError(TimeoutError):
    """The deadline of a wait has passed; any other TimeoutError is the program's own, from a signal handler."""


class EngineError(Exception):
    """An error with ranks of the world; `TcpBackend` translates it into one of ferro's."""


class ConnectionLostError(EngineError):
    """The connection to the peer is gone."""

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(reason)
        self.peer = peer


class LabelMismatchError(EngineError):
    """The peer's frame carries another label than this rank's call."""

    def __init__(self, peer: int, expected: bytes, got: bytes) -> None:
        super().__init__("labels differ")
        self.peer = peer
        self.expected = expected
        self.got = got


class LengthMismatchError(EngineError):
    """The peer's frame has the right label, but another size."""

    def __init__(self, peer: int, expected: int, got: int) -> None:
        super().__init__(f"{got} bytes came where {expected} were expected")
        self.peer = peer


class GroupAbortedError(EngineError):
    """The group was aborted, here or by the peer."""
