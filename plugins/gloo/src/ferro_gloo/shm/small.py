"""Small: the collectives of what fits a slot. All ranks show all they have, mostly in one round.

Blocks are even here; what is not goes the way of `movements` and
`reductions`. Methods take what those of `Backend`
take; buffers hold as many bytes as a slot at most.
"""

from __future__ import annotations

import numpy as np

from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.combine import reduce_into
from ferro_gloo.shm.region import SLOTS, Region
from ferro_gloo.shm.stream import Stream

# Up to so many ranks each reduces all that is shown; of more, the first does and shows the result.
# Measured with 8 ranks on 2 cores: 4 KiB take 90 us so, 110 if each reduces all.
_FEW_RANKS = 4
# Blocks of up to this size are gathered all at once, this rank's own with the others'.
_AT_ONCE_BYTES = 8 << 10


class Small:
    """One rank's part in them.

    Args:
        region: the memory of the group.
        stream: its chunks.
        rank: this rank.
    """

    def __init__(self, region: Region, stream: Stream, rank: int) -> None:
        self._region = region
        self._stream = stream
        self._rank = rank
        self._ranks = region.ranks
        self._slots = region.slots(np.dtype(np.uint8))
        self._tables = region.tables()

    def barrier(self, deadline: float) -> None:
        """See `Backend.barrier`."""
        self._show(None, deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        slot = self._show(buffer, deadline)
        if self._ranks <= _FEW_RANKS:
            self._reduce(buffer, buffer, 0, reduction, slot)
        else:
            self._reduce_by_the_first(buffer, reduction, slot, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
        """See `Backend.reduce`."""
        slot = self._show(buffer, deadline)
        if self._rank == root:
            self._reduce(buffer, buffer, 0, reduction, slot)

    def reduce_scatter(
        self, source: Array, out: Array, reduction: Reduction, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        slot, start = self._show(source, deadline), self._rank * out.size
        self._reduce(out, source[start : start + out.size], start, reduction, slot)

    def broadcast(self, buffer: Array, root: int, deadline: float) -> None:
        """See `Backend.broadcast`."""
        at_root = self._rank == root
        slot = self._show(buffer if at_root else None, deadline)
        if not at_root:
            _bytes(buffer)[...] = self._slots[slot][root][: buffer.nbytes]

    def all_gather(self, buffer: Array, deadline: float) -> None:
        """See `Backend.all_gather`."""
        size = buffer.nbytes // self._ranks
        blocks = _bytes(buffer).reshape(self._ranks, size)
        slot = self._show(blocks[self._rank], deadline)
        if size <= _AT_ONCE_BYTES:
            blocks[...] = self._tables[slot][:, :size]
            return
        for rank, shown in enumerate(self._slots[slot]):
            if rank != self._rank:
                blocks[rank] = shown[:size]

    def gather(self, block: Array, out: Array | None, deadline: float) -> None:
        """See `Backend.gather`."""
        slot = self._show(block, deadline)
        if out is not None:
            blocks = _bytes(out).reshape(self._ranks, block.nbytes)
            blocks[...] = self._tables[slot][:, : block.nbytes]

    def scatter(self, block: Array, source: Array | None, root: int, deadline: float) -> None:
        """See `Backend.scatter`."""
        slot, start = self._show(source, deadline), self._rank * block.nbytes
        _bytes(block)[...] = self._slots[slot][root][start : start + block.nbytes]

    def all_to_all(self, source: Array, out: Array, deadline: float) -> bool:
        """See `Backend.all_to_all`; return False where another rank's blocks are uneven.

        Nothing has been done then, but that they have met; all go on as `movements` does.
        """
        number = self._stream.next
        slot = self._show(source, deadline)
        if any(self._stream.rounds(number)):
            return False
        size = source.nbytes // self._ranks
        start = self._rank * size
        blocks = _bytes(out).reshape(self._ranks, size)
        blocks[...] = self._tables[slot][:, start : start + size]
        return True

    def _show(self, data: Array | None, deadline: float) -> int:
        """Show data, wait until all have shown theirs; return in which slot."""
        stream = self._stream
        number = stream.open()
        slot = number % SLOTS
        if data is not None:
            self._slots[slot][self._rank][: data.nbytes] = _bytes(data)
        stream.meet(number, deadline)
        return slot

    def _reduce_by_the_first(
        self, buffer: Array, reduction: Reduction, slot: int, deadline: float
    ) -> None:
        """Reduce what all show in `slot`; all take the result from the first rank's next one."""
        stream, number = self._stream, self._stream.next
        stream.next = number + 1
        result = self._region.slots(buffer.dtype)[number % SLOTS][0][: buffer.size]
        if self._rank == 0:
            self._reduce(result, buffer, 0, reduction, slot)
        stream.show(number)
        stream.wait(number, deadline)
        buffer[...] = result

    def _reduce(self, out: Array, own: Array, start: int, reduction: Reduction, slot: int) -> None:
        """Reduce what all show from element `start` on, of which `own` is this rank's, to `out`."""
        end = start + out.size
        parts = [shown[start:end] for shown in self._region.slots(out.dtype)[slot]]
        if own is not out or self._rank < 2:  # the first two are read before `out` is written
            parts[self._rank] = own
        reduce_into(reduction, out, parts)


def _bytes(array: Array) -> Array:
    return array.view(np.uint8)
