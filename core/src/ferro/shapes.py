"""Shapes of a collective's operands and results: everything follows axis 0."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np

from ferro.arrays import Entry, writable
from ferro.errors import UsageError
from ferro.types import Array, Device


class Outlet:
    """Where a result goes: the caller's `out`, or a new array of the caller's kind.

    Attributes:
        array: the memory, in the result's shape.
        flat: the same memory in one dimension, as backends take it.
    """

    __slots__ = ("_entry", "_far", "_out", "array", "flat")

    def __init__(
        self, entry: Entry, out: object, shape: tuple[int, ...], what: str = "out"
    ) -> None:
        self._entry = entry
        self._out = out
        self._far: Array | None = None  # `out` on a GPU, of which `array` is the host's copy
        if out is None:
            self.array: Array = entry.empty(shape)
        elif entry.copied:
            self._far = writable(out, shape, entry.array.dtype, Device.CUDA, what)
            self.array = entry.empty(shape)
        else:
            self.array = writable(out, shape, entry.array.dtype, entry.device, what)
        self.flat: Array = _in_one_dimension(self.array)

    def fill(self, array: Array) -> None:
        """Copy the operand in, unless it is there already: `out` is often the input itself."""
        if self.array is not array:
            self.array[...] = array

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        if self._far is not None:
            self._far[...] = self._entry.leave(self.array)  # type: ignore[assignment]
        return self._entry.leave(self.array) if self._out is None else self._out


def flat(array: Array, *, private: bool) -> Array:
    """Return the elements in one contiguous dimension; a copy when `private`."""
    if private or not array.flags.c_contiguous:
        array = array.copy()
    return _in_one_dimension(array)


def reaches_beyond(block: Array, whole: Array, counts: Sequence[int], rank: int) -> bool:
    """Say whether a rank's block may share memory with the other ranks' blocks of `whole`.

    Its own place in the whole is no other's: a block may lie there, and need not be copied.
    """
    end = sum(counts[: rank + 1])
    before, after = whole[: end - counts[rank]], whole[end:]
    return np.may_share_memory(block, before) or np.may_share_memory(block, after)


def _in_one_dimension(array: Array) -> Array:
    """Return a contiguous array as one of one dimension; a reshape costs even where it is one."""
    return array if array.ndim == 1 else array.reshape(-1)


def concatenated(array: Array, rows: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """Return the shape of all ranks' rows together, and each rank's number of elements."""
    row_shape = array.shape[1:]
    row = math.prod(row_shape)
    return (sum(rows), *row_shape), [count * row for count in rows]


def gathered_rows(
    array: Array, sizes: Sequence[int] | None, rank: int, world_size: int
) -> list[int]:
    """Return the rows that every rank contributes, this one `array`.

    Raises:
        UsageError: `sizes` is not one size a rank, or not this array's at this rank.
    """
    own = array.shape[0] if array.ndim else 1
    if sizes is None:
        return [own] * world_size
    rows = checked_sizes(sizes, world_size, "sizes")
    if rows[rank] != own:
        raise UsageError(f"sizes[{rank}] is {rows[rank]}, but x has {own} rows on this rank")
    return rows


def cut_rows(
    array: Array, sizes: Sequence[int] | None, world_size: int, op: str, name: str = "sizes"
) -> list[int]:
    """Return the rows that go to every rank when `array` is cut along axis 0.

    Raises:
        UsageError: it cannot be cut so.
    """
    if array.ndim == 0:
        raise UsageError(f"{op} cuts its input along axis 0, and a 0-d array has none")
    total = array.shape[0]
    if sizes is None:
        if total % world_size:
            raise UsageError(
                f"{op} cuts axis 0 into {world_size} equal blocks, but it has {total} rows: "
                f"give {name}= for uneven ones, or pad it"
            )
        return [total // world_size] * world_size
    rows = checked_sizes(sizes, world_size, name)
    if sum(rows) != total:
        raise UsageError(f"{name} sum up to {sum(rows)}, but axis 0 has {total} rows")
    return rows


def checked_sizes(sizes: Sequence[int], world_size: int, name: str) -> list[int]:
    """Return sizes as a list of non-negative ints, one a rank."""
    try:
        rows = [operator.index(size) for size in sizes]
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {world_size} whole numbers, not {sizes!r}") from None
    if len(rows) != world_size or min(rows) < 0:
        raise UsageError(f"{name} must be {world_size} non-negative whole numbers, not {rows}")
    return rows
