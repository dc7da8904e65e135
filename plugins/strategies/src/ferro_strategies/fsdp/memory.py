"""Pool: the memory of whole units, which one unit after the other uses."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ferro import ProcessGroup

from ..nn.arrays import Array, namespace_of


class Loan:
    """Memory that belongs to whoever holds this, and goes back with it.

    Attributes:
        array: the memory, one-dimensional.
    """

    __slots__ = ("_free", "_memory", "array")

    def __init__(self, array: Array, memory: Array, free: list[Array]) -> None:
        self.array = array
        self._memory = memory
        self._free = free

    def forfeit(self) -> None:
        """See that the memory is not used again: something may still write to it."""
        self._free = []

    def __del__(self) -> None:
        self._free.append(self._memory)


def own(array: Array) -> Loan:
    """Treat memory as lent that goes back to nobody."""
    return Loan(array, array, [])


class Pool:
    """Lends memory, again and again.

    There are never more pieces than were in use at one time, none larger than the largest that
    was asked for: one that is too small makes room for a larger one.

    Args:
        group: whose fastest memory is taken, where it is of the kind asked for.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._free: dict[ModuleType, list[Array]] = {}

    def take(self, xp: ModuleType, size: int, dtype: np.dtype) -> Loan:
        """Return an uninitialised array of the namespace `xp`."""
        nbytes = size * dtype.itemsize
        free = self._free.setdefault(xp, [])
        memory = _taken(free, nbytes)
        if memory is None or memory.size < nbytes:
            del memory  # before the larger one is made
            memory = self._allocate(xp, nbytes)
        return Loan(memory[:nbytes].view(dtype), memory, free)

    def _allocate(self, xp: ModuleType, nbytes: int) -> Array:
        memory: Array = self._group.empty(nbytes, np.uint8)
        return memory if namespace_of(memory) is xp else xp.empty(nbytes, np.uint8)


def _taken(free: list[Array], nbytes: int) -> Array | None:
    """Take out the smallest array that suffices, or else the largest; None if there is none."""
    sizes = [int(memory.size) for memory in free]
    if not sizes:
        return None
    fitting = [size for size in sizes if size >= nbytes]
    # Meanwhile a loan may end: it is appended, which moves none of these.
    return free.pop(sizes.index(min(fitting) if fitting else max(sizes)))


def put(target: Array, source: Array) -> None:
    """Copy elements, between host and device where need be; convert their type."""
    target[...] = moved(source, namespace_of(target))


def moved(array: Array, xp: ModuleType) -> Array:
    """Return an array in the namespace `xp`: itself, or a copy where it is in another."""
    source = namespace_of(array)
    if source is xp:
        return array
    there: Array = source.asnumpy(array) if xp is np else xp.asarray(array)
    return there
