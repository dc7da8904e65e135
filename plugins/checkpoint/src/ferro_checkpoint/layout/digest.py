"""The digests of segments: XXH3 with 64 bits.

Measured on an x86-64 with AVX2 beside other work, single thread, in GB/s: a stream of segments, and the same from a
buffer of 256 MiB beside a thread of Python, which went on at its full speed with each of them (all release the
interpreter's lock):

    | algorithm | 64 KiB | 1 MiB | 4 MiB | beside a thread | fault that is missed |
    | xxh3_64   |  6.96  |  7.80 |  8.88 |  6.4            | one in 2^64          |
    | xxh3_128  |  7.34  |  7.38 |  7.82 |  6.9            | one in 2^128         |
    | crc32c    |  5.2   |  3.1  |  3.3  |  4.6            | one in 2^32          |
    | crc32     |  2.2   |  3.5  |  1.7  |  2.5            | one in 2^32          |
    | blake2b   |  0.48  |  0.52 |  0.49 |  0.58           | none, nor a forgery  |

Only BLAKE2 would not reach the speed of a good disk. A digest of a segment finds faults; it does not prove who has
written the segment, for the record beside it can be changed as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import xxhash

from ferro_checkpoint.errors import CheckpointTooNew

Digester: TypeAlias = "Callable[[Sequence[memoryview]], str]"
"""Returns the digest, in hexadecimal, of buffers one after the other."""

DIGEST = "xxh3_64"


def digest_of(parts: Sequence[memoryview]) -> str:
    """Return the digest, in hexadecimal, of contiguous buffers one after the other; how they are cut has no effect."""
    if len(parts) == 1:
        return xxhash.xxh3_64_hexdigest(parts[0])
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def digester(name: str, path: str) -> Digester:
    """Return the function for the algorithm that a record names.

    Args:
        name: of the algorithm, as in the record.
        path: of the checkpoint, for the message.

    Raises:
        CheckpointTooNew: this version does not know it.
    """
    if name != DIGEST:
        raise CheckpointTooNew(
            f"{path}: its digests are of the algorithm {name!r}, and this ferro-checkpoint knows {DIGEST} alone: "
            "update ferro-checkpoint, or load without verification",
            path=path,
        )
    return digest_of
