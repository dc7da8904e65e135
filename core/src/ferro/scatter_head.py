"""What the root of a scatter tells ahead: dtype, row shape and rows, in bytes of a fixed size."""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np

from ferro.arrays import dtype_named, name_of
from ferro.layout import Layout
from ferro.types import Array

_MOST_AXES = 64  # that an array can have


def blank(world_size: int) -> Array:
    """Return memory for the head of a scatter among so many ranks."""
    return np.zeros(1 + _packing(_MOST_AXES, world_size).size, np.uint8)


def write(head: Array, dtype: np.dtype, layout: Layout) -> None:
    """Write the head of a scatter: how many axes a row has, and after it what depends on that."""
    row_shape, rows = layout.shape[1:], layout.rows
    head[0] = len(row_shape)
    packing = _packing(len(row_shape), len(rows))
    packing.pack_into(head.data, 1, name_of(dtype).encode(), *row_shape, *rows)


def read(head: Array, world_size: int) -> tuple[np.dtype, Layout]:
    """Return what the head of a scatter tells."""
    axes = int(head[0])
    name, *numbers = _packing(axes, world_size).unpack_from(head.data, 1)
    row_shape, rows = tuple(numbers[:axes]), numbers[axes:]
    return dtype_named(name.rstrip(b"\0").decode()), Layout.of(rows, row_shape)


@lru_cache(maxsize=256)
def _packing(axes: int, world_size: int) -> struct.Struct:
    return struct.Struct(f"<16s{axes}q{world_size}q")
