"""SlotRing: the slots of a region, used in turn for the chunks of one operation after another.

Every rank writes its chunks into its slots in turn, and publishes a counter after each chunk. A chunk is complete when
all ranks have published it. All ranks give a chunk the same number, which never repeats during the life of the group.
So one wait per chunk is enough, and no operation needs a barrier before or after it:

    number     0  1  2  3  4  5  6  7  …        operation A: chunks 0 to 2, B: 3, C: 4 to 7
    slot       0  1  2  3  0  1  2  3  …

A slot is written again four chunks later. Within an operation a rank writes chunk k+1 before it waits for chunk k.
Chunk k+1 goes into the slot of chunk k-3, which all ranks have read by then: this rank has waited until all had
published chunk k-1, and a rank publishes chunk k-1 only when it has read chunk k-3. The same holds from the last chunk
of one operation to the first of the next.

A rank may publish chunk k+1 together with chunk k if it writes nothing into it: it has read chunk k-1 by then, since
that belongs to the operation before. And it may go on from chunk k+1 when one other rank has published it, if that rank
has waited until all had published chunk k: no rank is then further behind than the rule above needs. The short path
(`native/collective.c`) does both in its second round, where rank 0 publishes what it has reduced. Chunk k+1 then has a
header of its own, equal to no operation's: ranks that did not wait for chunk k must not find an old one there.

A small scatter with its header (`native/announced.c`) ends before all ranks have published its last chunk, k+1: each
rank has waited for chunk k of all, and for chunk k+1 of the root. The next chunk, k+2, may be written and published,
since all have read chunk k-2, and this rank has read chunk k. Each rank awaits chunk k+2 of all before it writes chunk
k+3; only a root that writes two chunks at once does not, and looks first whether all have published chunk k+1.

The first chunk of an operation has a header: the call's label, and the place of this rank's array (its `ArenaSpan`) if
the others can use it in place. Ranks whose calls differ find the difference there.

With the native helper a rank stores a chunk's number in two places: first in the line before the slot (`region`), then
in its counter. The short path waits for lines, where a small message comes with its number; everything else waits for
counters, and so do sleepers. A rank that has seen a counter may rely on the line, and on the data, which were stored
before. The line also has a digest of the label. Equal labels have equal digests; a short path that finds another digest
compares the labels here, for the error.

A rank that gives up takes its numbers back, in its counter and its lines, so that no rank that comes later completes a
collective with it. It publishes nothing afterwards. A rank that has seen its numbers before completes: it has all data.

All ranks see chunks, lines and counters in the order in which they were written (see `counters`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ferro.collectives.label import LABEL_BYTES, Call, mismatch
from ferro.errors import GroupClosed, PeerLost, with_awaited
from ferro_gloo.shm.arena import PACKED_SPAN, ArenaSpan
from ferro_gloo.shm.plain_ring import PlainRing
from ferro_gloo.shm.region import SLOTS, ShmRegion
from ferro_gloo.tcp.backend import TcpBackend

_SPAN_END = LABEL_BYTES + PACKED_SPAN.size
_CHUNK_COUNT_END = _SPAN_END + 8
NO_SPAN = bytes(PACKED_SPAN.size)
_ONLY_LABEL = NO_SPAN + bytes(8)
# A waiting rank checks at this interval that the others are still connected.
PEER_CHECK_S = 0.01


def packed_header(call: Call, chunks: int) -> bytes:
    """Return the header of an operation of so many chunks, in which no array of this rank is used in place."""
    return call.label() + NO_SPAN + chunks.to_bytes(8, "little")


class SlotRing:
    """One rank's view of the ring.

    Args:
        region: the memory.
        tcp: the same ranks over TCP, which notices a lost rank or an abort.

    Attributes:
        call: the current call.
    """

    def __init__(self, region: ShmRegion, tcp: TcpBackend) -> None:
        self._tcp = tcp
        self._rank = tcp.rank
        self._counters = region.counters
        self._headers = region.headers
        self._ring = region.native_ring or PlainRing(region.counters, region.headers[tcp.rank])
        others = [rank for rank in range(tcp.world_size) if rank != tcp.rank]
        self._labels = [[(rank, region.headers[rank][slot][:LABEL_BYTES]) for rank in others] for slot in range(SLOTS)]
        self.set_call(Call("barrier"))

    @property
    def next(self) -> int:
        """The number of the next chunk."""
        return self._ring.next

    @next.setter  # noqa: A003 - the name that the native ring has, too
    def next(self, number: int) -> None:
        self._ring.next = number

    def set_call(self, call: Call) -> None:
        """Set the call to which the next operations belong."""
        self.call = call
        self._label = call.label()
        self._plain_header = self._label + _ONLY_LABEL

    def begin(self, span: ArenaSpan | None = None, chunks: int = 0) -> int:
        """Begin an operation: write its header; return the number of its first chunk.

        Args:
            span: where this rank's array is, if others can use it in place.
            chunks: this rank's number of chunks; 0 where the others need not know it.
        """
        if span is None and not chunks:
            return self._ring.begin(self._plain_header)
        packed = NO_SPAN if span is None else PACKED_SPAN.pack(*span)
        return self._ring.begin(self._label + packed + chunks.to_bytes(8, "little"))

    def synchronize(self, number: int, deadline: float) -> None:
        """Publish an operation's first chunk, wait until all ranks have, and compare their labels.

        Raises:
            CollectiveMismatch: a rank makes another call.
        """
        self._ring.publish(number)
        self.wait(number, deadline)
        self._compare_labels(number)

    def complete(self, call: Call, number: int, awaited: int, *, deadline: float) -> None:
        """Wait for the other ranks in a call that the native helper has begun; raise what `synchronize` raises.

        Args:
            call: the call.
            number: the number of its first chunk.
            awaited: the number of the chunk to wait for, the first or a later one.
            deadline: absolute `time.monotonic()` second.
        """
        self.set_call(call)
        self.wait(number, deadline)
        self._compare_labels(number)
        if awaited > number:
            self.wait(awaited, deadline)

    def spans(self, number: int) -> tuple[bytes, ...]:
        """Read each rank's packed span from its header; zeros where the header has none."""
        slot = number % SLOTS
        return tuple([bytes(row[slot][LABEL_BYTES:_SPAN_END]) for row in self._headers])

    def chunk_counts(self, number: int) -> list[int]:
        """Read each rank's number of chunks from its header."""
        slot = number % SLOTS
        return [int.from_bytes(row[slot][_SPAN_END:_CHUNK_COUNT_END], "little") for row in self._headers]

    def calls_ahead(self, ranks: Sequence[int]) -> dict[int, bytes]:
        """Find those of these ranks that have begun an operation which this rank has not; return its labels."""
        number = self.next
        behind = self._counters.behind(number + 1)
        headers = {rank: self._headers[rank][number % SLOTS] for rank in ranks if rank not in behind}
        return {rank: bytes(header[:LABEL_BYTES]) for rank, header in headers.items()}

    def publish(self, number: int) -> None:
        """Tell the others that this rank has written chunk `number`, and has read chunk `number - 2`."""
        self._ring.publish(number)

    def retract(self) -> None:
        """Take back all published chunks, so that a late rank waits for them, and finds the reason."""
        self._ring.retract()

    def wait(self, number: int, deadline: float) -> None:
        """Wait until every rank has published a chunk.

        Raises:
            TimeoutError, PeerLost, GroupClosed.
        """
        seconds = PEER_CHECK_S
        while self._counters.wait(number + 1, seconds) is not None:
            behind = self._counters.behind(number + 1)
            awaited = [self._tcp.names[rank] for rank in behind]
            try:
                self._tcp.check_peers(behind)
            except PeerLost:
                # The peer may have published this chunk, its last one, and then left.
                if self._counters.behind(number + 1):
                    raise
            except GroupClosed as error:
                raise with_awaited(error, awaited)  # noqa: B904 - the same error
            seconds = min(PEER_CHECK_S, deadline - time.monotonic())
            if seconds <= 0:
                raise with_awaited(self._tcp.timeout(), awaited)

    def _compare_labels(self, number: int) -> None:
        for rank, label in self._labels[number % SLOTS]:
            if label != self._label:
                names = self._tcp.names
                raise mismatch(names[self._rank], self.call, names[rank], bytes(label))
