"""BufferPool: memory for unsharded parameters and gradients, reused by one unit after the other."""

from __future__ import annotations

import weakref
from types import ModuleType

import numpy as np

from ferro import ProcessGroup

from ..nn.arrays import Array, namespace_of


class PooledBuffer:
    """Memory from a pool, which gets it back when this object is dropped.

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
        """The size of the memory; 0 after `transfer`."""
        return 0 if self._memory is None else int(self._memory.size)

    def transfer(self) -> Array:
        """Give the memory to another buffer instead of the pool; allowed once."""
        memory, self._memory = self._memory, None
        assert memory is not None, "memory is transferred once"
        return memory

    def abandon(self) -> None:
        """Keep the memory out of the pool, because something may still write to it."""
        self._free = []

    def __del__(self) -> None:
        if self._memory is not None:
            self._free.append(self._memory)


def unpooled(array: Array) -> PooledBuffer:
    """Wrap an array that belongs to no pool."""
    return PooledBuffer(array, array, [])


class BufferPool:
    """An allocator that reuses freed memory.

    It never holds more blocks than were in use at one time, and no block is larger than the largest request: it
    replaces a block that is too small by a larger one.

    Args:
        group: the process group that allocates new memory (`group.empty`), where it fits the namespace.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._free: dict[ModuleType, list[Array]] = {}
        self._draining: weakref.WeakSet[PooledBuffer] = weakref.WeakSet()

    def mark_draining(self, buffer: PooledBuffer) -> None:
        """Record that only the operation that was queued last still needs this buffer."""
        # A device operation begins with a copy that is not ordered with others in any queue.
        if namespace_of(buffer.array) is np:
            self._draining.add(buffer)

    def allocate_in_queue_order(self, xp: ModuleType, size: int, dtype: np.dtype) -> PooledBuffer:
        """Allocate memory that only operations queued from now on will touch.

        Such memory may still serve the operations under way, which end before those begin.
        """
        draining = [item for item in self._draining if item.nbytes >= size * dtype.itemsize > 0]
        if xp is not np or not draining:
            return self.allocate(xp, size, dtype)
        memory = min(draining, key=lambda item: item.nbytes).transfer()
        array = memory[: size * dtype.itemsize].view(dtype)
        return PooledBuffer(array, memory, self._free.setdefault(xp, []))

    def allocate(self, xp: ModuleType, size: int, dtype: np.dtype) -> PooledBuffer:
        """Allocate an uninitialised array of the namespace `xp`."""
        nbytes = size * dtype.itemsize
        free = self._free.setdefault(xp, [])
        memory = _pop_best_fit(free, nbytes)
        if memory is None or memory.size < nbytes:
            del memory  # The smaller block is freed before the larger one is made.
            memory = self._new_memory(xp, nbytes)
        return PooledBuffer(memory[:nbytes].view(dtype), memory, free)

    def _new_memory(self, xp: ModuleType, nbytes: int) -> Array:
        memory: Array = self._group.empty(nbytes, np.uint8)
        return memory if namespace_of(memory) is xp else xp.empty(nbytes, np.uint8)


def _pop_best_fit(free: list[Array], nbytes: int) -> Array | None:
    """Remove and return the smallest array that is large enough, or else the largest; None if there is none."""
    sizes = [int(memory.size) for memory in free]
    if not sizes:
        return None
    fitting = [size for size in sizes if size >= nbytes]
    # A buffer that is dropped meanwhile is appended, which moves no other.
    return free.pop(sizes.index(min(fitting) if fitting else max(sizes)))


def copy_into(target: Array, source: Array) -> None:
    """Copy elements, between host and device where necessary, and convert their dtype."""
    target[...] = to_namespace(source, namespace_of(target))


def to_namespace(array: Array, xp: ModuleType) -> Array:
    """Return the array itself if it is in the namespace `xp`, otherwise a copy in that namespace."""
    source = namespace_of(array)
    if source is xp:
        return array
    converted: Array = source.asnumpy(array) if xp is np else xp.asarray(array)
    return converted
