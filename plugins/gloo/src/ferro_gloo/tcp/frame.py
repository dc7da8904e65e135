"""The frame: what goes over a connection of the mesh.

    | length 4 | kind 1 | 3 unused | tag 8 | label 56 | body: length bytes |

All numbers are little-endian. The tag says which group's which operation a frame belongs to; the
label is the call as its sender understands it, compared with the receiver's before a byte of the
body is used.
"""

from __future__ import annotations

import struct

from ferro.collectives.label import LABEL_BYTES

_HEADER = struct.Struct(f"<IB3xQ{LABEL_BYTES}s")
HEADER_BYTES = _HEADER.size

# What is larger travels as several frames, so that no group's transfer holds up another's for
# long, and a length read from a connection can be believed or refused.
MAX_BODY = 4 << 20

DATA = 0
ABORT = 1


def pack(length: int, kind: int, tag: int, label: bytes) -> bytes:
    """Return a frame's header."""
    return _HEADER.pack(length, kind, tag, label)


def unpack(data: memoryview) -> tuple[int, int, int, bytes]:
    """Return length, kind, tag and label of the header that `data` begins with."""
    length, kind, tag, label = _HEADER.unpack_from(data)
    return length, kind, tag, label
