"""Uneven sizes: an array cut along axis 0 into blocks, and how ranks exchange the sizes."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from ferro.arrays import InputArray, dtype_from_name, dtype_name
from ferro.backend import Backend
from ferro.errors import CollectiveMismatch, UsageError
from ferro.group.arguments import OutputBuffer, flat
from ferro.types import Array

_REMEMBERED = 128  # few, for with sizes of many ranks they are long


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each rank's block lies in the whole, along axis 0, in order of rank.

    Attributes:
        shape: the whole's shape.
        rows: each block's size along axis 0.
        counts: each block's number of elements.
        places: where each block lies, in rows of the whole.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    places: tuple[slice, ...]

    @classmethod
    def of(cls, rows: Sequence[int], row_shape: tuple[int, ...]) -> Layout:
        """Return the layout of blocks of so many rows, each row of one shape."""
        row = math.prod(row_shape)
        ends = [0, *accumulate(rows)]
        return cls(
            shape=(sum(rows), *row_shape),
            rows=tuple(rows),
            counts=tuple(count * row for count in rows),
            places=tuple(slice(start, end) for start, end in pairwise(ends)),
        )

    def block_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of a rank's block."""
        return (self.rows[rank], *self.shape[1:])


@lru_cache(maxsize=_REMEMBERED)
def gathered(shape: tuple[int, ...], sizes: tuple[int, ...] | None, rank: int, world_size: int) -> Layout:
    """Return the layout of all ranks' blocks together, where this rank's has `shape`.

    A 0-d array counts as one row.

    Raises:
        UsageError: `sizes` says something else of this rank.
    """
    own = shape[0] if shape else 1
    rows = (own,) * world_size if sizes is None else sizes
    if rows[rank] != own:
        raise UsageError(f"sizes[{rank}] is {rows[rank]}, but x has {own} rows on this rank")
    return Layout.of(rows, shape[1:])


