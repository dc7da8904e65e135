"""The digests of segments: XXH3 with 64 bits.

Measured in one run each, with a single thread, on a shared x86-64 with two cores; in GB/s. The last column is one
buffer of 256 MiB beside a thread of Python, which kept its speed (beside crc32c, four fifths of it): all of these
release the interpreter's lock.

    | algorithm | 64 KiB | 1 MiB | 4 MiB | 256 MiB, beside a thread |
    | xxh3_64   |  7.4   |  4.3  |  3.5  |  6.5                     |  on a quieter machine 7.0, 7.8 and 8.9
    | xxh3_128  |  6.9   |  3.5  |  3.8  |  6.9                     |  on a quieter machine 7.3, 7.4 and 7.8
    | crc32c    |  5.2   |  3.1  |  3.3  |  4.6                     |  of google-crc32c; three with a copy to bytes
    | crc32     |  2.2   |  3.5  |  1.7  |  2.5                     |
    | blake2b   |  0.48  |  0.52 |  0.49 |  0.58                    |

BLAKE2 is slower than a good disk, and a CRC with 32 bits misses one fault in 2^32. A digest of a segment finds faults;
it does not prove who has written the segment, for the record beside it can be changed as well.
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
