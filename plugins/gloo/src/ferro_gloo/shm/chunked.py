"""Collectives of large arrays, chunk by chunk: the description of an operation, and its runner.

Usually all data passes through slots, chunk by chunk. Where every rank that sends data has its array in an arena
(`ProcessGroup.empty`), the headers tell where the arrays are, and the other ranks use them in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.arena import PACKED_SPAN, ArenaSpan, HostArenas
from ferro_gloo.shm.kernels import slot_block_bytes
from ferro_gloo.shm.region import SLOTS, ShmRegion
from ferro_gloo.shm.slot_ring import NO_SPAN, PEER_CHECK_S, SlotRing
from ferro_gloo.tcp.backend import TcpBackend

# From this size on it is faster to use arrays in place, though that takes one more round.
IN_PLACE_BYTES = 128 << 10
_MAX_CACHED_VIEWS = 256  # combinations of the ranks' arrays


# Takes k and all ranks' slots with chunk k; writes the chunk that this rank publishes next to the last argument.
Respond: TypeAlias = Callable[[int, Sequence[Array], Array], object]


@dataclass(slots=True, kw_only=True)
class ChunkedOperation:
    """One rank's part in a collective.

    Attributes:
        chunks: the number of chunks.
        write: writes chunk k into this rank's slot; None when this rank sends nothing.
        read: uses chunk k in all ranks' slots; None when this rank needs nothing.
        dtype: the dtype of the elements in the slots.
        source: this rank's data (uint8) if others may use it in place; None otherwise.
        writers: the ranks that send data; None for all.
        in_place: runs instead of `write` and `read` when all writers' arrays can be used in place. Its argument maps
            ranks to arrays, in order of rank; no rank changes its array until `in_place` has returned on all ranks.
        uneven: ranks may have different `chunks`; the largest is used, and 0 means that the rank has tried a single
            round.
    """

    chunks: int
    write: Callable[[int, Array], object] | None = None
    read: Callable[[int, Sequence[Array]], object] | None = None
    dtype: np.dtype = np.dtype(np.uint8)  # noqa: RUF009 - immutable
    source: Array | None = None
    writers: Sequence[int] | None = None
    in_place: Callable[[Mapping[int, Array]], object] | None = None
    uneven: bool = False


class ChunkedRunner:
    """Runs the operations of one group, one after the other.

    Args:
        region: the memory of the group.
        ring: its slots.
        tcp: its ranks over TCP.
        arenas: the arrays that can be used in place.

    Attributes:
        rank: this rank.
        ranks: the number of ranks.
        others: all ranks but this one.
        slot_bytes: the size of a slot.
        slot_block_bytes: the size of a slot's block for each other rank.
    """

    def __init__(self, region: ShmRegion, ring: SlotRing, tcp: TcpBackend, arenas: HostArenas) -> None:
        self._tcp = tcp
        self._arenas = arenas
        self._ring = ring
        self._region = region
        self.rank = tcp.rank
        self.ranks = tcp.world_size
        self.others = [rank for rank in range(self.ranks) if rank != self.rank]
        self.slot_bytes = region.slot_bytes
        self.slot_block_bytes = slot_block_bytes(region.slot_bytes, self.ranks)
        self._cached_views: dict[tuple[bytes, ...], dict[int, Array]] = {}

    def run(self, operation: ChunkedOperation, deadline: float) -> None:
        """Run an operation of one phase: every chunk is written and read."""
        number = self._begin(operation, deadline)
        if number is None:
            return
        ring, me, chunks = self._ring, self.rank, operation.chunks
        if operation.uneven:
            chunks = max(ring.chunk_counts(number))
        ring.next = number + chunks
        write, read, slots = operation.write, operation.read, self._region.slots(operation.dtype)
        for k in range(chunks):
            if k + 1 < chunks:
                if write is not None:
                    write(k + 1, slots[(number + k + 1) % SLOTS][me])
                ring.publish(number + k + 1)
            if k:
                ring.wait(number + k, deadline)
            if read is not None:
                read(k, slots[(number + k) % SLOTS])

    def run_two_phase(self, operation: ChunkedOperation, respond: Respond, deadline: float) -> None:
        """Run an operation of two phases: every chunk is written, answered by all, and read.

        Args:
            operation: `chunks` does not count the responses; `read` is given the responses.
            respond: computes this rank's response to a chunk.
            deadline: absolute `time.monotonic()` second.
        """
        number = self._begin(operation, deadline)
        if number is None:
            return
        ring, me, chunks = self._ring, self.rank, operation.chunks
        ring.next = number + 2 * chunks
        write, read, slots = operation.write, operation.read, self._region.slots(operation.dtype)
        assert write is not None, "every rank writes"
        for k in range(chunks):
            current = number + 2 * k
            if k:
                ring.wait(current, deadline)
            respond(k, slots[current % SLOTS], slots[(current + 1) % SLOTS][me])
            ring.publish(current + 1)
            if k + 1 < chunks:
                write(k + 1, slots[(current + 2) % SLOTS][me])
                ring.publish(current + 2)
            ring.wait(current + 1, deadline)
            if read is not None:
                read(k, slots[(current + 1) % SLOTS])

    def _begin(self, operation: ChunkedOperation, deadline: float) -> int | None:
        """Publish the first chunk and compare labels; run the operation in place if possible.

        Returns:
            The first chunk's number; None when the operation is done.
        """
        span = self._span_of(operation.source)
        try:
            number = self._publish_first(operation, span, deadline)
            if operation.in_place is None:
                return number
            spans = self._ring.spans(number)
            writers = range(self.ranks) if operation.writers is None else operation.writers
            if all(spans[rank] != NO_SPAN for rank in writers):
                self._run_in_place(operation.in_place, spans, number, deadline)
                return None
        except BaseException:
            if span is not None:  # a late rank may still write into the array
                self._arenas.retire(span)
            raise
        # A rank that has announced a span, or has tried a single round, has not written its first chunk yet.
        is_incomplete = any(map(any, spans))
        if operation.uneven:
            is_incomplete |= 0 in self._ring.chunk_counts(number)
        return self._publish_first(operation, None, deadline) if is_incomplete else number

    def _span_of(self, source: Array | None) -> ArenaSpan | None:
        if source is None or source.nbytes < IN_PLACE_BYTES:
            return None
        return self._arenas.span_of(source)

    def _publish_first(self, operation: ChunkedOperation, span: ArenaSpan | None, deadline: float) -> int:
        ring = self._ring
        number = ring.begin(span, operation.chunks)
        if span is None and operation.write is not None:
            slot = self._region.slots(operation.dtype)[number % SLOTS][self.rank]
            operation.write(0, slot)
        ring.synchronize(number, deadline)
        return number

    def _run_in_place(
        self, action: Callable[[Mapping[int, Array]], object], spans: tuple[bytes, ...], number: int, deadline: float
    ) -> None:
        self._ring.next = number + 2
        began = time.monotonic()
        action(self._view(spans))
        self._ring.publish(number + 1)
        self._ring.wait(number + 1, deadline)
        if time.monotonic() - began > PEER_CHECK_S:
            # The others may have failed meanwhile, and have reused their arrays.
            self._tcp.check_peers(())

    def _view(self, spans: tuple[bytes, ...]) -> Mapping[int, Array]:
        """View the arrays in these spans, by rank."""
        arrays = self._cached_views.get(spans)
        if arrays is None:
            arrays = {
                rank: self._arenas.view(self._tcp.ranks[rank], ArenaSpan(*PACKED_SPAN.unpack(span)))
                for rank, span in enumerate(spans)
                if span != NO_SPAN
            }
            if len(self._cached_views) >= _MAX_CACHED_VIEWS:
                self._cached_views.clear()
            self._cached_views[spans] = arrays
        return arrays
