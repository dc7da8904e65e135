"""Python values as arrays of bytes, which the group's collectives and transfers move in pieces."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from ferro.collectives.partition import blocks
from ferro.errors import UsageError
from ferro.group import codec as msgpack
from ferro.types import Array

Codec: TypeAlias = Literal["msgpack", "pickle"]

# The bound limits what one rank can make another one take. Memory is allocated piece by piece, as the bytes arrive, so
# an announcement alone takes none.
MAX_BYTES = 8 << 30
PIECE_BYTES = 64 << 20

_PICKLED = b"\x80"  # begins every pickle since protocol 2, and nothing that the other codec writes


def check_codec(codec: Codec) -> None:
    if codec not in ("msgpack", "pickle"):
        raise UsageError(f"codec must be 'msgpack' or 'pickle', not {codec!r}")


def encode(value: object, codec: Codec) -> Array:
    check_codec(codec)
    data = msgpack.encode(value) if codec == "msgpack" else pickle.dumps(value)
    if len(data) > MAX_BYTES:
        raise UsageError(f"a value of {len(data)} bytes is too large: at most {MAX_BYTES} travel")
    return np.frombuffer(data, np.uint8)


def encode_all(values: Sequence[object] | None, count: int, codec: Codec) -> list[Array]:
    """Encode the values of `scatter_object`, one for every rank."""
    if values is None or len(values) != count:
        given = "none" if values is None else str(len(values))
        raise UsageError(f"scatter_object needs {count} values at the root, got {given}")
    return [encode(value, codec) for value in values]


def decode(data: bytearray, codec: Codec) -> Any:
    pickled = data[:1] == _PICKLED
    if len(data) and pickled != (codec == "pickle"):
        theirs = "pickle" if pickled else "msgpack"
        raise UsageError(f"the value was encoded with codec={theirs!r}, and this rank expects {codec!r}: give all one")
    # pickle is used only where the caller asked for it by name; msgpack is the default everywhere.
    return msgpack.decode(data) if codec == "msgpack" else pickle.loads(data)  # noqa: S301


def checked_sizes(sizes: Array) -> list[int]:
    """Check the sizes of values that ranks announce, the same ones on every rank."""
    announced: list[int] = sizes.reshape(-1).tolist()
    for size in announced:
        if not 0 <= size <= MAX_BYTES:
            raise UsageError(f"a rank announces a value of {size} bytes, which is refused: at most {MAX_BYTES} travel")
    return announced


def in_pieces(
    sizes: Sequence[int], move: Callable[[slice, list[int]], Array | None], own: Sequence[int] | None = None
) -> list[bytearray]:
    """Move values of these sizes in pieces, and put the pieces together that arrive.

    Args:
        sizes: of all values, the same on every rank.
        move: moves one piece of each value: the function is given its place in the value and the pieces' sizes, and
            returns the pieces that this rank gets, one after the other.
        own: the values that this rank gets, by index; all of them when None.
    """
    kept = range(len(sizes)) if own is None else own
    values = [bytearray() for _ in kept]
    for start in range(0, max(sizes), PIECE_BYTES):
        counts = [min(max(size - start, 0), PIECE_BYTES) for size in sizes]
        piece = move(slice(start, start + PIECE_BYTES), counts)
        if piece is not None:
            for value, block in zip(values, blocks(piece, [counts[index] for index in kept]), strict=True):
                value += block.data
    return values
