"""Endpoint: one rank's communicators in a group, and calls on them that end by a deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import cast

import numpy as np

from ferro import UnsupportedError
from ferro.collectives.label import is_collective
from ferro.group.serial_executor import on_executor_thread
from ferro.types import Array
from ferro_mpi.arithmetic import movable
from ferro_mpi.board import open_board
from ferro_mpi.failures import converted
from ferro_mpi.library import Library
from ferro_mpi.mpi import MPI
from ferro_mpi.requests import Messages, finish
from ferro_mpi.waiting import Lookout

_MESSAGE_BYTES = 1 << 30  # MPI counts in 31 bits; longer messages are cut
# Tags on the second communicator; 0 tells of an abort.
_SCHEDULES = 1
_SCHEDULE_TAGS = 1 << 20
_MEETINGS = 1 << 21
_MEETING_TAGS = 1 << 24
_NOTHING = np.empty(0, np.uint8)


class Endpoint:
    """One rank's communicators in a group.

    Both are the group's alone, so nothing mixes with the user's messages or another group's: `comm`
    has native collectives and the user's transfers, `talk` the messages of schedules, of agreements
    and of aborts.

    Args:
        library: the MPI of this process.
        comm: of exactly the group's ranks, in order; ours from now on.
        timeout_s: seconds that making it, or another one from it, may take.

    Attributes:
        comm: see above.
        rank: this rank.
        world_size: number of ranks.
        board: memory of all ranks, where they share a host.
        lookout: ends the waits.
        blocked_until: see `Blocking`.
    """

    def __init__(self, library: Library, comm: MPI.Intracomm, timeout_s: float) -> None:
        self.blocked_until = math.inf
        self._library = library
        self._timeout_s = timeout_s
        self._closed = False
        self._interrupted = False
        self.comm = comm
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self._ranks = range(self.world_size)
        library.watchdog.watch(self)
        with self._blocking(time.monotonic() + timeout_s):
            self._talk = comm.Dup()
            self.board = open_board(self._talk)
        self.lookout = Lookout(self._talk, self.board, crowded=library.crowded)

    # -- calls -----------------------------------------------------------------------------------

    def run(
        self,
        blocking: Callable[..., object],
        nonblocking: Callable[..., MPI.Request],
        arguments: tuple[object, ...],
        deadline: float,
    ) -> None:
        """Carry out a collective that all ranks are in, by MPI's blocking or nonblocking method.

        The blocking one is quicker; the other leaves a lane's core to the caller's computation.
        """
        self.blocked_until = deadline
        try:
            if on_executor_thread():
                finish(nonblocking(*arguments), arguments, self.lookout, deadline, self._ranks)
            else:
                blocking(*arguments)
        except MPI.Exception as error:
            raise self._failed(error) from error
        finally:
            self.blocked_until = math.inf

    def finish(self, request: MPI.Request, buffers: object, deadline: float) -> None:
        """Wait for a nonblocking collective."""
        try:
            finish(request, buffers, self.lookout, deadline, self._ranks)
        except MPI.Exception as error:
            raise self._failed(error) from error

    def exchange(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        tag: int,
        deadline: float,
    ) -> None:
        """Do all these (peer, buffer) transfers at the same time; see `Backend.exchange`.

        Raises:
            UnsupportedError: MPI has no such tag.
        """
        if is_collective(tag):
            comm, tag = self._talk, _SCHEDULES + tag % _SCHEDULE_TAGS
        elif tag <= self._library.tag_limit:
            comm = self.comm
        else:
            raise UnsupportedError(
                f"tag {tag} is too large for this MPI, whose tags go to {self._library.tag_limit}"
            )
        self._exchange(comm, sends, recvs, tag, deadline)

    def _exchange(
        self,
        comm: MPI.Intracomm,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        tag: int,
        deadline: float,
    ) -> None:
        messages = Messages(self.lookout)
        try:
            for peer, buffer in recvs:
                for piece in _pieces(buffer):
                    messages.receive(comm, piece, peer, tag)
            for peer, buffer in sends:
                for piece in _pieces(buffer):
                    messages.send(comm, piece, peer, tag)
            messages.finish(deadline)
        except MPI.Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: MPI.Exception) -> Exception:
        if self._interrupted:
            return TimeoutError()
        return converted(error, self.comm)

    # -- groups within the group -----------------------------------------------------------------

    def part(self, ranks: Sequence[int], context: int) -> Endpoint:
        """Return the endpoint of a group of some of these ranks; only they call it.

        Raises:
            TimeoutError, PeerLost: one of them does not.
        """
        deadline = time.monotonic() + self._timeout_s
        self._meet(ranks, context, deadline)
        with self._blocking(deadline):
            group = self.comm.Get_group().Incl(list(ranks))
            comm = self.comm.Create_group(group, context % self._library.tag_limit)
            group.Free()
        return Endpoint(self._library, comm, self._timeout_s)

    def split(self, ranks: Sequence[int] | None) -> Endpoint | None:
        """Return the endpoint of this rank's part, None where it is in none; all ranks call it."""
        color = MPI.UNDEFINED if ranks is None else min(ranks)
        key = 0 if ranks is None else ranks.index(self.rank)
        with self._blocking(time.monotonic() + self._timeout_s):
            comm = cast(MPI.Intracomm, self.comm.Split(color, key))
        return None if ranks is None else Endpoint(self._library, comm, self._timeout_s)

    def shrink(self, ranks: Sequence[int]) -> Endpoint:
        """Return the endpoint of the ranks that are left after a death; all of them call it.

        Raises:
            UnsupportedError: this MPI cannot go on after a death.
        """
        if not self._library.recovers:
            raise UnsupportedError(
                f"{self._library.name} cannot go on after a rank is lost, as it was started: use "
                "Open MPI and `mpiexec --with-ft ulfm`, or restart the job",
                op="shrink",
            )
        with self._blocking(time.monotonic() + self._timeout_s):
            left = self.comm.Shrink()
            left.Set_errhandler(MPI.ERRORS_RETURN)
            comm = cast(MPI.Intracomm, left.Split(0, ranks.index(self.rank)))
            left.Free()
        return Endpoint(self._library, comm, self._timeout_s)

    def _meet(self, ranks: Sequence[int], context: int, deadline: float) -> None:
        """Wait for all members of a new group, before MPI would do so without end."""
        tag = _MEETINGS + context % _MEETING_TAGS
        me, n, distance = ranks.index(self.rank), len(ranks), 1
        while distance < n:
            to, source = ranks[(me + distance) % n], ranks[(me - distance) % n]
            self._exchange(self._talk, [(to, _NOTHING)], [(source, _NOTHING)], tag, deadline)
            distance *= 2

    @contextmanager
    def _blocking(self, deadline: float) -> Iterator[None]:
        """Let the watchdog look after calls that block."""
        self.blocked_until = deadline
        try:
            yield
        except MPI.Exception as error:
            raise self._failed(error) from error
        finally:
            self.blocked_until = math.inf

    # -- its end ---------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """See `Blocking`."""
        self._interrupted = True
        self._revoke()

    def describe(self) -> str:
        """See `Blocking`."""
        return f"a call of rank {self.rank} in a group of {self.world_size}"

    def abort(self) -> None:
        """Wake every blocked call of this group, here and on the other ranks."""
        if self._closed:
            return
        self._library.broken = True
        self.lookout.abort()
        if self._library.recovers:
            self._revoke()

    def close(self) -> None:
        """Leave the group; what MPI has of a dead one stays with MPI. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.board is not None:
            self.board.leave()
        if not self.lookout.aborted and not MPI.Is_finalized():
            with suppress(MPI.Exception):
                self._talk.Free()
                self.comm.Free()

    def _revoke(self) -> None:
        for comm in (self.comm, self._talk):
            with suppress(MPI.Exception):
                comm.Revoke()


def _pieces(buffer: Array) -> Iterator[Array]:
    """Cut a message into pieces that MPI can count; at least one, be it empty."""
    whole = movable(buffer)
    if buffer.nbytes <= _MESSAGE_BYTES:
        yield whole
        return
    length = _MESSAGE_BYTES // buffer.itemsize
    for start in range(0, buffer.size, length):
        yield whole[start : start + length]
