"""GroupMemory: memory shared by the ranks of a group on one host, for agreements and small operands.

    one rank's area, 512 bytes    0        64       128                   192        256       320
                                  line 0   line 1   has left, at exit     process    label 0   label 1

    a line, of each parity        0        8                              16
                                  word     may this rank block in MPI?    a slot for few bytes

    first area: the group's       a token by which it is known, whether it was aborted
    areas of all ranks            each rank writes to its own only
    slots of all ranks            two of `slot_bytes` for each, for small operands

Lines, labels and slots are double-buffered: a call uses those of its parity (see `agreement`).

The group's first rank makes the memory as a file without a name, which the others open through /proc.
(`MPI.Win.Allocate_shared` would do, but warns on stderr in the wheel of Open MPI.) All ranks must see what one rank
writes in the order in which it was written. Plain stores and loads keep that order on x86-64; on other processors the
ranks share no memory.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import select
import threading
from collections.abc import Sequence

import numpy as np

from ferro.collectives.label import LABEL_BYTES
from ferro.types import Array
from ferro_mpi.mpi import MPI

_AREA_BYTES = 512
_AREA_WORDS = _AREA_BYTES // 8
_LINE_BYTES, _SMALL_SLOT_BYTES = 64, 48
_LEFT, _AT_EXIT, _PROCESS = 16, 17, 24  # in words
_LABELS = 256  # in bytes
_TOKEN_BYTES = 16
_ABORTED = 8  # in words
_MOST_SLOT_BYTES = 64 << 10
_MOST_BYTES = 8 << 20  # all slots; pages that no rank touches take no memory
_HANDLE_WORDS = 2 + _TOKEN_BYTES // 8  # process, descriptor, token

_pidfds: dict[int, int] = {}  # process -> descriptor that polls its end, kept for all groups


class GroupMemory:
    """A group's shared memory, as one rank sees it. All of it is zero at first.

    Attributes:
        words: the whole memory as 64-bit numbers.
        slot_bytes: size of a slot.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int) -> None:
        self._bytes = memoryview(memory)
        self.words = self._bytes.cast("q")
        self.slot_bytes = _slot_bytes(world_size)
        whole = np.frombuffer(memory, np.uint8)
        areas, slots = np.split(whole, [(world_size + 1) * _AREA_BYTES])
        self._slots = slots[: 2 * world_size * self.slot_bytes].reshape(world_size, 2, self.slot_bytes)
        lines = areas.reshape(world_size + 1, -1, _LINE_BYTES)
        self._small_slots = lines[1:, :2, _LINE_BYTES - _SMALL_SLOT_BYTES :]
        self._rank = rank
        self._world_size = world_size
        self._poll = select.poll()
        self._poll_lock = threading.Lock()  # one thread at a time may use a poll object
        self._rank_of: dict[int, int] = {}

    def word_index(self, rank: int, parity: int) -> int:
        """Find the index in `words` of a rank's word of parity 0 or 1."""
        return (rank + 1) * _AREA_WORDS + parity * 8

    def write_label(self, label: bytes, parity: int) -> None:
        """Write this rank's label of a parity."""
        start = (self._rank + 1) * _AREA_BYTES + _LABELS + parity * 64
        self._bytes[start : start + LABEL_BYTES] = label

    def label(self, rank: int, parity: int) -> bytes:
        """Read a rank's label of a parity."""
        start = (rank + 1) * _AREA_BYTES + _LABELS + parity * 64
        return bytes(self._bytes[start : start + LABEL_BYTES])

    def slots(self, parity: int, nbytes: int) -> Array:
        """View all ranks' slots of a parity, as bytes: shape (ranks, `nbytes`).

        Those of few bytes are beside the words, in the same lines of the processor's cache.
        """
        if nbytes <= _SMALL_SLOT_BYTES:
            return self._small_slots[:, parity, :nbytes]
        return self._slots[:, parity, :nbytes]

    def abort(self) -> None:
        """Tell all ranks that the group is dead."""
        self.words[_ABORTED] = 1

    @property
    def aborted(self) -> bool:
        """True if a rank has aborted the group."""
        return bool(self.words[_ABORTED])

    def leave(self) -> None:
        """Tell the others that this rank has left the group: it makes no more calls."""
        self.words[(self._rank + 1) * _AREA_WORDS + _LEFT] = 1

    def has_left(self, rank: int) -> bool:
        """Return True if a rank has left the group."""
        return bool(self.words[(rank + 1) * _AREA_WORDS + _LEFT])

    def end(self) -> None:
        """Tell the others that this rank's process is about to end."""
        self.words[(self._rank + 1) * _AREA_WORDS + _AT_EXIT] = 1

    def awaited_ranks(self) -> list[int]:
        """List the other ranks whose processes neither have ended nor are about to."""
        ended = self.ended_ranks()
        others = (rank for rank in range(self._world_size) if rank != self._rank and rank not in ended)
        return [rank for rank in others if not self._is_at_exit(rank)]

    def all_at_exit(self) -> bool:
        """Say whether no other rank is awaited."""
        return not self.awaited_ranks()

    def died_ranks(self) -> list[int]:
        """List the ranks whose processes have ended by other means than an exit of the interpreter."""
        return [rank for rank in self.ended_ranks() if not self._is_at_exit(rank)]

    def _is_at_exit(self, rank: int) -> bool:
        return bool(self.words[(rank + 1) * _AREA_WORDS + _AT_EXIT])

    def write_process(self) -> None:
        """Tell the others the id of this rank's process."""
        self.words[(self._rank + 1) * _AREA_WORDS + _PROCESS] = os.getpid()

    def watch_processes(self) -> None:
        """Watch the other ranks' processes, once all have written theirs.

        Raises:
            OSError: one of them cannot be found.
        """
        for rank in range(self._world_size):
            if rank == self._rank:
                continue
            process = self.words[(rank + 1) * _AREA_WORDS + _PROCESS]
            if process not in _pidfds:
                _pidfds[process] = os.pidfd_open(process)
            self._rank_of[_pidfds[process]] = rank
            self._poll.register(_pidfds[process], select.POLLIN)

    def ended_ranks(self) -> list[int]:
        """List the ranks whose processes have ended."""
        with self._poll_lock:
            return sorted(self._rank_of[descriptor] for descriptor, _ in self._poll.poll(0))

    def lost_ranks(self) -> list[int]:
        """List the ranks whose processes have ended without leaving the group."""
        return [rank for rank in self.ended_ranks() if not self.has_left(rank)]


