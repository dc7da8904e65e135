"""Waiting: the pauses of a rank that waits, and the conditions that end its wait with an error.

A waiting rank spins for some microseconds, then yields its core between two tests, then sleeps between them. In the
thread of asynchronous operations (see `ferro.group.serial_executor`) it sleeps almost at once, because the caller's
thread may be computing and needs the core. Where there are more ranks than cores it does not spin, which would keep the
core from the awaited rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from ferro import CollectiveMismatch, FerroError, GroupClosed, PeerLost
from ferro.errors import with_awaited
from ferro.group.serial_executor import on_executor_thread
from ferro_mpi.mpi import MPI, to_ferro_error
from ferro_mpi.shared_memory import GroupMemory

_SPINS = 200
_SPINS_ON_EXECUTOR = 1
_YIELDS = 1000
_YIELDS_ON_EXECUTOR = 20
_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 500e-6
_POLL_PEERS_S = 0.02
_POLL_STORE_S = 0.5
_FIND_LOST_S = 0.5  # for the system or the store to notice the death that an error of MPI may be about
_LAST_MESSAGES_S = 0.5  # after a rank has left, time for its last messages to arrive
_ABORT_TAG = 0  # on a group's control communicator


class Backoff:
    """The pauses of one wait: its first calls yield the core, later ones sleep."""

    __slots__ = ("_count", "_sleep_s", "_yields")

    def __init__(self) -> None:
        self._count = 0
        self._sleep_s = _SLEEP_S
        self._yields = _YIELDS_ON_EXECUTOR if on_executor_thread() else _YIELDS

    def __call__(self) -> None:
        """Let other threads and processes run."""
        if self._count < self._yields:
            self._count += 1
            os.sched_yield()
            return
        time.sleep(self._sleep_s)
        self._sleep_s = min(2 * self._sleep_s, _LONGEST_SLEEP_S)


class WaitMonitor:
    """Ends the waits of one group with an error: at a deadline, after an abort or a rank's death.

    Args:
        control_comm: the group's communicator for messages of ferro's own.
        memory: the group's shared memory, if it has one.
        lost: returns the ranks of the group that died, as far as the job's store has noticed.
        oversubscribed: this host has more ranks than cores.

    Attributes:
        oversubscribed: as given.
        yield_core: the action between two tests of a spinning rank; nothing where ranks have
            cores of their own.
    """

    def __init__(
        self,
        control_comm: MPI.Intracomm,
        memory: GroupMemory | None,
        lost: Callable[[], Sequence[int]],
        *,
        oversubscribed: bool,
    ) -> None:
        self._control_comm = control_comm
        self._memory = memory
        self._lost = lost
        self._aborted = False
        self._abort_requests: list[MPI.Request] = []
        self._next_poll = self._next_store_poll = 0.0
        self.oversubscribed = oversubscribed
        self.yield_core: Callable[[], object] = os.sched_yield if oversubscribed else int

    @property
    def spins(self) -> int:
        """The number of tests before the first call of `check`."""
        return _SPINS_ON_EXECUTOR if on_executor_thread() else _SPINS

    @property
    def aborted(self) -> bool:
        """True if this rank has aborted the group, or knows that another rank has."""
        return self._aborted or (self._memory is not None and self._memory.aborted)

    def abort(self) -> None:
        """End the group's waits, here and on the other ranks. Never raises."""
        if self._aborted:
            return
        self._aborted = True
        if self._memory is not None:
            self._memory.abort()
            return
        for rank in range(self._control_comm.Get_size()):
            if rank != self._control_comm.Get_rank():
                try:
                    self._abort_requests.append(self._control_comm.Isend(b"", rank, _ABORT_TAG))
                except MPI.Exception:
                    continue  # that rank has died

    def check(self, deadline: float, awaited: Iterable[int]) -> None:
        """Raise an error if a wait for the ranks `awaited` must end.

        Raises:
            TimeoutError: the deadline has passed.
            GroupClosed: the group was aborted.
            PeerLost: the process of one of them has ended, or the group was aborted because a process ended.
        """
        now = time.monotonic()
        if self.aborted:
            raise with_awaited(self._abort_error(), awaited)
        if now > deadline:
            raise with_awaited(TimeoutError(), awaited)
        if now >= self._next_poll:
            self._next_poll = now + _POLL_PEERS_S
            self._poll_peers(awaited)

    def has_failed(self) -> bool:
        """Say whether the group was aborted, or a rank died."""
        if self.aborted or self.lost_rank() is not None:
            return True
        try:
            return self._memory is None and self.progress()
        except FerroError:
            return True

    def lost_rank(self, wait_s: float = 0.0) -> int | None:
        """Find a rank whose process ended without leaving the group; give others `wait_s` seconds to notice its end."""
        give_up = time.monotonic() + wait_s
        while True:
            lost = self._memory.lost_ranks() if self._memory is not None else self._lost()
            if lost:
                return lost[0]
            if time.monotonic() >= give_up:
                return None
            time.sleep(_POLL_PEERS_S)

    def error_of(self, error: MPI.Exception, comm: MPI.Intracomm) -> FerroError:
        """Translate MPI's exception, raised in a call on `comm`: a rank's death has many error codes."""
        translated = to_ferro_error(error, comm)
        if isinstance(translated, PeerLost | CollectiveMismatch):
            return translated
        lost = self.lost_rank(0.0 if self.aborted else _FIND_LOST_S)
        if lost is not None:
            return PeerLost(f"the process of rank {lost} has ended: {translated}", peer=lost)
        return self._abort_error() if self.aborted else translated

    def departed_rank(self, ranks: Iterable[int]) -> int | None:
        """Return one of these ranks that is known to have left the group, or None."""
        if self._memory is None:
            return None
        return next((rank for rank in ranks if self._memory.has_left(rank)), None)

    def progress(self) -> bool:
        """Let MPI make progress on pending operations; return True if another rank has aborted the group.

        Raises:
            PeerLost, GroupClosed: MPI knows of a rank's death, or has revoked the communicator.
        """
        try:
            return self._control_comm.Iprobe(MPI.ANY_SOURCE, _ABORT_TAG)
        except MPI.Exception as error:
            raise self.error_of(error, self._control_comm) from error

    def _abort_error(self) -> FerroError:
        lost = self._memory.lost_ranks() if self._memory is not None else ()
        if lost:
            return PeerLost(f"the process of rank {lost[0]} has ended", peer=lost[0])
        return GroupClosed("the group was aborted")

    def _poll_peers(self, awaited: Iterable[int]) -> None:
        if self.progress():
            self._aborted = True
            raise GroupClosed("the group was aborted by another rank")
        ended: Sequence[int] = ()
        if self._memory is not None:
            ended = self._memory.ended_ranks()
        elif time.monotonic() >= self._next_store_poll:
            self._next_store_poll = time.monotonic() + _POLL_STORE_S
            ended = self._lost()
        for rank in awaited:
            if rank in ended:
                if self.aborted:  # that rank aborted the group before it ended
                    raise self._abort_error()
                raise PeerLost(f"the process of rank {rank} has ended", peer=rank)


class DepartureCheck:
    """Ends a wait for messages of ranks that have left the group, once their last ones had time to arrive."""

    def __init__(self, monitor: WaitMonitor, peers: Collection[int]) -> None:
        """Watch `peers`, whose number may change."""
        self._monitor = monitor
        self._peers = peers
        self._noticed_s: dict[int, float] = {}

    def __call__(self) -> None:
        """Raise PeerLost for a rank that has left."""
        left = self._monitor.departed_rank(self._peers)
        if left is not None:
            now = time.monotonic()
            if now > self._noticed_s.setdefault(left, now) + _LAST_MESSAGES_S:
                raise PeerLost(f"rank {left} has left the group", peer=left)
