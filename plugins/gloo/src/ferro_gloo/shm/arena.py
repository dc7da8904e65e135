"""Arenas: the memory of `ProcessGroup.empty`, which the ranks of a host use in place.

Every rank has one large arena, which all ranks of its host map when the world is made. Memory in
it is reserved only as arrays ask for it. An array that lies in an arena can be used by all ranks of
the host; its owner tells them where it is (`ArenaSpan`).

A forked child shares the existing arrays with its parent, unlike other memory; its new arrays are in ordinary memory.
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
from ferro_gloo.shm.segment import ShmSegment, free_bytes

_PAGE = 4096
_MIN_GROWTH_BYTES = 4 << 20
_GROWTH_DIVISOR = 4  # an arena grows by a quarter of what it has reserved
_MIN_BYTES = 1 << 20
_MAX_MAPPED_BYTES = 1 << 44  # of address space for all arenas of a host; a process has 2**47
PACKED_SPAN = struct.Struct("<QQ")


class ArenaSpan(NamedTuple):
    """The bytes of an array in its owner's arena, at least one; `PACKED_SPAN` packs it."""

    offset: int
    nbytes: int


def arena_bytes(ranks: int) -> int:
    """Choose the size of an arena where each process maps `ranks` of them.

    Raises:
        OSError: there is no shared memory.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    mapped = _MAX_MAPPED_BYTES
    if allowed != resource.RLIM_INFINITY:
        mapped = min(mapped, allowed // 4)
    return max(_MIN_BYTES, min(free_bytes(), mapped // ranks)) // _PAGE * _PAGE


class Arena:
    """The allocator of one rank's arena.

    Args:
        segment: the memory.
    """

    def __init__(self, segment: ShmSegment) -> None:
        self._segment = segment
        self._memory = np.frombuffer(segment.memory, np.uint8)
        self._start = address_of(self._memory)
        self._reserved = 0  # bytes, from the beginning
        self._free: dict[int, int] = {}  # offset -> bytes
        self._freed: deque[tuple[int, int]] = deque()  # appended by finalizers, which must not lock
        self._allocated: set[int] = set()  # the offsets of arrays that are in use
        self._closed = False
        self._retired: list[ArenaSpan] = []

    def allocate(self, size: int) -> Array:
        """Allocate whole pages, which are free again when their last view is gone.

        Raises:
            OSError: there is not enough memory.
        """
        offset = self._pop_free(size)
        if offset is None:
            self._grow(size)
            offset = self._pop_free(size)
        assert offset is not None, "an arena that has grown has free memory"
        # `frombuffer` makes the array that every view keeps alive as its base.
        array: Array = np.frombuffer(self._segment.memory, np.uint8, size, offset)
        self._allocated.add(offset)
        weakref.finalize(array, self._finalize, offset, size).atexit = False
        return array

    def close(self) -> None:
        """Give the memory back when the last array is gone; other ranks' views of it count for nothing."""
        self._closed = True
        self._segment.close_file()
        if not self._allocated:
            self._segment.close()

    def span_of(self, buffer: Array) -> ArenaSpan | None:
        """Find the span of a buffer; None if it is not in this arena."""
        offset = address_of(buffer) - self._start
        return ArenaSpan(offset, buffer.nbytes) if 0 <= offset < self._reserved else None

    def addresses(self) -> tuple[int, int]:
        """Find the addresses in this process between which the arena lies."""
        return self._start, self._start + self._segment.nbytes

    def view(self, span: ArenaSpan) -> Array:
        """View a span as uint8."""
        return self._memory[span.offset : span.offset + span.nbytes]

    def retire(self, span: ArenaSpan) -> None:
        """Never allocate again the memory in which a span lies."""
        self._retired.append(span)

    def _finalize(self, offset: int, size: int) -> None:
        """Take back the memory of an array that is gone."""
        self._freed.append((offset, size))
        self._allocated.discard(offset)
        if self._closed and not self._allocated:
            self._segment.close()

    def _pop_free(self, size: int) -> int | None:
        while self._freed:
            offset, freed = self._freed.popleft()
            end = offset + freed
            if not any(offset < at.offset + at.nbytes and at.offset < end for at in self._retired):
                self._free[offset] = freed
        self._coalesce()
        for offset, free in self._free.items():
            if free >= size:
                del self._free[offset]
                if free > size:
                    self._free[offset + size] = free - size
                return offset
        return None

    def _coalesce(self) -> None:
        """Merge free blocks that are next to each other."""
        merged: dict[int, int] = {}
        last = -1
        for offset, size in sorted(self._free.items()):
            if last >= 0 and last + merged[last] == offset:
                merged[last] += size
            else:
                merged[offset] = size
                last = offset
        self._free = merged

    def _grow(self, size: int) -> None:
        """Reserve memory for `size` bytes: a quarter of the present memory, or only the missing bytes if that fails."""
        end = self._reserved
        tail = next((free for at, free in self._free.items() if at + free == end), 0)
        ample = max(_MIN_GROWTH_BYTES, end // _GROWTH_DIVISOR // _PAGE * _PAGE)
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


class HostArenas:
    """The arenas of this rank and of its peers, the other ranks on its host.

    Args:
        rank: this rank in the world.
        own: this rank's arena; None if it has no peers.
        peers: the peers' arenas, by their ranks in the world.
    """

    def __init__(self, rank: int, own: ShmSegment | None, peers: Mapping[int, ShmSegment]) -> None:
        self._rank = rank
        self._own = None if own is None else Arena(own)
        self._peers = {peer: (segment, np.frombuffer(segment.memory, np.uint8)) for peer, segment in peers.items()}
        self._prefaulted = dict.fromkeys(peers, 0)  # bytes of each, from its beginning
        self._lock = threading.Lock()
        self._warned = False
        self._pid = os.getpid()

    def allocate(self, nbytes: int) -> Array:
        """Allocate at least `nbytes` bytes of shared memory; ordinary memory when it has run out.

        The memory is free again when its last view is gone.
        """
        if self._own is None or os.getpid() != self._pid:
            return np.empty(nbytes, np.uint8)
        try:
            with self._lock:
                return self._own.allocate(max(1, -(-nbytes // _PAGE)) * _PAGE)
        except OSError as error:
            self._warn_once(error)
            return np.empty(nbytes, np.uint8)

    def addresses(self) -> tuple[int, int]:
        """Find the addresses in this process between which this rank's arena lies; zeros if there is none."""
        return (0, 0) if self._own is None else self._own.addresses()

    def is_peer(self, rank: int) -> bool:
        """Return True if a rank of the world is a peer."""
        return rank in self._peers

    def span_of(self, buffer: Array) -> ArenaSpan | None:
        """Find the span of a buffer; None if it is not in this rank's arena.

        Args:
            buffer: one-dimensional and contiguous.
        """
        return None if self._own is None or not buffer.nbytes else self._own.span_of(buffer)

    def retire(self, span: ArenaSpan) -> None:
        """Never allocate this memory again: a late rank of a failed group may still write to it."""
        assert self._own is not None, "a span of this rank lies in its arena"
        with self._lock:
            self._own.retire(span)

    def view(self, rank: int, span: ArenaSpan) -> Array:
        """View a span of a peer's or this rank's arena as uint8."""
        if rank == self._rank:
            assert self._own is not None, "a span of this rank lies in its arena"
            return self._own.view(span)
        segment, memory = self._peers[rank]
        end = -(-(span.offset + span.nbytes) // _PAGE) * _PAGE
        start = self._prefaulted[rank]
        if start < end <= segment.nbytes:  # an owner reserves from the beginning on
            segment.prefault(start, end - start)
            self._prefaulted[rank] = end
        return memory[span.offset : span.offset + span.nbytes]

    def close(self) -> None:
        """Allocate no more, and give back all memory but that of this rank's arrays, which stay as they are."""
        own, self._own = self._own, None
        if own is not None:
            own.close()
        for segment, _ in self._peers.values():
            segment.close()

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            import logging  # its import is slow, and seldom needed

            logging.getLogger("ferro").warning(
                "gloo: group.empty has no shared memory left (%s): arrays are ordinary ones until "
                "others go. Make /dev/shm larger (in a container: --shm-size); ordinary arrays are "
                "copied through shared memory piece by piece",
                error,
            )


def address_of(array: Array) -> int:
    """Return the address of an array's memory in this process."""
    address: int = array.__array_interface__["data"][0]
    return address
