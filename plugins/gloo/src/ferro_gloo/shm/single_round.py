"""Collectives of arrays that fit a slot: every rank publishes its whole array, in most cases in one round.

The native helper does the same in one call (`native/collective.c`), where it can. Ranks that run this meet ranks that
run that, so both put the same data in the same places, in the same rounds.

All blocks have one size here; `data_movement` and `reductions` have the other cases. Methods take the arguments of the
methods of `Backend`.
"""

from __future__ import annotations

import numpy as np

from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.kernels import has_arithmetic, reduce_into
from ferro_gloo.shm.native import NATIVE
from ferro_gloo.shm.region import SLOTS, ShmRegion
from ferro_gloo.shm.slot_ring import SlotRing

# In groups of at most this many ranks, each rank reduces all arrays; in larger groups rank 0 reduces and publishes the
# result. Measured with 8 ranks on 2 cores: 4 KiB take 90 us if rank 0 reduces, 110 if each does.
_EACH_REDUCES_RANKS = 4
# Blocks of up to this size are copied in one NumPy call, together with this rank's own block.
_GATHERED_AT_ONCE_BYTES = 8 << 10
_UINT8 = np.dtype(np.uint8)


class SingleRoundCollectives:
    """One rank's part in these collectives.

    Args:
        region: the memory of the group.
        ring: its slots.
        rank: this rank.
    """

    def __init__(self, region: ShmRegion, ring: SlotRing, rank: int) -> None:
        self._region = region
        self._ring = ring
        self._rank = rank
        self._ranks = region.ranks
        self._is_native = region.native_ring is not None

    def barrier(self, deadline: float) -> None:
        """See `Backend.barrier`."""
        self._publish(None, deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        slot = self._publish(buffer, deadline)
        if self._ranks <= _EACH_REDUCES_RANKS:
            self._reduce(buffer, buffer, 0, reduction, slot)
        else:
            self._reduce_on_rank_0(buffer, reduction, slot, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
        """See `Backend.reduce`."""
        slot = self._publish(buffer, deadline)
        if self._rank == root:
            self._reduce(buffer, buffer, 0, reduction, slot)

    def reduce_scatter(self, source: Array, out: Array, reduction: Reduction, deadline: float) -> None:
        """See `Backend.reduce_scatter`."""
        slot, start = self._publish(source, deadline), self._rank * out.size
        self._reduce(out, source, start, reduction, slot)

    def broadcast(self, buffer: Array, root: int, deadline: float) -> None:
        """See `Backend.broadcast`."""
        at_root = self._rank == root
        slot = self._publish(buffer if at_root else None, deadline)
        if not at_root:
            _bytes(buffer)[...] = self._message(buffer.nbytes, slot, root)

    def all_gather(self, buffer: Array, deadline: float) -> None:
        """See `Backend.all_gather`."""
        size = buffer.nbytes // self._ranks
        blocks = _bytes(buffer).reshape(self._ranks, size)
        slot = self._publish(blocks[self._rank], deadline)
        if size <= _GATHERED_AT_ONCE_BYTES:
            blocks[...] = self._region.stacked_messages(size, slot)[:, :size]
            return
        for rank in range(self._ranks):
            if rank != self._rank:
                blocks[rank] = self._message(size, slot, rank)

    def gather(self, block: Array, out: Array | None, deadline: float) -> None:
        """See `Backend.gather`."""
        slot = self._publish(block, deadline)
        if out is not None:
            blocks = _bytes(out).reshape(self._ranks, block.nbytes)
            blocks[...] = self._region.stacked_messages(block.nbytes, slot)[:, : block.nbytes]

    def scatter(self, block: Array, source: Array | None, root: int, deadline: float) -> None:
        """See `Backend.scatter`."""
        slot, start = self._publish(source, deadline), self._rank * block.nbytes
        _bytes(block)[...] = self._message(self._ranks * block.nbytes, slot, root)[start : start + block.nbytes]

    def all_to_all(self, source: Array, out: Array, deadline: float) -> bool:
        """See `Backend.all_to_all`; return False where another rank's blocks are uneven.

        In that case the ranks have only synchronized, and `data_movement.all_to_all` does the work.
        """
        number = self._ring.next
        slot = self._publish(source, deadline)
        if any(self._ring.chunk_counts(number)):
            return False
        size = source.nbytes // self._ranks
        start = self._rank * size
        blocks = _bytes(out).reshape(self._ranks, size)
        blocks[...] = self._region.stacked_messages(source.nbytes, slot)[:, start : start + size]
        return True

    def _publish(self, data: Array | None, deadline: float) -> int:
        """Publish data in the next slot, and wait for all ranks'; return the slot's index."""
        ring = self._ring
        number = ring.begin()
        slot = number % SLOTS
        if data is not None:
            self._message(data.nbytes, slot, self._rank)[...] = data.view(np.uint8)
        ring.synchronize(number, deadline)
        return slot

    def _message(self, nbytes: int, slot: int, rank: int) -> Array:
        return self._region.message_slots(nbytes, _UINT8)[slot][rank][:nbytes]

    def _reduce_on_rank_0(self, buffer: Array, reduction: Reduction, slot: int, deadline: float) -> None:
        """Reduce the arrays in `slot` on rank 0, which publishes the result in its next slot."""
        ring, number = self._ring, self._ring.next
        ring.next = number + 1
        result = self._region.message_slots(buffer.nbytes, buffer.dtype)[number % SLOTS][0][: buffer.size]
        if self._rank == 0:
            self._reduce(result, buffer, 0, reduction, slot)
        ring.publish(number)
        ring.wait(number, deadline)
        buffer[...] = result

    def _reduce(self, out: Array, published: Array, start: int, reduction: Reduction, slot: int) -> None:
        """Reduce the arrays in `slot`, from element `start` on, into `out`; all are like `published`."""
        end = start + out.size
        messages = self._region.message_slots(published.nbytes, out.dtype)[slot]
        parts = [array[start:end] for array in messages]
        # Ranks that run native code choose one of two zeros, or NaN, in another way than NumPy does.
        if self._is_native and has_arithmetic(reduction) and out.flags.aligned:
            assert NATIVE is not None
            NATIVE.reduce(out, parts, reduction.dtype.name, reduction.name, self._ranks)
        else:
            reduce_into(reduction, out, parts)


def _bytes(array: Array) -> Array:
    return array.view(np.uint8)
