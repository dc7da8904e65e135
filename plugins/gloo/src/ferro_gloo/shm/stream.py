"""Stream: the chunks that the ranks of a region show each other, operation after operation.

Every rank writes chunk after chunk into its slots, in turn, and after each says how far it has
come; a chunk is there for all when every rank has come so far. Chunks are numbered through the
whole life of the group, and all ranks count alike, so that one wait a chunk is enough, and no
operation needs a barrier before or after it:

    number     0  1  2  3  4  5  6  7  …        operation A: chunks 0 to 2, B: 3, C: 4 to 7
    slot       0  1  2  3  0  1  2  3  …

A slot is written again four chunks later. Within an operation a rank writes chunk k+1 before it
waits for chunk k. Chunk k+1 lies where chunk k-3 was, which the others have left behind: they
had shown k-1, as the last wait found, and so were done with k-3 (they show a chunk when they
have used the one two before). An operation's first chunk follows the last one's in the same way.

The chunk that begins an operation has a header: what is called, and where the caller's array is,
if that can be used in place. Ranks that call different things find out there.

Numbers and chunks are seen in the order in which they were written; see `signals`.
"""

from __future__ import annotations

import time

from ferro.collectives.label import LABEL_BYTES, Call, mismatch
from ferro.errors import PeerLost
from ferro_gloo.shm.arena import PLACE, Place
from ferro_gloo.shm.region import SLOTS, Region
from ferro_gloo.tcp.backend import TcpBackend

_PLACE_END = LABEL_BYTES + PLACE.size
_ROUNDS_END = _PLACE_END + 8
NOWHERE = bytes(PLACE.size)
_NOTHING = NOWHERE + bytes(8)
# How long a rank waits before it looks whether those it waits for are still there.
LOOK_S = 0.01


class Stream:
    """One rank's end of the stream.

    Args:
        region: the memory.
        part: the same ranks over TCP, where it shows when one is lost or the group aborted.

    Attributes:
        next: number of the next chunk.
        call: what is being carried out.
    """

    def __init__(self, region: Region, part: TcpBackend) -> None:
        self.next = 0
        self._part = part
        self._rank = part.rank
        self._signals = region.signals
        self._headers = region.headers
        others = [rank for rank in range(part.world_size) if rank != part.rank]
        self._labels = [
            [(rank, region.headers[rank][slot][:LABEL_BYTES]) for rank in others]
            for slot in range(SLOTS)
        ]
        self._written = [b""] * SLOTS
        self.begin(Call("barrier"))

    def begin(self, call: Call) -> None:
        """Take the call that the operations from here on belong to."""
        self.call = call
        self._label = call.label()
        self._plain = self._label + _NOTHING

    def open(self, place: Place | None = None, rounds: int = 0) -> int:
        """Write the header of the operation that begins with the next chunk; return its number.

        Args:
            place: where this rank's array is, if it can be used in place.
            rounds: how many chunks this rank knows of; 0 where the others need not know.
        """
        number = self.next
        self.next = number + 1
        header = self._plain
        if place is not None or rounds:
            where = NOWHERE if place is None else PLACE.pack(*place)
            header = self._label + where + rounds.to_bytes(8, "little")
        slot = number % SLOTS
        if header != self._written[slot]:
            self._headers[self._rank][slot][:_ROUNDS_END] = header
            self._written[slot] = header
        return number

    def meet(self, number: int, deadline: float) -> None:
        """Show an operation's first chunk, wait for everybody's, compare what they call.

        Raises:
            CollectiveMismatch: a rank calls something else.
        """
        self.show(number)
        self.wait(number, deadline)
        for rank, label in self._labels[number % SLOTS]:
            if label != self._label:
                names = self._part.names
                raise mismatch(names[self._rank], self.call, names[rank], bytes(label))

    def places(self, number: int) -> tuple[bytes, ...]:
        """Return where each rank's array is, packed, as its header says; zeros: in no arena."""
        slot = number % SLOTS
        return tuple([bytes(row[slot][LABEL_BYTES:_PLACE_END]) for row in self._headers])

    def rounds(self, number: int) -> list[int]:
        """Return how many chunks each rank knows of, as its header says."""
        slot = number % SLOTS
        return [
            int.from_bytes(row[slot][_PLACE_END:_ROUNDS_END], "little") for row in self._headers
        ]

    def show(self, number: int) -> None:
        """Say that this rank's chunk is there, and that it is done with the one two before."""
        self._signals.publish(number + 1)

    def give_up(self) -> None:
        """Take back what this rank has shown: whoever comes later is not to go on with it.

        They find this rank behind, and so look why.
        """
        self._signals.publish(-1)

    def wait(self, number: int, deadline: float) -> None:
        """Wait until every rank has shown this chunk.

        Raises:
            TimeoutError, PeerLost, GroupClosed.
        """
        seconds = LOOK_S
        while self._signals.wait(number + 1, seconds) is not None:
            behind = self._signals.behind(number + 1)
            try:
                self._part.look(behind)
            except PeerLost:
                # It may have shown the chunk, the last that it had to, and left.
                if self._signals.behind(number + 1):
                    raise
            seconds = min(LOOK_S, deadline - time.monotonic())
            if seconds <= 0:
                raise TimeoutError("the deadline passed")
