"""Region: the shared memory in which a group's ranks on one host run collectives.

    | counters    n x 256 bytes                  how far each rank has come (`counters`)
    | headers     n x SLOTS x 128 bytes          each rank's call, and the span of its array
    | slots       n x SLOTS x (64 + slot_bytes)  each rank's data, after a line

A rank writes only its own counter, headers and slots, and reads all. It uses its slots in turn,
across all operations of the group (`slot_ring`). The line is the cache line before a slot:

    byte  0..7    int64   one more than the number of the chunk in the slot, stored after the data
    byte  8..15   uint64  a digest of the operation's label, in the operation's first chunk
    byte 16..63           the data of a message of at most 48 bytes; the slot is not used then

So two ranks exchange a small message by one cache line each. Only the native helper uses the first two fields.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.counters import ProgressCounters, counters_bytes, native_spins
from ferro_gloo.shm.native import NATIVE, NativeRing
from ferro_gloo.shm.segment import ShmSegment

SLOTS = 4
HEADER_BYTES = 128
LINE_BYTES = 64
LINE_DATA_AT = 16
# Measured with caches of 1 MiB a core: 128 KiB costs up to 1.7 times as much with 4 ranks, 1 MiB
# gains nothing.
_SLOT_BYTES = 512 << 10
_MAX_BYTES = 64 << 20
_MIN_BLOCK_BYTES = 64  # a slot has at least a cache line for each rank, even beyond _MAX_BYTES
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """The byte offsets in a region of `ranks` ranks."""

    ranks: int
    slot_bytes: int

    @classmethod
    def of(cls, ranks: int) -> RegionLayout:
        """Choose the layout for this number of ranks."""
        bounded = _MAX_BYTES // (ranks * SLOTS) // _PAGE * _PAGE
        least = -(-ranks * _MIN_BLOCK_BYTES // _PAGE) * _PAGE
        return cls(ranks, max(least, min(_SLOT_BYTES, bounded)))

    @property
    def headers_at(self) -> int:
        """Byte offset of the headers."""
        return -(-counters_bytes(self.ranks) // _PAGE) * _PAGE

    @property
    def slots_at(self) -> int:
        """Byte offset of the slots."""
        headers = self.ranks * SLOTS * HEADER_BYTES
        return self.headers_at + -(-headers // _PAGE) * _PAGE

    def header_at(self, rank: int, slot: int) -> int:
        """Byte offset of one header."""
        return self.headers_at + (rank * SLOTS + slot) * HEADER_BYTES

    @property
    def nbytes(self) -> int:
        """Size of the region."""
        return self.slots_at + self.ranks * SLOTS * (LINE_BYTES + self.slot_bytes)


class ShmRegion:
    """A mapped region, as one rank sees it.

    Args:
        segment: the memory.
        layout: its layout.
        rank: this rank in the group.
        native: see `ProgressCounters`.
        spin: see `ProgressCounters`.

    Attributes:
        ranks: the number of ranks.
        slot_bytes: the size of a slot.
        byte_slots: the slots as arrays of uint8, by slot and rank.
        counters: how far each rank has come.
        headers: the headers of each rank, by rank and slot, of `HEADER_BYTES` bytes each.
        native_ring: the native helper's view of the slots; None where it is not used.
    """

    def __init__(self, segment: ShmSegment, layout: RegionLayout, rank: int, *, native: bool, spin: bool) -> None:
        self._segment = segment
        memory = segment.memory
        self.ranks = layout.ranks
        self.slot_bytes = layout.slot_bytes
        counters = memory[: counters_bytes(layout.ranks)]
        self.counters = ProgressCounters(counters, layout.ranks, rank, native=native, spin=spin)
        self.headers = [
            [memory[layout.header_at(rank, slot) :][:HEADER_BYTES] for slot in range(SLOTS)]
            for rank in range(layout.ranks)
        ]
        slots = np.frombuffer(memory[layout.slots_at : layout.nbytes], np.uint8)
        lines_and_slots = slots.reshape(layout.ranks, SLOTS, LINE_BYTES + layout.slot_bytes)
        self._lines: Array = lines_and_slots[:, :, LINE_DATA_AT:LINE_BYTES]
        self._slots: Array = lines_and_slots[:, :, LINE_BYTES:]
        self._typed: dict[np.dtype, list[list[Array]]] = {}
        self._typed_lines: dict[np.dtype, list[list[Array]]] = {}
        self.native_ring: NativeRing | None = None
        if native and NATIVE is not None:
            self.native_ring = NATIVE.Ring(
                memory=memory,
                ranks=layout.ranks,
                rank=rank,
                headers_at=layout.headers_at,
                slots_at=layout.slots_at,
                slot_bytes=layout.slot_bytes,
                spins=native_spins(spin),
            )
        self.byte_slots = self.slots(np.dtype(np.uint8))

    def close(self) -> None:
        """Give the memory back; views of it see memory that no other rank has."""
        self._segment.close()

    def slots(self, dtype: np.dtype) -> list[list[Array]]:
        """View the slots as arrays of this dtype, by slot and rank."""
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = _by_slot(self._slots.view(dtype))
        return typed

    def message_slots(self, nbytes: int, dtype: np.dtype) -> list[list[Array]]:
        """View where whole messages of `nbytes` are, as arrays of this dtype, by slot and rank.

        That is the line, for a message that fits, and the slot otherwise.
        """
        if nbytes > self._lines.shape[2]:
            return self.slots(dtype)
        typed = self._typed_lines.get(dtype)
        if typed is None:
            length = self._lines.shape[2] // dtype.itemsize * dtype.itemsize
            typed = self._typed_lines[dtype] = _by_slot(self._lines[:, :, :length].view(dtype))
        return typed

    def stacked_messages(self, nbytes: int, slot: int) -> Array:
        """View where all ranks' messages of `nbytes` in one slot are: uint8, of shape (ranks, at least nbytes)."""
        return (self._lines if nbytes <= self._lines.shape[2] else self._slots)[:, slot]


def _by_slot(arrays: Array) -> list[list[Array]]:
    """List the arrays along the first two axes, which are rank and slot, by slot and rank."""
    return [list(arrays[:, slot]) for slot in range(SLOTS)]