@lru_cache(maxsize=_REMEMBERED)
def cut(shape: tuple[int, ...], sizes: tuple[int, ...] | None, world_size: int, op: str, name: str = "sizes") -> Layout:
    """Return the layout of an array of `shape` that is cut into one block for every rank.

    Raises:
        UsageError: it cannot be cut so.
    """
    if not shape:
        raise UsageError(f"{op} cuts its input along axis 0, and a 0-d array has none")
    total = shape[0]
    if sizes is None:
        if total % world_size:
            raise UsageError(
                f"{op} cuts axis 0 into {world_size} equal blocks, but it has {total} rows: "
                f"give {name}= for uneven ones, or pad it"
            )
        sizes = (total // world_size,) * world_size
    if sum(sizes) != total:
        raise UsageError(f"{name} sum up to {sum(sizes)}, but axis 0 has {total} rows")
    return Layout.of(sizes, shape[1:])


def checked_sizes(sizes: Sequence[int] | None, world_size: int, name: str = "sizes") -> tuple[int, ...] | None:
    """Return sizes as non-negative ints, one a rank; None where none are given.

    Raises:
        UsageError: they are something else.
    """
    if sizes is None:
        return None
    try:
        rows = tuple(int(operator.index(size)) for size in sizes)  # int: True is one row
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {world_size} whole numbers, not {sizes!r}") from None
    if len(rows) != world_size or min(rows) < 0:
        raise UsageError(f"{name} must be {world_size} non-negative whole numbers, not {[*rows]}")
    return rows


_MOST_AXES = 64  # that an array can have


def blank_header(world_size: int) -> Array:
    """Return memory for the head of a scatter among so many ranks."""
    return np.zeros(1 + _packing(_MOST_AXES, world_size).size, np.uint8)


def write_header(head: Array, dtype: np.dtype, layout: Layout) -> None:
    """Write the head of a scatter: how many axes a row has, and after it what depends on that."""
    row_shape, rows = layout.shape[1:], layout.rows
    head[0] = len(row_shape)
    packing = _packing(len(row_shape), len(rows))
    packing.pack_into(head.data, 1, dtype_name(dtype).encode(), *row_shape, *rows)


def read_header(head: Array, world_size: int) -> tuple[np.dtype, Layout]:
    """Return what the head of a scatter tells."""
    axes = int(head[0])
    name, *numbers = _packing(axes, world_size).unpack_from(head.data, 1)
    row_shape, rows = tuple(numbers[:axes]), numbers[axes:]
    return dtype_from_name(name.rstrip(b"\0").decode()), Layout.of(rows, row_shape)


@lru_cache(maxsize=256)
def _packing(axes: int, world_size: int) -> struct.Struct:
    return struct.Struct(f"<16s{axes}q{world_size}q")


def reaches_beyond(block: Array, whole: Array, layout: Layout, rank: int) -> bool:
    """Say whether a rank's block may share memory with the other ranks' blocks of `whole`.

    Its own place in the whole is no other's: a block may lie there, and need not be copied.

    Args:
        block: the rank's block.
        whole: all ranks' blocks, in one dimension.
        layout: where they are in it.
        rank: whose block it is.
    """
    if not np.may_share_memory(block, whole):
        return False
    start = sum(layout.counts[:rank])
    before, after = whole[:start], whole[start + layout.counts[rank] :]
    return np.may_share_memory(block, before) or np.may_share_memory(block, after)


class RowExchange:
    """An uneven all_to_all: its result's shape may be known only when the sizes have come."""

    def __init__(
        self,
        backend: Backend,
        entry: InputArray,
        sending: Layout,
        expected: tuple[int, ...] | None,
        out: object,
        *,
        private: bool,
    ) -> None:
        """Prepare to send the blocks of `entry` as `sending` says, or, if `private`, of a copy.

        Raises:
            UsageError: the rows that are expected contradict those that are sent, or `out`.
        """
        self._backend = backend
        self._entry = entry
        self._sending = sending
        self._out = out
        self._source = flat(entry.array, private=private)
        self._arrival: tuple[OutputBuffer, Layout] | None = None  # where what rows go, once known
        if expected is not None:
            own = sending.rows[backend.rank]
            if expected[backend.rank] != own:
                raise UsageError(
                    f"all_to_all: rank {backend.rank} sends itself {own} rows but receives {expected[backend.rank]}",
                    op="all_to_all",
                )
            self._prepare(expected)

    def run(self, deadline: float) -> None:
        """Tell each other the sizes, hold them against what was expected, move the rows."""
        rows = self._sizes_told(deadline)
        result, receiving = self._arrival or self._prepare(rows)
        if rows != receiving.rows:
            raise self._mismatch(rows, receiving.rows)
        self._backend.all_to_all(self._source, result.flat, self._sending.counts, receiving.counts, deadline=deadline)

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        assert self._arrival is not None, "the operation has not run"
        return self._arrival[0]()

    def _sizes_told(self, deadline: float) -> tuple[int, ...]:
        """Return the rows that come from every rank."""
        n = self._backend.world_size
        telling, told = np.array(self._sending.rows, np.int64), np.empty(n, np.int64)
        ones = (1,) * n
        self._backend.all_to_all(telling, told, ones, ones, deadline=deadline)
        return tuple(told.tolist())

    def _prepare(self, rows: Sequence[int]) -> tuple[OutputBuffer, Layout]:
        """Make room for so many rows from every rank."""
        receiving = Layout.of(rows, self._sending.shape[1:])
        result = OutputBuffer(self._entry, self._out, receiving.shape)
        self._source = result.apart(self._source)  # rows arrive before others have left
        self._arrival = result, receiving
        return self._arrival

    def _mismatch(self, told: Sequence[int], expected: Sequence[int]) -> CollectiveMismatch:
        rank = self._backend.rank
        peer = next(r for r in range(len(told)) if told[r] != expected[r])
        return CollectiveMismatch(
            f"rank {peer} sends {told[peer]} rows to rank {rank} in all_to_all; rank {rank} expects {expected[peer]}",
            peer=peer,
        )
