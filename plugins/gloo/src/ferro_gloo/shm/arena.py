"""Arenas: the memory behind `ProcessGroup.empty`, which the ranks of a host use in place.

A rank hands out arrays from arenas of its own. The others map an arena when an array in it first
takes part in a collective with them: the array's owner then shows where it is (`Place`).

A forked child shares the arrays that there are with its parent, unlike other memory; it hands out
none itself.
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.segment import NAME_BYTES, Segment, remove
from ferro_gloo.shm.talk import warn

_LEAST_BYTES = 4 << 20
_GROWTH = 4  # a new arena has a quarter of what there is: few arenas, for each takes descriptors
_ALIGNMENT = 4096
PLACE = struct.Struct(f"<IQQQ{NAME_BYTES}s")


class Place(NamedTuple):
    """Where an array is: its owner's arena, counted from 1, and how to open that.

    `PLACE` packs it; all zeros mean that an array is in no arena.
    """

    arena: int
    offset: int
    nbytes: int
    arena_bytes: int
    name: bytes


class Arena:
    """One segment and what is free in it."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.segment = Segment.create(nbytes)
        self.start = _address(np.frombuffer(self.segment.memory, np.uint8))
        self.mapped_by: set[int] = set()  # ranks of the world
        self.offers = 0  # collectives under way that show its name
        self.freed: deque[tuple[int, int]] = deque()  # by finalizers, which may take no lock
        self._retired: list[tuple[int, int]] = []  # offset and end
        self._free = {0: nbytes}  # offset -> bytes

    def retire(self, offset: int, nbytes: int) -> None:
        """Keep the piece in which these bytes lie from being taken again."""
        self._retired.append((offset, offset + nbytes))

    def take(self, nbytes: int) -> int | None:
        """Return the offset of so many free bytes, or None."""
        while self.freed:
            offset, size = self.freed.popleft()
            if not any(offset < end and at < offset + size for at, end in self._retired):
                self._free[offset] = size
        self._join()
        for offset, size in self._free.items():
            if size >= nbytes:
                del self._free[offset]
                if size > nbytes:
                    self._free[offset + nbytes] = size - nbytes
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


class Arenas:
    """All arenas of this rank, and those of its neighbours that it has mapped.

    Args:
        rank: this rank in the world.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._own: list[Arena] = []
        self._theirs: dict[tuple[int, int], Array] = {}
        self._lock = threading.Lock()
        self._warned = False
        self._pid = os.getpid()

    def allocate(self, nbytes: int) -> Array:
        """Return `nbytes` bytes of shared memory; of ordinary memory when it has run out.

        They are free again when the last view of them is gone.
        """
        if os.getpid() != self._pid:
            return np.empty(nbytes, np.uint8)
        size = max(1, -(-nbytes // _ALIGNMENT)) * _ALIGNMENT
        with self._lock:
            found = self._find(size)
        if found is None:
            return np.empty(nbytes, np.uint8)
        arena, offset = found
        # `frombuffer` makes the owner that every view keeps as its base.
        array: Array = np.frombuffer(arena.segment.memory, np.uint8, size, offset)
        weakref.finalize(array, arena.freed.append, (offset, size)).atexit = False
        return array

    def _find(self, size: int) -> tuple[Arena, int] | None:
        for arena in self._own:
            offset = arena.take(size)
            if offset is not None:
                return arena, offset
        grown = self._grow(size)
        if grown is None:
            return None
        self._own.append(grown)
        offset = grown.take(size)
        assert offset is not None, "a new arena holds what it was made for"
        return grown, offset

    def _grow(self, size: int) -> Arena | None:
        """Return a new arena, a large one or else one that just holds so much; None if neither."""
        number = len(self._own) + 1
        ample = max(_LEAST_BYTES, sum(arena.segment.nbytes for arena in self._own) // _GROWTH)
        if size < ample:
            with suppress(OSError):
                return Arena(number, ample)
        try:
            return Arena(number, size)
        except OSError as error:
            self._warn(
                f"gloo: group.empty has no shared memory left ({error}): arrays from now on are "
                "ordinary ones. Make /dev/shm larger (in a container: --shm-size)"
            )
            return None

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warn(text, "ordinary arrays are copied through shared memory piece by piece")

    def offer(self, buffer: Array, members: Iterable[int]) -> Place | None:
        """Return where a buffer is, None if it is in no arena; it can be opened from now on.

        None as well if its arena can be given no name.

        Args:
            buffer: one-dimensional and contiguous.
            members: ranks of the world that are to use it in place. `withdraw` follows.
        """
        if not self._own or not buffer.nbytes:
            return None
        address = _address(buffer)
        for arena in self._own:
            offset = address - arena.start
            if 0 <= offset < arena.segment.nbytes:
                name = self._name(arena, members)
                if name is None:
                    return None
                return Place(arena.number, offset, buffer.nbytes, arena.segment.nbytes, name)
        return None

    def _name(self, arena: Arena, members: Iterable[int]) -> bytes | None:
        """Return the name to show: zeros if all have mapped it, None if it can be given none."""
        name = bytes(NAME_BYTES)
        with self._lock:
            if not arena.mapped_by.issuperset(members):
                try:
                    name = arena.segment.offer()
                except OSError as error:
                    self._warn(f"gloo: memory of group.empty cannot be shared: {error}")
                    return None
            arena.offers += 1
        return name

    def withdraw(self, place: Place, mapped_by: Iterable[int]) -> None:
        """End what `offer` began; these ranks of the world have mapped the arena by now."""
        arena = self._own[place.arena - 1]
        with self._lock:
            arena.mapped_by.update(mapped_by)
            arena.offers -= 1
            if arena.offers == 0:
                arena.segment.withdraw()

    def retire(self, place: Place) -> None:
        """Never hand this memory out again, for a group that failed may still be writing to it."""
        with self._lock:
            self._own[place.arena - 1].retire(place.offset, place.nbytes)

    def view(self, rank: int, place: Place) -> Array:
        """Return a neighbour's (or this rank's own) array, as uint8.

        Raises:
            OSError: its arena cannot be mapped.
        """
        end = place.offset + place.nbytes
        if rank == self._rank:
            own = np.frombuffer(self._own[place.arena - 1].segment.memory, np.uint8)
            return own[place.offset : end]
        key = (rank, place.arena)
        with self._lock:
            arena = self._theirs.get(key)
            if arena is None:
                arena = np.frombuffer(Segment.open(place.name, place.arena_bytes).memory, np.uint8)
                self._theirs[key] = arena
        if end > arena.nbytes:
            raise OSError("it shows an array outside its arena")
        return arena[place.offset : end]


def forget(place: Place | None) -> None:
    """Remove the name that a place shows, for an owner that may have died with it."""
    if place is not None and any(place.name):
        remove(place.name)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
