"""How a rank waits, and what it looks at besides what it waits for.

It looks at once, again for a few microseconds, then lets others run between looks, then sleeps for
moments. In a lane's thread (see `ferro.work`) it sleeps almost at once: the core belongs to the
caller's thread, which may be computing. Looking again and again keeps the core from the awaited
rank where ranks are more than cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from ferro import GroupClosed, PeerLost
from ferro.group.serial_executor import on_executor_thread
from ferro_mpi.board import Board
from ferro_mpi.failures import converted
from ferro_mpi.mpi import MPI

LOOKS = 200
LOOKS_IN_LANE = 1
_YIELDS = 1000
_YIELDS_IN_LANE = 20
_NAP_S = 20e-6
_LONGEST_NAP_S = 500e-6
_LOOK_AROUND_S = 0.02
ABORT_TAG = 0  # on a group's second communicator


class Pause:
    """What one wait does between two looks."""

    __slots__ = ("_count", "_nap_s", "_yields")

    def __init__(self) -> None:
        self._count = 0
        self._nap_s = _NAP_S
        self._yields = _YIELDS_IN_LANE if on_executor_thread() else _YIELDS

    def __call__(self) -> None:
        """Let others run."""
        if self._count < self._yields:
            self._count += 1
            os.sched_yield()
            return
        time.sleep(self._nap_s)
        self._nap_s = min(2 * self._nap_s, _LONGEST_NAP_S)


class Lookout:
    """What ends the waits of one group: a deadline, an abort, the death of a rank.

    Args:
        talk: the group's second communicator.
        board: its board, if it has one.
        crowded: the ranks on this host are more than its cores.
    """

    def __init__(self, talk: MPI.Intracomm, board: Board | None, *, crowded: bool) -> None:
        self._talk = talk
        self._board = board
        self._aborted = False
        self._told: list[MPI.Request] = []
        self._next = 0.0
        self.crowded = crowded
        # What is done between two looks: where ranks have cores of their own, nothing.
        self.let_run: Callable[[], object] = os.sched_yield if crowded else int

    @property
    def looks(self) -> int:
        """How often to look again before anything else is looked at."""
        return LOOKS_IN_LANE if on_executor_thread() else LOOKS

    @property
    def aborted(self) -> bool:
        """Whether the group was aborted, here or, as far as is known, elsewhere."""
        return self._aborted or (self._board is not None and self._board.aborted)

    def abort(self) -> None:
        """End the group's waits, here and on the other ranks. Never raises."""
        if self._aborted:
            return
        self._aborted = True
        if self._board is not None:
            self._board.abort()
            return
        for rank in range(self._talk.Get_size()):
            if rank != self._talk.Get_rank():
                try:
                    self._told.append(self._talk.Isend(b"", rank, ABORT_TAG))
                except MPI.Exception:
                    continue  # it has died

    def look(self, deadline: float, awaited: Iterable[int]) -> None:
        """Raise what ends a wait for something of the ranks `awaited`.

        Raises:
            TimeoutError: the deadline has passed.
            GroupClosed: the group was aborted.
            PeerLost: the process of one of them has ended.
        """
        now = time.monotonic()
        if self._board is not None:
            if self._aborted or self._board.aborted:
                raise GroupClosed("the group was aborted")
        elif self._aborted:
            raise GroupClosed("the group was aborted")
        if now > deadline:
            raise TimeoutError
        if now >= self._next:
            self._next = now + _LOOK_AROUND_S
            self._look_around(awaited)

    def left(self, ranks: Iterable[int]) -> int | None:
        """Return one of these ranks that has left the group, as far as is known."""
        if self._board is None:
            return None
        return next((rank for rank in ranks if self._board.left(rank)), None)

    def progress(self) -> bool:
        """Let MPI go on with what it has begun; say whether another rank's abort has come.

        Raises:
            PeerLost, GroupClosed: MPI knows of a rank's death, or has revoked the communicator.
        """
        try:
            return self._talk.Iprobe(MPI.ANY_SOURCE, ABORT_TAG)
        except MPI.Exception as error:
            raise converted(error, self._talk) from error

    def _look_around(self, awaited: Iterable[int]) -> None:
        if self.progress():
            self._aborted = True
            raise GroupClosed("the group was aborted by another rank")
        if self._board is not None:
            ended = self._board.ended()
            for rank in awaited:
                if rank in ended:
                    raise PeerLost(f"the process of rank {rank} has ended", peer=rank)
