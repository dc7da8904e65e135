"""Pool: the memory of whole units, which one unit after the other uses."""

from __future__ import annotations

import weakref
from types import ModuleType

import numpy as np

from ferro import ProcessGroup

from ..nn.arrays import Array, namespace_of


class Loan:
    """Memory that belongs to whoever holds this, and goes back with it.

    Attributes:
        array: the memory, one-dimensional.
    """

    __slots__ = ("__weakref__", "_free", "_memory", "array")

    def __init__(self, array: Array, memory: Array, free: list[Array]) -> None:
        self.array = array
        self._memory: Array | None = memory
        self._free = free

    @property
    def nbytes(self) -> int:
        """How much memory there is to be passed on."""
        return 0 if self._memory is None else int(self._memory.size)

    def pass_on(self) -> Array:
        """Give the memory away, in time for whoever comes next in its queue."""
        memory, self._memory = self._memory, None
        assert memory is not None, "memory is passed on once"
        return memory

    def forfeit(self) -> None:
        """See that the memory is not used again: something may still write to it."""
        self._free = []

    def __del__(self) -> None:
        if self._memory is not None:
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
        self._sent: weakref.WeakSet[Loan] = weakref.WeakSet()

    def send(self, loan: Loan) -> None:
        """Note that nobody needs this memory but the operation that has been queued last."""
        # Launched on a device, an operation begins with a copy that is in no queue with others.
        if namespace_of(loan.array) is np:
            self._sent.add(loan)

    def take_behind(self, xp: ModuleType, size: int, dtype: np.dtype) -> Loan:
        """As `take`, but only for an operation that is queued behind those under way.

        It may get memory that these are going to use, for by its turn they have ended.
        """
        sent = [loan for loan in self._sent if loan.nbytes >= size * dtype.itemsize > 0]
        if xp is not np or not sent:
            return self.take(xp, size, dtype)
        memory = min(sent, key=lambda loan: loan.nbytes).pass_on()
        array = memory[: size * dtype.itemsize].view(dtype)
        return Loan(array, memory, self._free.setdefault(xp, []))

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
