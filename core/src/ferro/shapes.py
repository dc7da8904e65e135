"""The memory of a collective's operands and results, in its shape and in one dimension."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from ferro.arrays import Entry, objection, writable
from ferro.layout import Layout
from ferro.types import Array, Device

_BLOCK_BYTES = 256 << 10


class Outlet:
    """Where a result goes: the caller's `out`, or a new array of the caller's kind.

    Attributes:
        array: the memory, in the result's shape.
        flat: the same memory in one dimension, as backends take it.
        device: where that memory is.
    """

    __slots__ = ("_entry", "_far", "_out", "array", "device", "flat")

    def __init__(
        self, entry: Entry, out: object, shape: tuple[int, ...], what: str = "out"
    ) -> None:
        self._entry = entry
        self._out = out
        self.device = entry.device
        self._far: Array | None = None  # `out` on a GPU, of which `array` is the host's copy
        if out is None:
            array = entry.empty(shape)
        elif entry.copied:
            self._far = writable(out, shape, entry.array.dtype, Device.CUDA, what)
            array = entry.empty(shape)
        else:
            array = writable(out, shape, entry.array.dtype, entry.device, what)
        self.array: Array = array
        self.flat: Array = array if array.ndim == 1 else array.reshape(-1)

    def fill(self, array: Array) -> None:
        """Copy the operand in, unless it is there already: `out` is often the input itself."""
        if self.array is not array:
            fill(self.array, array)

    def apart(self, source: Array) -> Array:
        """Return a flat operand, or a copy where the result may come to lie in its memory."""
        if self._out is not None and np.may_share_memory(source, self.flat):
            return source.copy()
        return source

    def __call__(self) -> object:
        """Return the result as the caller expects it."""
        if self._far is not None:
            self._far[...] = self._entry.leave(self.array)  # type: ignore[assignment]
        return self._entry.leave(self.array) if self._out is None else self._out


class InPlace:
    """An `Outlet` that is the operand itself: a NumPy array that is ready as it is."""

    __slots__ = ("array", "flat")

    device = Device.CPU

    def __init__(self, array: Array) -> None:
        self.array = array
        self.flat = array if array.ndim == 1 else array.reshape(-1)

    def __call__(self) -> Array:
        """Return the result as the caller expects it."""
        return self.array


def takes_in_place(x: object) -> TypeGuard[Array]:
    """Say whether a result can be written to the operand without any preparation."""
    if type(x) is not np.ndarray or objection(x.dtype):
        return False
    flags = x.flags
    return flags.c_contiguous and flags.writeable


def fill(target: Array, source: Array) -> None:
    """Copy elements, a large array block by block: it stays in the caches for what comes next.

    Copied all at once it would be written past them: of 4 MiB, an all_gather that reads them
    next then takes more than twice as long.
    """
    small = source.nbytes <= _BLOCK_BYTES
    if small or not _in_blocks(target, source) or np.may_share_memory(target, source):
        target[...] = source
        return
    into, data = target.reshape(-1), source.reshape(-1)
    step = _BLOCK_BYTES // data.itemsize
    for start in range(0, data.size, step):
        into[start : start + step] = data[start : start + step]


def _in_blocks(*arrays: Array) -> bool:
    return all(isinstance(array, np.ndarray) and array.flags.c_contiguous for array in arrays)


def flat(array: Array, *, private: bool) -> Array:
    """Return the elements in one contiguous dimension; a copy when `private`."""
    if private or not array.flags.c_contiguous:
        array = array.copy()
    return _in_one_dimension(array)


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


def _in_one_dimension(array: Array) -> Array:
    """Return a contiguous array as one of one dimension; a reshape costs even where it is one."""
    return array if array.ndim == 1 else array.reshape(-1)
