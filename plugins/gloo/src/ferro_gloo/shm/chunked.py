"""Collectives of large arrays, chunk by chunk: the description of an operation, and its runner.

Usually all data passes through slots, chunk by chunk. Where every rank that sends data has its array in an arena
(`ProcessGroup.empty`), the headers tell where the arrays are, and the other ranks use them in place.

`chunked_operation` describes an operation. The native helper does all its chunks in one call. Pure Python does the
same, for groups without the helper and for reductions that it does not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ferro.collectives.label import Call
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.arena import PACKED_SPAN, ArenaSpan, HostArenas, address_of
from ferro_gloo.shm.chunked_operation import ChunkedOperation
from ferro_gloo.shm.kernels import PAST_CACHES_BYTES, are_apart, as_bytes, has_arithmetic, reduce_into
from ferro_gloo.shm.native import NATIVE, NativePlan
from ferro_gloo.shm.python_chunks import run_in_python, stage_chunk
from ferro_gloo.shm.region import SLOTS, ShmRegion
from ferro_gloo.shm.slot_ring import NO_SPAN, PEER_CHECK_S, SlotRing, packed_header
from ferro_gloo.tcp.backend import TcpBackend

# From this size on it is faster to use arrays in place, in Python, than to copy them through slots in native code.
# Measured with 2 ranks: an all_gather of 1 MiB takes 180 us in place and 150 us through slots, one of 64 MiB 7.2 ms and
# 8.4 ms.
IN_PLACE_BYTES = 2 << 20
# Of the native helper, for each rank. Measured with 2 ranks: chunks of 64 to 256 KiB take equally long, of 512 KiB a
# tenth longer. With 4 ranks on 2 cores a reduce_scatter of 1 MiB takes 830 us in chunks of 32 KiB, 500 in those of 85.
_NATIVE_CHUNK_BYTES = 64 << 10
_CACHE_LINE_BYTES = 64
_MAX_PLANS = 256  # that are remembered
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
        self._plans: dict[tuple[object, ...], NativePlan] = {}  # of the ordinary path
        self._cached_views: dict[tuple[bytes, ...], dict[int, Array]] = {}

    def chunk_bytes(self, parts: int = 1, reduction: Reduction | None = None) -> int:
        """Choose the length of a chunk where a slot holds `parts` of them; all ranks get the same."""
        whole = self._region.slot_bytes
        if self._is_native(reduction):
            whole = min(whole, parts * _NATIVE_CHUNK_BYTES)
        return max(_CACHE_LINE_BYTES, whole // parts // _CACHE_LINE_BYTES * _CACHE_LINE_BYTES)

    def reduce_into(self, reduction: Reduction, out: Array, operands: Sequence[Array]) -> None:
        """Reduce arrays, in order of rank, into `out`, which may be one of the first two; see `Reduction.into`.

        Ranks with the native helper get the same bits everywhere, for it chooses one of two zeros, or NaN, in another
        way than NumPy does.
        """
        if NATIVE is not None and self._is_native(reduction) and all(array.flags.aligned for array in (out, *operands)):
            NATIVE.reduce(out, operands, reduction.dtype.name, reduction.name, self.ranks)
        else:
            reduce_into(reduction, out, operands)

    def run(self, operation: ChunkedOperation, deadline: float) -> None:
        """Run an operation: every chunk is staged, reduced and taken (see `ChunkedLayout`), or all arrays in place."""
        span = self._span_of(operation.shared)
        try:
            number = self._publish_first(operation, span, deadline)
            following = self._use_in_place(operation, number, deadline)
        except BaseException:
            if span is not None:  # a late rank may still write into the array
                self._arenas.retire(span)
            raise
        if following is not None:
            self._run_chunks(operation, following, deadline)

    def finish(self, operation: ChunkedOperation, number: int, *, deadline: float) -> None:
        """Run the rest of an operation whose first chunk this rank has staged, and whose labels were compared."""
        following = self._use_in_place(operation, number, deadline)
        if following is not None:
            self._run_chunks(operation, following, deadline)

    def _run_chunks(self, operation: ChunkedOperation, number: int, deadline: float) -> None:
        layout, chunks = operation.layout, operation.layout.chunks
        if operation.uneven:
            chunks = max(self._ring.chunk_counts(number))
        self._ring.next = number + chunks * (2 if layout.two_phase else 1)
        plan = self.plan(operation, self._ring.call)
        arrays = (operation.source, operation.target)
        if plan is None or not all(array is None or array.flags.aligned for array in arrays):
            run_in_python(operation, self._region, self._ring, self.rank, number, chunks, deadline)
            return
        plan.number, plan.chunks = number, chunks
        plan.spins, plan.yields = self._region.counters.patience()
        late = plan.resume(operation.source, operation.target, number)
        while late is not None:
            self._ring.wait(late, deadline)
            late = plan.resume(operation.source, operation.target, late)

    def run_even(
        self, source: Array | None, target: Array | None, make: Callable[[], ChunkedOperation], deadline: float
    ) -> None:
        """Run the ring's present call, whose blocks have one size on all ranks; its plan is remembered.

        Args:
            source: this rank's data.
            target: its result.
            make: describes the operation on these arrays.
            deadline: absolute `time.monotonic()` second.
        """
        ring, sent, result = self._ring, as_bytes(source), as_bytes(target)
        place = None  # where in the result the source is, if they are not apart: plans leave out what is there already
        if sent is not None and result is not None and not are_apart(sent, result):
            place = address_of(sent) - address_of(result)
        key = (ring.call.label(), sent is None, result is None, place)
        plan = self._plans.get(key)
        if plan is not None and plan.accepts(sent, result):
            number = self.run_plan(plan, sent, result, partial(self._wait_in_plan, plan, deadline))
            if number is not None:
                self.finish(make(), number, deadline=deadline)
            return
        operation = make()
        self.run(operation, deadline)
        if plan is None and (plan := self.plan(operation, ring.call)) is not None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan

    def _wait_in_plan(self, plan: NativePlan, deadline: float, number: int) -> None:
        if plan.syncing:
            self._ring.complete(self._ring.call, number, number, deadline=deadline)
        else:  # the labels were compared, and other ranks may already begin the next operation
            self._ring.wait(number, deadline)

    def plan(self, operation: ChunkedOperation, call: Call) -> NativePlan | None:
        """Make the native helper's plan of an operation that belongs to a call; None where it cannot run it."""
        layout, step, ring = operation.layout, operation.layout.reduce, self._region.native_ring
        if NATIVE is None or ring is None or not self._is_native(None if step is None else step.reduction):
            return None
        reduction = None
        if step is not None:
            reduction = (step.own, step.out, step.nbytes, step.offsets, step.reduction.dtype.name, step.reduction.name)
        return NATIVE.ChunkedPlan(
            ring=ring,
            stage=layout.stage,
            own=layout.own,
            take=layout.take,
            reduction=reduction,
            sizes=(layout.source_bytes, layout.target_bytes, layout.in_place, layout.length, layout.chunks),
            two_phase=layout.two_phase,
            past_caches=layout.received_bytes >= PAST_CACHES_BYTES,
            arena=self._arenas.addresses()
            if max(layout.source_bytes, layout.target_bytes) >= IN_PLACE_BYTES
            else (0, 0),
            header=packed_header(call, layout.chunks),
        )

    def run_plan(
        self, plan: NativePlan, source: Array | None, target: Array | None, wait: Callable[[int], object]
    ) -> int | None:
        """Run a plan for arrays that it accepts; `wait` waits for a chunk, and compares labels while it is syncing.

        Returns:
            None; or the number of the first chunk, if another rank's array can be used in place: call `finish`.
        """
        plan.spins, plan.yields = self._region.counters.patience()
        late = plan.start(source, target)
        while late is not None:
            if plan.announced:
                return late
            wait(late)
            late = plan.resume(source, target, late)
        return None

    def _is_native(self, reduction: Reduction | None) -> bool:
        return self._region.native_ring is not None and (reduction is None or has_arithmetic(reduction))

    def _use_in_place(self, operation: ChunkedOperation, number: int, deadline: float) -> int | None:
        """Run the operation in place, if possible, once all ranks have published the first chunk.

        Returns:
            The first chunk's number; None when the operation is done.
        """
        if operation.in_place is None:
            return number
        spans = self._ring.spans(number)
        writers = range(self.ranks) if operation.writers is None else operation.writers
        if all(spans[rank] != NO_SPAN for rank in writers):
            self._run_in_place(operation, spans, number, deadline)
            return None
        # A rank that has announced a span, or has tried a single round, has not written its first chunk yet.
        is_incomplete = any(map(any, spans))
        if operation.uneven:
            is_incomplete |= 0 in self._ring.chunk_counts(number)
        return self._publish_first(operation, None, deadline) if is_incomplete else number

    def _span_of(self, shared: Array | None) -> ArenaSpan | None:
        if shared is None or shared.nbytes < IN_PLACE_BYTES:
            return None
        return self._arenas.span_of(shared)

    def _publish_first(self, operation: ChunkedOperation, span: ArenaSpan | None, deadline: float) -> int:
        ring = self._ring
        number = ring.begin(span, operation.layout.chunks)
        if span is None:
            stage_chunk(operation, 0, self._region.byte_slots[number % SLOTS][self.rank])
        ring.synchronize(number, deadline)
        return number

    def _run_in_place(
        self, operation: ChunkedOperation, spans: tuple[bytes, ...], number: int, deadline: float
    ) -> None:
        self._ring.next = number + 2
        began = time.monotonic()
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
