"""Region: the memory in which a group's ranks on one host work together.

    | counters    n x 256 bytes          signals: how far each rank has come
    | headers     n x SLOTS x 128 bytes  what each rank calls, and where its array is
    | slots       n x SLOTS x slot_bytes what each rank shows the others

A rank writes its own counter, headers and slots only, and reads the others'. Its slots are used
in turn, all operations of the group after each other (see `ferro_gloo.shm.stream`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.segment import NAME_BYTES, Segment, remove
from ferro_gloo.shm.signals import AVAILABLE, Signals, board_bytes, pure_python_is_safe
from ferro_gloo.shm.talk import swap, warn
from ferro_gloo.tcp.backend import TcpBackend

SLOTS = 4
HEADER_BYTES = 128
# Measured with caches of 1 MiB a core: 128 KiB costs up to 1.7 times as much with 4 ranks, 1 MiB
# gains nothing.
_SLOT_BYTES = 512 << 10
_MOST_BYTES = 64 << 20
_LEAST_PIECE_BYTES = 64  # what is for one rank in a slot: a cache line, whatever it costs
_PAGE = 4096

# What the lowest rank offers: name (zeros: nothing), size of the whole, size of a slot.
_OFFER = struct.Struct(f"<{NAME_BYTES}sQQ")
# What each answers: it has mapped the region, it has the native helper, it may do without.
_ANSWER = struct.Struct("<???")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a region of `ranks` ranks."""

    ranks: int
    slot_bytes: int

    @property
    def headers_at(self) -> int:
        """Byte offset of the headers."""
        return -(-board_bytes(self.ranks) // _PAGE) * _PAGE

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
        """Size of the whole."""
        return self.slots_at + self.ranks * SLOTS * self.slot_bytes


class Region:
    """A mapped region, as one rank sees it.

    Attributes:
        ranks: how many share it.
        slot_bytes: size of a slot.
        signals: how far each rank has come.
        headers: for every rank its headers, `HEADER_BYTES` bytes each.
    """

    def __init__(
        self, segment: Segment, layout: Layout, rank: int, *, native: bool, spin: bool
    ) -> None:
        memory = memoryview(segment.memory)
        self.ranks = layout.ranks
        self.slot_bytes = layout.slot_bytes
        board = memory[: board_bytes(layout.ranks)]
        self.signals = Signals(board, layout.ranks, rank, native=native, spin=spin)
        self.headers = [
            [memory[layout.header_at(rank, slot) :][:HEADER_BYTES] for slot in range(SLOTS)]
            for rank in range(layout.ranks)
        ]
        slots = np.frombuffer(memory[layout.slots_at : layout.nbytes], np.uint8)
        self._grid: Array = slots.reshape(layout.ranks, SLOTS, layout.slot_bytes)
        self._typed: dict[np.dtype, list[list[Array]]] = {}

    def slots(self, dtype: np.dtype) -> list[list[Array]]:
        """Return, slot by slot, what each rank shows there, as arrays of this dtype."""
        typed = self._typed.get(dtype)
        if typed is None:
            grid = self._grid.view(dtype)
            typed = [list(grid[:, slot]) for slot in range(SLOTS)]
            self._typed[dtype] = typed
        return typed

    def tables(self) -> list[Array]:
        """Return, slot by slot, what all ranks show there: uint8, shape (ranks, slot_bytes)."""
        return [self._grid[:, slot] for slot in range(SLOTS)]


def open_region(part: TcpBackend, *, native: bool, spin: bool, deadline: float) -> Region | None:
    """Share a region with all ranks of `part`, who all call it; None on all where one cannot.

    The lowest rank makes and offers it, all map it and say so, its name goes.

    Args:
        part: the ranks.
        native: use the native helper where it is built.
        spin: see `Signals`.
        deadline: absolute `time.monotonic()` second.
    """
    layout, segment, reason = _layout(part.world_size), None, ""
    name = bytes(NAME_BYTES)
    try:
        if part.rank == 0:
            segment, name, reason = _made(layout)
        offer = _OFFER.pack(name, layout.nbytes, layout.slot_bytes)
        name, nbytes, slot_bytes = _OFFER.unpack(swap(part, offer, deadline)[0])
        if part.rank != 0 and any(name):
            layout = Layout(part.world_size, slot_bytes)
            segment, reason = _opened(name, nbytes, layout)
        mine = _ANSWER.pack(segment is not None, native and AVAILABLE, pure_python_is_safe())
        answers = [_ANSWER.unpack(raw) for raw in swap(part, mine, deadline)]
    finally:
        if any(name):
            remove(name)  # all do, for the owner may have died meanwhile
    all_mapped, native, safe = (all(column) for column in zip(*answers, strict=True))
    if reason:
        warn(
            f"gloo, rank {part.names[part.rank]}: {reason}. Give /dev/shm at least "
            f"{-(-layout.nbytes >> 20)} MiB for each group (in a container: --shm-size)"
        )
    if all_mapped and not (native or safe) and part.rank == 0:
        warn(
            "gloo: shared memory on this processor needs ferro-gloo's native helper: install a C "
            "compiler, then ferro-gloo again"
        )
    if segment is None or not all_mapped or not (native or safe):
        return None
    return Region(segment, layout, part.rank, native=native, spin=spin)


def _layout(ranks: int) -> Layout:
    bounded = _MOST_BYTES // (ranks * SLOTS) // _PAGE * _PAGE
    least = -(-ranks * _LEAST_PIECE_BYTES // _PAGE) * _PAGE
    return Layout(ranks, max(least, min(_SLOT_BYTES, bounded)))


def _made(layout: Layout) -> tuple[Segment | None, bytes, str]:
    """Return a new region with the name that is offered; or none, with zeros and the reason."""
    try:
        segment = Segment.create(layout.nbytes)
        segment.reserve(0, layout.nbytes)
        return segment, segment.offer(), ""
    except OSError as error:
        return None, bytes(NAME_BYTES), str(error)


def _opened(name: bytes, nbytes: int, layout: Layout) -> tuple[Segment | None, str]:
    if nbytes != layout.nbytes:
        return None, "the offered region has an unexpected size"
    try:
        segment = Segment.open(name, nbytes)
    except OSError as error:
        return None, str(error)
    segment.prepare(0, nbytes)
    return segment, ""