def open_group_memory(comm: MPI.Intracomm) -> GroupMemory | None:
    """Make the shared memory of a communicator's ranks, which all call this; None if one cannot map it.

    The ranks decide together, so that all have the memory or none has.
    """
    rank, world_size = comm.Get_rank(), comm.Get_size()
    nbytes = (world_size + 1) * _AREA_BYTES + 2 * world_size * _slot_bytes(world_size)
    created = _create(nbytes) if rank == 0 else None
    handle = np.zeros(_HANDLE_WORDS, np.int64)
    descriptor = -1
    if created is not None:
        descriptor, token, mapped = created
        handle[:] = [os.getpid(), descriptor, *np.frombuffer(token, np.int64)]
    comm.Bcast(handle, 0)
    found = mapped if created is not None else _map(handle.tolist(), nbytes)
    memory = GroupMemory(found, rank, world_size) if found is not None else None
    if memory is not None:
        memory.write_process()
    shared = _on_all_ranks(comm, memory is not None)
    if descriptor >= 0:
        os.close(descriptor)
    if memory is None or not shared:
        return None
    try:
        memory.watch_processes()
    except OSError:
        memory = None
    return memory if _on_all_ranks(comm, memory is not None) else None


def _slot_bytes(world_size: int) -> int:
    """Compute the size of a slot, a multiple of 4 KiB; 0 in very large groups."""
    return min(_MOST_SLOT_BYTES, _MOST_BYTES // (2 * world_size) & ~4095)


def _on_all_ranks(comm: MPI.Intracomm, here: bool) -> bool:
    all_true = np.array([here], np.int8)
    comm.Allreduce(MPI.IN_PLACE, all_true, MPI.MIN)
    return bool(all_true[0])


def _create(nbytes: int) -> tuple[int, bytes, mmap.mmap] | None:
    """Make new memory: its descriptor, token and mapping; None where that is impossible."""
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


def _map(handle: Sequence[int], nbytes: int) -> mmap.mmap | None:
    """Map the first rank's memory; None on another host, where no memory has that token."""
    process, descriptor, *words = handle
    if not process or not hasattr(os, "pidfd_open"):
        return None
    try:
        opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(opened, nbytes)
        finally:
            os.close(opened)
    except (OSError, ValueError):  # ValueError: the file is shorter than `nbytes`
        return None
    token = np.array(words, np.int64).tobytes()
    return memory if memory[:_TOKEN_BYTES] == token else None
