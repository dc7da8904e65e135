"""Arenas: the memory behind `ProcessGroup.empty`, which the ranks of a host use in place.

Every rank has one arena. All ranks of its host map it when the world is made, and it is large, but
memory is reserved in it only as arrays ask for it. So whatever lies in an arena can be used by
all neighbours at once: its owner shows them where (`Place`).

A forked child shares the arrays that there are with its parent, unlike other memory; it is given
none itself.
"""

from __future__ import annotations

import os
import resource
import struct
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.segment import Segment, room
from ferro_gloo.shm.talk import warn

_PAGE = 4096
_LEAST_GROWTH_BYTES = 4 << 20
_GROWTH = 4  # grow by a quarter of what is reserved
_LEAST_BYTES = 1 << 20
_MOST_BYTES = 1 << 44  # of address space for a host's arenas; a process has 2**47
PLACE = struct.Struct("<QQ")


class Place(NamedTuple):
    """Where an array is in its owner's arena; at least one byte. `PLACE` packs it."""

    offset: int
    nbytes: int


def arena_bytes(ranks: int) -> int:
    """Return the size of an arena of which a process maps so many: all there is, within bounds.

    Raises:
        OSError: there is no shared memory.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    most = _MOST_BYTES if allowed == resource.RLIM_INFINITY else min(_MOST_BYTES, allowed // 4)
    return max(_LEAST_BYTES, min(room(), most // ranks)) // _PAGE * _PAGE


class Arena:
    """One rank's arena: what is free in it, and what is reserved.

    Args:
        segment: the memory.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._memory = np.frombuffer(segment.memory, np.uint8)
        self._start = address_of(self._memory)
        self._reserved = 0  # bytes, from the beginning
        self._free: dict[int, int] = {}  # offset -> bytes
        self._freed: deque[tuple[int, int]] = deque()  # by finalizers, which may take no lock
        self._retired: list[Place] = []

    def take(self, size: int) -> Array:
        """Return so many bytes, a multiple of the page size; free again with their last view.

        Raises:
            OSError: there is not enough memory.
        """
        offset = self._find(size)
        if offset is None:
            self._grow(size)
            offset = self._find(size)
        assert offset is not None, "an arena that has grown has room"
        # `frombuffer` makes the owner that every view keeps as its base.
        array: Array = np.frombuffer(self._segment.memory, np.uint8, size, offset)
        weakref.finalize(array, self._freed.append, (offset, size)).atexit = False
        return array

    def place(self, buffer: Array) -> Place | None:
        """Return where a buffer is, None if it is not in this arena."""
        offset = address_of(buffer) - self._start
        return Place(offset, buffer.nbytes) if 0 <= offset < self._reserved else None

    def view(self, place: Place) -> Array:
        """Return what is at a place."""
        return self._memory[place.offset : place.offset + place.nbytes]

    def retire(self, place: Place) -> None:
        """Never give out again the piece in which a place lies."""
        self._retired.append(place)

    def _find(self, size: int) -> int | None:
        while self._freed:
            offset, freed = self._freed.popleft()
            end = offset + freed
            if not any(offset < at.offset + at.nbytes and at.offset < end for at in self._retired):
                self._free[offset] = freed
        self._join()
        for offset, free in self._free.items():
            if free >= size:
                del self._free[offset]
                if free > size:
                    self._free[offset + size] = free - size
                return offset
        return None

    def _join(self) -> None:
        """Make one of neighbouring free pieces."""
        joined: dict[int, int] = {}
        last = -1
        for offset, size in sorted(self._free.items()):
            if last >= 0 and last + joined[last] == offset:
                joined[last] += size
            else:
                joined[offset] = size
                last = offset
        self._free = joined

    def _grow(self, size: int) -> None:
        """Reserve more: amply, or else what is needed."""
        end = self._reserved
        tail = next((free for at, free in self._free.items() if at + free == end), 0)
        ample = max(_LEAST_GROWTH_BYTES, end // _GROWTH // _PAGE * _PAGE)
        if size - tail < ample:
            with suppress(OSError):
                self._reserve(ample)
                return
        self._reserve(size - tail)

    def _reserve(self, nbytes: int) -> None:
        start = self._reserved
        if start + nbytes > self._segment.nbytes:
            raise OSError(f"an arena may hold {self._segment.nbytes >> 20} MiB at most")
        self._segment.reserve(start, nbytes)
        self._reserved += nbytes
        self._free[start] = nbytes


class Arenas:
    """The arenas of this rank and of its neighbours.

    Args:
        rank: this rank in the world.
        own: this rank's arena; None if it has no neighbours.
        others: the neighbours', by their ranks in the world.
    """

    def __init__(self, rank: int, own: Segment | None, others: Mapping[int, Segment]) -> None:
        self._rank = rank
        self._own = None if own is None else Arena(own)
        self._others = {
            other: (segment, np.frombuffer(segment.memory, np.uint8))
            for other, segment in others.items()
        }
        self._prepared = dict.fromkeys(others, 0)  # bytes of each, from the beginning
        self._lock = threading.Lock()
        self._warned = False
        self._pid = os.getpid()

    def allocate(self, nbytes: int) -> Array:
        """Return `nbytes` bytes or more of shared memory; ordinary memory when it has run out.

        They are free again when the last view of them is gone.
        """
        if self._own is None or os.getpid() != self._pid:
            return np.empty(nbytes, np.uint8)
        try:
            with self._lock:
                return self._own.take(max(1, -(-nbytes // _PAGE)) * _PAGE)
        except OSError as error:
            self._warn(error)
            return np.empty(nbytes, np.uint8)

    def has(self, rank: int) -> bool:
        """Say whether a rank is a neighbour."""
        return rank in self._others

    def place(self, buffer: Array) -> Place | None:
        """Return where a buffer is, None if it is not in this rank's arena.

        Args:
            buffer: one-dimensional and contiguous.
        """
        return None if self._own is None or not buffer.nbytes else self._own.place(buffer)

    def retire(self, place: Place) -> None:
        """Never hand this memory out again, for a group that failed may still be writing to it."""
        assert self._own is not None, "who has a place has an arena"
        with self._lock:
            self._own.retire(place)

    def view(self, rank: int, place: Place) -> Array:
        """Return a neighbour's (or this rank's own) array, as uint8."""
        if rank == self._rank:
            assert self._own is not None, "who has a place has an arena"
            return self._own.view(place)
        segment, memory = self._others[rank]
        end = -(-(place.offset + place.nbytes) // _PAGE) * _PAGE
        start = self._prepared[rank]
        if start < end <= segment.nbytes:  # its owner reserves from the beginning on
            segment.prepare(start, end - start)
            self._prepared[rank] = end
        return memory[place.offset : place.offset + place.nbytes]

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"gloo: group.empty has no shared memory left ({error}): arrays are ordinary ones "
                "until others go. Make /dev/shm larger (in a container: --shm-size)",
                "ordinary arrays are copied through shared memory piece by piece",
            )


def address_of(array: Array) -> int:
    """Return where an array's memory begins in this process."""
    address: int = array.__array_interface__["data"][0]
    return address
