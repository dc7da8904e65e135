"""Board: memory that all ranks of a group on one host read, and each writes its own part of.

    one rank's part, 512 bytes    0        64       128        192        256       320
                                  word 0   word 1   has left   process    label 0   label 1

    first part: the group's       a token by which it is known, whether it was aborted
    parts of all ranks
    slots of all ranks            two of `slot_bytes` for each, for small operands

Words, labels and slots are used in turns (see `agreement`).

Memory comes from the group's first rank, as a file without a name that the others open through
/proc. (`MPI.Win.Allocate_shared` would do, but warns on stderr in the wheel of Open MPI.)
What one rank writes the others see in the order written: on x86-64, where plain stores and loads
are ordered so, and only there a board is used.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import select
from collections.abc import Sequence

import numpy as np

from ferro.collectives.label import LABEL_BYTES
from ferro.types import Array
from ferro_mpi.mpi import MPI

_PART = 512
_WORDS = _PART // 8
_LEFT, _PROCESS = 16, 24  # in words
_LABELS = 256  # in bytes
_TOKEN_BYTES = 16
_ABORTED = 8  # in words
_MOST_SLOT_BYTES = 64 << 10
_MOST_BYTES = 8 << 20  # of all slots; pages that nobody touches take no memory
_HANDOVER = 2 + _TOKEN_BYTES // 8  # process, descriptor, token

_ends: dict[int, int] = {}  # process -> descriptor that tells its end, kept for all groups


class Board:
    """A group's board, as one rank sees it. All of it is zero at first.

    Attributes:
        words: all of it as 64-bit numbers.
        slot_bytes: size of a slot.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int) -> None:
        self._bytes = memoryview(memory)
        self.words = self._bytes.cast("q")
        self.slot_bytes = _slot_bytes(world_size)
        self._slots = np.frombuffer(memory, np.uint8)[(world_size + 1) * _PART :]
        self._rank = rank
        self._world_size = world_size
        self._poll = select.poll()
        self._rank_of: dict[int, int] = {}

    def word(self, rank: int, turn: int) -> int:
        """Return where in `words` a rank's word of this turn, 0 or 1, is."""
        return (rank + 1) * _WORDS + turn * 8

    def show_label(self, label: bytes, turn: int) -> None:
        """Write this rank's label of a turn."""
        start = (self._rank + 1) * _PART + _LABELS + turn * 64
        self._bytes[start : start + LABEL_BYTES] = label

    def label(self, rank: int, turn: int) -> bytes:
        """Return a rank's label of a turn."""
        start = (rank + 1) * _PART + _LABELS + turn * 64
        return bytes(self._bytes[start : start + LABEL_BYTES])

    def slot(self, rank: int, turn: int) -> Array:
        """Return a rank's slot of a turn, as bytes."""
        start = (2 * rank + turn) * self.slot_bytes
        return self._slots[start : start + self.slot_bytes]

    def abort(self) -> None:
        """Tell all ranks that the group is dead."""
        self.words[_ABORTED] = 1

    @property
    def aborted(self) -> bool:
        """Whether a rank has aborted the group."""
        return bool(self.words[_ABORTED])

    def leave(self) -> None:
        """Tell the others that this rank makes no more calls."""
        self.words[(self._rank + 1) * _WORDS + _LEFT] = 1

    def left(self, rank: int) -> bool:
        """Say whether a rank makes no more calls."""
        return bool(self.words[(rank + 1) * _WORDS + _LEFT])

    def ended(self) -> list[int]:
        """Return the ranks whose processes have ended."""
        return [self._rank_of[descriptor] for descriptor, _ in self._poll.poll(0)]

    def watch_processes(self) -> None:
        """Find the ranks' processes, once all have written theirs.

        Raises:
            OSError: one cannot be found.
        """
        for rank in range(self._world_size):
            if rank == self._rank:
                continue
            process = self.words[(rank + 1) * _WORDS + _PROCESS]
            if process not in _ends:
                _ends[process] = os.pidfd_open(process)
            self._rank_of[_ends[process]] = rank
            self._poll.register(_ends[process], select.POLLIN)

    def write_process(self) -> None:
        """Tell the others this rank's process."""
        self.words[(self._rank + 1) * _WORDS + _PROCESS] = os.getpid()


def open_board(comm: MPI.Intracomm) -> Board | None:
    """Make the board of a communicator's ranks, all of which call it; None where one has none.

    What can fail fails for all: they decide together.
    """
    rank, world_size = comm.Get_rank(), comm.Get_size()
    nbytes = (world_size + 1) * _PART + 2 * world_size * _slot_bytes(world_size)
    memory = _make(nbytes) if rank == 0 else None
    told = np.zeros(_HANDOVER, np.int64)
    descriptor = -1
    if memory is not None:
        descriptor, token, mapped = memory
        told[:] = [os.getpid(), descriptor, *np.frombuffer(token, np.int64)]
    comm.Bcast(told, 0)
    found = mapped if memory is not None else _open(told.tolist(), nbytes)
    board = Board(found, rank, world_size) if found is not None else None
    if board is not None:
        board.write_process()
    shared = _all(comm, board is not None)
    if descriptor >= 0:
        os.close(descriptor)
    if board is None or not shared:
        return None
    try:
        board.watch_processes()
    except OSError:
        board = None
    return board if _all(comm, board is not None) else None


def _slot_bytes(world_size: int) -> int:
    """Return the size of a slot, a multiple of 4 KiB; nothing in very large groups."""
    return min(_MOST_SLOT_BYTES, _MOST_BYTES // (2 * world_size) & ~4095)


def _all(comm: MPI.Intracomm, here: bool) -> bool:
    every = np.array([here], np.int8)
    comm.Allreduce(MPI.IN_PLACE, every, MPI.MIN)
    return bool(every[0])


def _make(nbytes: int) -> tuple[int, bytes, mmap.mmap] | None:
    """Return descriptor, token and mapping of new memory; None where there can be none."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.memfd_create("ferro-mpi", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, nbytes)
        memory = mmap.mmap(descriptor, nbytes)
    except OSError:
        return None
    token = secrets.token_bytes(_TOKEN_BYTES)
    memory[:_TOKEN_BYTES] = token
    return descriptor, token, memory


def _open(told: Sequence[int], nbytes: int) -> mmap.mmap | None:
    """Map the first rank's memory, if this is its host and so the memory has the token."""
    process, descriptor, *words = told
    if not process or not hasattr(os, "pidfd_open"):
        return None
    try:
        theirs = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(theirs, nbytes)
        finally:
            os.close(theirs)
    except (OSError, ValueError):  # the latter when it is shorter than that
        return None
    token = np.array(words, np.int64).tobytes()
    return memory if memory[:_TOKEN_BYTES] == token else None
