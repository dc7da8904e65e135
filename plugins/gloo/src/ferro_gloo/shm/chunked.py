"""Collectives of large arrays, chunk by chunk: the description of an operation, and its runner.

Usually all data passes through slots, chunk by chunk. Where every rank that sends data has its array in an arena
(`ProcessGroup.empty`), the headers tell where the arrays are, and the other ranks use them in place.

`chunked_operation` describes an operation. The native helper does all its chunks in one call. Pure Python does the
same, for groups without the helper and for reductions that it does not know.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.arena import PACKED_SPAN, ArenaSpan, HostArenas
from ferro_gloo.shm.chunked_operation import ChunkedOperation
from ferro_gloo.shm.kernels import PAST_CACHES_BYTES, copy_large, has_arithmetic
from ferro_gloo.shm.python_chunks import run_in_python, stage_chunk
from ferro_gloo.shm.region import SLOTS, ShmRegion
from ferro_gloo.shm.slot_ring import NO_SPAN, PEER_CHECK_S, SlotRing
from ferro_gloo.tcp.backend import TcpBackend

# From this size on it is faster to use arrays in place, though that takes one more round.
IN_PLACE_BYTES = 128 << 10
# A chunk of the native helper, which does 4 or so at a time in the caches of a core.
_NATIVE_CHUNK_BYTES = int(__import__("os").environ.get("FC", "64")) << 10
_LEAST_CHUNK_BYTES = 32 << 10
_CACHE_LINE_BYTES = 64
_MAX_CACHED_VIEWS = 256  # combinations of the ranks' arrays


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
        others: all ranks but this one, the next one first.
    """

    def __init__(self, region: ShmRegion, ring: SlotRing, tcp: TcpBackend, arenas: HostArenas) -> None:
        self._tcp = tcp
        self._arenas = arenas
        self._ring = ring
        self._region = region
        self.rank = tcp.rank
        self.ranks = tcp.world_size
        self.others = [(self.rank + distance) % self.ranks for distance in range(1, self.ranks)]
        self._cached_views: dict[tuple[bytes, ...], dict[int, Array]] = {}

    def chunk_bytes(self, parts: int = 1, reduction: Reduction | None = None) -> int:
        """Choose the length of a chunk where a slot holds `parts` of them; all ranks get the same."""
        by_native = self._region.native_ring is not None and (reduction is None or has_arithmetic(reduction))
        whole = min(self._region.slot_bytes, _NATIVE_CHUNK_BYTES) if by_native else self._region.slot_bytes
        whole = max(whole, min(self._region.slot_bytes, parts * _LEAST_CHUNK_BYTES))
        return max(_CACHE_LINE_BYTES, whole // parts // _CACHE_LINE_BYTES * _CACHE_LINE_BYTES)

    def is_shared(self, array: Array) -> bool:
        """Say whether an array lies in this rank's arena."""
        return self._arenas.span_of(array) is not None

    def run(self, operation: ChunkedOperation, deadline: float) -> None:
        """Run an operation: every chunk is staged, reduced and taken; see `ChunkedOperation`."""
        number = self._begin(operation, deadline)
        if number is None:
            return
        chunks = operation.chunks
        if operation.uneven:
            chunks = max(self._ring.chunk_counts(number))
        self._ring.next = number + chunks * (2 if operation.two_phase else 1)
        if not self._run_natively(operation, number, chunks, deadline):
            run_in_python(operation, self._region, self._ring, self.rank, number, chunks, deadline)

    def _run_natively(self, operation: ChunkedOperation, number: int, chunks: int, deadline: float) -> bool:
        """Run all chunks by the native helper; return False if it cannot."""
        ring, step = self._region.native_ring, operation.reduce
        if ring is None or (step is not None and not has_arithmetic(step.reduction)):
            return False
        reduction = None
        if step is not None:
            own = step.own if step.own.flags.aligned else step.own.copy()
            out = step.out if step.out is None or step.out.flags.aligned else np.empty_like(own)
            reduction = (out, own, tuple(step.offsets), step.reduction.dtype.name, step.reduction.name)
        arrays = (tuple(operation.stage), tuple(operation.own), tuple(operation.take), reduction)
        past_caches = operation.received_bytes >= PAST_CACHES_BYTES
        spins, yields = self._region.counters.patience()
        late: int | None = number
        while late is not None:
            numbers = (operation.length, chunks, number, late, operation.two_phase, past_caches, spins, yields)
            late = ring.run_chunks(*arrays, numbers, PEER_CHECK_S)
            if late is not None:
                self._ring.wait(late, deadline)
        if step is not None and step.out is not None and out is not None and out is not step.out:
            step.out[...] = out
        return True

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
                self._run_in_place(operation, spans, number, deadline)
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
        if span is None:
            stage_chunk(operation, 0, self._region.byte_slots[number % SLOTS][self.rank])
        ring.synchronize(number, deadline)
        return number

    def _run_in_place(
        self, operation: ChunkedOperation, spans: tuple[bytes, ...], number: int, deadline: float
    ) -> None:
        self._ring.next = number + 2
        began = time.monotonic()
        for target, source in operation.own:
            copy_large(target, source)
        assert operation.in_place is not None, "the caller has checked it"
        operation.in_place(self._view(spans))
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
