"""Uneven sizes: an array in one block for each rank, along axis 0, and the exchange of the blocks' sizes."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from ferro.arrays import dtype_from_name, dtype_name
from ferro.backend import Backend
from ferro.errors import CollectiveMismatch, UsageError
from ferro.group.arguments import OutputBuffer
from ferro.types import Array

_CACHED = 128  # few, since layouts of many ranks are long
HEADER_BYTES = 48  # of the first message of a scatter; few, so that a backend can send it with its own words


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of each rank's block in the whole array, along axis 0, in order of rank."""

    shape: tuple[int, ...]  # of the whole
    rows: tuple[int, ...]  # each block's size along axis 0
    counts: tuple[int, ...]  # each block's number of elements
    slices: tuple[slice, ...]  # each block's rows in the whole

    @classmethod
    def of(cls, rows: Sequence[int], row_shape: tuple[int, ...]) -> Layout:
        row_size = math.prod(row_shape)
        ends = [0, *accumulate(rows)]
        return cls(
            shape=(ends[-1], *row_shape),
            rows=tuple(rows),
            counts=tuple(count * row_size for count in rows),
            slices=tuple(slice(start, end) for start, end in pairwise(ends)),
        )

    @property
    def is_even(self) -> bool:
        return len(set(self.rows)) <= 1

    def block_shape(self, rank: int) -> tuple[int, ...]:
        return (self.rows[rank], *self.shape[1:])


@lru_cache(maxsize=_CACHED)
def gathered_layout(shape: tuple[int, ...], sizes: tuple[int, ...] | None, rank: int, world_size: int) -> Layout:
    """Lay out all ranks' blocks, where this rank's has `shape`; a 0-d array counts as one row."""
    own = shape[0] if shape else 1
    rows = (own,) * world_size if sizes is None else sizes
    if rows[rank] != own:
        raise UsageError(f"sizes[{rank}] is {rows[rank]}, but x has {own} rows on this rank")
    return Layout.of(rows, shape[1:])


@lru_cache(maxsize=_CACHED)
def split_layout(
    shape: tuple[int, ...], sizes: tuple[int, ...] | None, world_size: int, op: str, name: str = "sizes"
) -> Layout:
    """Lay out the blocks of an array of `shape`, one for every rank."""
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
    """Return sizes as non-negative ints, one for each rank; None when none are given."""
    if sizes is None:
        return None
    try:
        rows = tuple(int(operator.index(size)) for size in sizes)  # int() turns True into 1
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {world_size} whole numbers, not {sizes!r}") from None
    if len(rows) != world_size or min(rows) < 0:
        raise UsageError(f"{name} must be {world_size} non-negative whole numbers, not {[*rows]}")
    return rows


def header_of(dtype: np.dtype, layout: Layout) -> bytes:
    """Describe a scatter to ranks that know nothing of it: the whole's dtype and shape, and uneven rows."""
    rows = () if layout.is_even else (layout.rows,)
    return json.dumps([dtype_name(dtype), layout.shape, *rows], separators=(",", ":")).encode().ljust(HEADER_BYTES)


def tell_header(header: bytes, broadcast: Callable[[Array], object], told: bytes = b"") -> bytes:
    """Send the root's header to all ranks, and return it; a long one comes after its length, in a second message.

    `broadcast` sends the root's array, in place; `told` is the first message, if it has been sent; `header` is empty
    on other ranks than the root.
    """

    def tell(message: bytes, size: int) -> bytes:
        array = np.frombuffer(bytearray(message.ljust(size)), np.uint8)
        broadcast(array)
        return array.tobytes()

    is_long = len(header) > HEADER_BYTES
    told = told or tell(b"%d" % len(header) if is_long else header, HEADER_BYTES)
    return told if told.startswith(b"[") else tell(header, int(told))


@lru_cache(maxsize=_CACHED)
def read_header(header: bytes, world_size: int) -> tuple[np.dtype, Layout]:
    name, shape, *rows = json.loads(header)
    sizes = tuple(rows[0]) if rows else None
    return dtype_from_name(name), split_layout(tuple(shape), sizes, world_size, "scatter")


def overlaps_other_blocks(block: Array, whole: Array, layout: Layout, rank: int) -> bool:
    """Say whether a rank's block may share memory with the other ranks' blocks of the flat `whole`.

    A block that lies in its own place of the whole overlaps no other, and need not be copied.
    """
    if not np.may_share_memory(block, whole):
        return False
    start = sum(layout.counts[:rank])
    before, after = whole[:start], whole[start + layout.counts[rank] :]
    return np.may_share_memory(block, before) or np.may_share_memory(block, after)


class UnevenAllToAll:
    """An all_to_all whose result may get its shape only when the ranks have exchanged their sizes."""

    def __init__(
        self,
        backend: Backend,
        source: Array,
        sent: Layout,
        expected: tuple[int, ...] | None,
        make_result: Callable[[tuple[int, ...]], OutputBuffer],
    ) -> None:
        """Prepare to send the blocks of the flat `source`, laid out as `sent`; `make_result` is given a shape."""
        self._backend = backend
        self._source = source
        self._sent = sent
        self._make_result = make_result
        self._received: tuple[OutputBuffer, Layout] | None = None
        if expected is not None:
            rank = backend.rank
            if expected[rank] != sent.rows[rank]:
                message = f"rank {rank} sends itself {sent.rows[rank]} rows but receives {expected[rank]}"
                raise UsageError(f"all_to_all: {message}", op="all_to_all")
            self._received = self._allocate(expected)

    def run(self, *, deadline: float) -> None:
        """Exchange the sizes, compare them with the expected ones, and move the rows."""
        n, rank = self._backend.world_size, self._backend.rank
        announced, ones = np.empty(n, np.int64), (1,) * n
        self._backend.all_to_all(np.array(self._sent.rows, np.int64), announced, ones, ones, deadline=deadline)
        rows = tuple(announced.tolist())
        self._received = self._received or self._allocate(rows)
        result, received = self._received
        for peer, expected in enumerate(received.rows):
            if rows[peer] != expected:
                message = f"rank {peer} sends {rows[peer]} rows to rank {rank} in all_to_all; rank {rank} expects"
                raise CollectiveMismatch(f"{message} {expected}", peer=peer)
        self._backend.all_to_all(self._source, result.flat, self._sent.counts, received.counts, deadline=deadline)

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        assert self._received is not None, "the operation has not run"
        return self._received[0]()

    def _allocate(self, rows: Sequence[int]) -> tuple[OutputBuffer, Layout]:
        layout = Layout.of(rows, self._sent.shape[1:])
        result = self._make_result(layout.shape)
        if result.overlaps(self._source):
            self._source = self._source.copy()  # rows arrive before others have been sent
        return result, layout
