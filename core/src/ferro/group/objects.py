"""Small Python values as arrays of bytes, which the group's collectives and transfers move."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from ferro.collectives.partition import blocks
from ferro.errors import UsageError
from ferro.group import codec as msgpack
from ferro.types import Array

Codec: TypeAlias = Literal["msgpack", "pickle"]

# These functions are for small values. The bound also limits the memory that one rank can make another allocate.
MAX_BYTES = 1 << 30


def check_codec(codec: Codec) -> None:
    if codec not in ("msgpack", "pickle"):
        raise UsageError(f"codec must be 'msgpack' or 'pickle', not {codec!r}")


def encode(value: object, codec: Codec) -> Array:
    check_codec(codec)
    data = msgpack.encode(value) if codec == "msgpack" else pickle.dumps(value)
    if len(data) > MAX_BYTES:
        raise UsageError(f"a value of {len(data)} bytes is too large: at most {MAX_BYTES} travel")
    return np.frombuffer(data, np.uint8)


def allocate(size: Array) -> Array:
    """Allocate memory for a value of the size that another rank announces."""
    if not 0 <= int(size) <= MAX_BYTES:
        raise UsageError(f"another rank announces a value of {int(size)} bytes, which is refused")
    return np.empty(int(size), np.uint8)


def decode(data: Array, codec: Codec) -> Any:
    raw = data.tobytes()
    # pickle is used only where the caller asked for it by name; msgpack is the default everywhere.
    return msgpack.decode(raw) if codec == "msgpack" else pickle.loads(raw)  # noqa: S301


def decode_all(data: Array, sizes: Sequence[int], codec: Codec) -> list[Any]:
    """Decode values that lie one after the other."""
    return [decode(block, codec) for block in blocks(data, sizes)]
