"""MpiCommunicator: one rank's communicators in a group, with calls that end at a deadline."""

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
from ferro_mpi.library import MpiLibrary
from ferro_mpi.mpi import MPI, to_ferro_error
from ferro_mpi.posted import PostedMpiTransfers
from ferro_mpi.reductions import mpi_view
from ferro_mpi.requests import PendingMessages, wait_for
from ferro_mpi.shared_memory import open_group_memory
from ferro_mpi.waiting import WaitMonitor

_MESSAGE_BYTES = 1 << 30  # MPI counts in 31 bits; longer messages are cut
# Tags on the control communicator; 0 tells of an abort.
_SCHEDULES = 1
_SCHEDULE_TAGS = 1 << 20
_NEW_GROUPS = 1 << 21
_NEW_GROUP_TAGS = 1 << 24
_NOTHING = np.empty(0, np.uint8)


class MpiCommunicator:
    """One rank's two communicators in a group.

    No other group uses them, so no messages mix. `comm` carries native collectives and the user's transfers; the
    control communicator carries the messages of schedules, agreements and aborts.

    Args:
        library: the MPI of this process.
        comm: a communicator of exactly the group's ranks, in order; this object owns and frees it.
        timeout_s: limit in seconds for making this object, or a subgroup of it.

    Attributes:
        comm: the communicator given.
        rank: this rank.
        world_size: number of ranks.
        memory: shared memory of all ranks, where they are on one host.
        monitor: ends the waits.
        blocked_until: see `BlockingCaller`.
    """

    def __init__(self, library: MpiLibrary, comm: MPI.Intracomm, timeout_s: float) -> None:
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
            self._control_comm = comm.Dup()
            self.memory = open_group_memory(self._control_comm)
        self.monitor = WaitMonitor(self._control_comm, self.memory, oversubscribed=library.oversubscribed)

    # -- calls -----------------------------------------------------------------------------------

    def run(
        self,
        blocking: Callable[..., object],
        nonblocking: Callable[..., MPI.Request],
        arguments: tuple[object, ...],
        deadline: float,
    ) -> None:
        """Run a collective on which all ranks have agreed, by MPI's blocking or nonblocking method.

        The blocking method is quicker. An asynchronous operation uses the nonblocking one, which leaves the core to the
        caller's computation.
        """
        self.blocked_until = deadline
        try:
            if on_executor_thread():
                wait_for(nonblocking(*arguments), arguments, self.monitor, deadline, self._ranks)
            else:
                blocking(*arguments)
        except MPI.Exception as error:
            raise self._translated(error) from error
        finally:
            self.blocked_until = math.inf

    def wait_for(self, request: MPI.Request, buffers: object, deadline: float) -> None:
        """Wait for a nonblocking collective, which uses `buffers`."""
        try:
            wait_for(request, buffers, self.monitor, deadline, self._ranks)
        except MPI.Exception as error:
            raise self._translated(error) from error

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], tag: int, deadline: float
    ) -> None:
        """Run all these (peer, buffer) transfers at the same time; see `Backend.exchange`.

        Raises:
            UnsupportedError: MPI has no such tag.
        """
        if is_collective(tag):
            comm, tag = self._control_comm, _SCHEDULES + tag % _SCHEDULE_TAGS
        else:
            comm = self.comm_for(tag)
        self._exchange(comm, sends, recvs, tag, deadline)

    def posted_transfers(self) -> PostedMpiTransfers:
        """See `Backend.posted_transfers`."""
        return PostedMpiTransfers(self.monitor, self.comm_for, _pieces, self._translated)

    def comm_for(self, tag: int) -> MPI.Intracomm:
        """Return the communicator of the user's transfers with a tag, or refuse the tag."""
        if tag > self._library.tag_limit:
            raise UnsupportedError(f"tag {tag} is too large for this MPI, whose tags go to {self._library.tag_limit}")
        return self.comm

    def _exchange(
        self,
        comm: MPI.Intracomm,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        tag: int,
        deadline: float,
    ) -> None:
        messages = PendingMessages(self.monitor)
        try:
            for peer, buffer in recvs:
                for piece in _pieces(buffer):
                    messages.receive(comm, piece, peer, tag)
            for peer, buffer in sends:
                for piece in _pieces(buffer):
                    messages.send(comm, piece, peer, tag)
            messages.wait(deadline)
        except MPI.Exception as error:
            raise self._translated(error) from error
        except BaseException:  # an interrupt, perhaps before the wait, which cleans up after itself
            messages.abandon()
            raise

    def _translated(self, error: MPI.Exception) -> Exception:
        if self._interrupted:
            return TimeoutError()
        return to_ferro_error(error, self.comm)

    # -- groups within the group -----------------------------------------------------------------

    def subgroup(self, ranks: Sequence[int], context: int) -> MpiCommunicator:
        """Make the communicators of some of these ranks; only they call this.

        Raises:
            TimeoutError, PeerLost: one of them does not call it.
        """
        deadline = time.monotonic() + self._timeout_s
        self._await_members(ranks, context, deadline)
        with self._blocking(deadline):
            group = self.comm.Get_group().Incl(list(ranks))
            comm = self.comm.Create_group(group, context % self._library.tag_limit)
            group.Free()
        return MpiCommunicator(self._library, comm, self._timeout_s)

    def split(self, ranks: Sequence[int] | None) -> MpiCommunicator | None:
        """Make the communicators of this rank's part of the group; None if it is in no part. All ranks call it."""
        color = MPI.UNDEFINED if ranks is None else min(ranks)
        key = 0 if ranks is None else ranks.index(self.rank)
        with self._blocking(time.monotonic() + self._timeout_s):
            comm = cast(MPI.Intracomm, self.comm.Split(color, key))
        return None if ranks is None else MpiCommunicator(self._library, comm, self._timeout_s)

    def shrink(self, ranks: Sequence[int]) -> MpiCommunicator:
        """Make the communicators of the ranks that are left after a death; all of them call it.

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
            survivors = self.comm.Shrink()
            survivors.Set_errhandler(MPI.ERRORS_RETURN)
            comm = cast(MPI.Intracomm, survivors.Split(0, ranks.index(self.rank)))
            survivors.Free()
        return MpiCommunicator(self._library, comm, self._timeout_s)

    def _await_members(self, ranks: Sequence[int], context: int, deadline: float) -> None:
        """Wait until all ranks of a new group have called, because MPI would wait without a deadline."""
        tag = _NEW_GROUPS + context % _NEW_GROUP_TAGS
        me, n, distance = ranks.index(self.rank), len(ranks), 1
        while distance < n:
            to, source = ranks[(me + distance) % n], ranks[(me - distance) % n]
            sends, recvs = [(to, _NOTHING)], [(source, _NOTHING)]
            self._exchange(self._control_comm, sends, recvs, tag, deadline)
            distance *= 2

    @contextmanager
    def _blocking(self, deadline: float) -> Iterator[None]:
        """Put the calls in the block under the watchdog's deadline."""
        self.blocked_until = deadline
        try:
            yield
        except MPI.Exception as error:
            raise self._translated(error) from error
        finally:
            self.blocked_until = math.inf

    # -- abort and close -------------------------------------------------------------------------

    def interrupt(self) -> None:
        """See `BlockingCaller.interrupt`."""
        self._interrupted = True
        self._revoke()

    def describe(self) -> str:
        """See `BlockingCaller.describe`."""
        return f"a call of rank {self.rank} in a group of {self.world_size}"

    def abort(self) -> None:
        """Wake every blocked call of this group, here and on the other ranks."""
        if self._closed:
            return
        self._library.broken = True
        self.monitor.abort()
        if self._library.recovers:
            self._revoke()

    def close(self) -> None:
        """Leave the group, and free its communicators unless it was aborted. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.memory is not None:
            self.memory.leave()
        if not self.monitor.aborted and not MPI.Is_finalized():
            with suppress(MPI.Exception):
                self._control_comm.Free()
                self.comm.Free()

    def _revoke(self) -> None:
        for comm in (self.comm, self._control_comm):
            with suppress(MPI.Exception):
                comm.Revoke()


def _pieces(buffer: Array) -> Iterator[Array]:
    """Cut a message into pieces that MPI can count; an empty message gives one empty piece."""
    whole = mpi_view(buffer)
    if buffer.nbytes <= _MESSAGE_BYTES:
        yield whole
        return
    length = _MESSAGE_BYTES // buffer.itemsize
    for start in range(0, buffer.size, length):
        yield whole[start : start + length]
