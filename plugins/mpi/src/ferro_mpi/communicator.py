"""MpiCommunicator: one rank's communicators in a group, with calls that end at a deadline."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import starmap
from typing import TypeAlias, cast

import numpy as np

from ferro import CollectiveMismatch, PeerLost, RendezvousError, UnsupportedError
from ferro.collectives.label import Call, is_collective
from ferro.group.serial_executor import on_executor_thread
from ferro.types import Array
from ferro_mpi.agreement import SharedMemoryAgreement
from ferro_mpi.library import MpiLibrary
from ferro_mpi.mpi import MPI, to_ferro_error
from ferro_mpi.persistent_exchange import MpiPersistentExchange
from ferro_mpi.posted import PostedMpiTransfers
from ferro_mpi.reductions import mpi_view
from ferro_mpi.requests import PendingMessages, PersistentRequests, begin, release, wait_for
from ferro_mpi.shared_memory import open_group_memory
from ferro_mpi.waiting import WaitMonitor

_MESSAGE_BYTES = 1 << 30  # MPI counts in 31 bits; longer messages are cut
# Tags on the control communicator; 0 tells of an abort.
_SCHEDULES = 1
_SCHEDULE_TAGS = 1 << 20
_NEW_GROUPS = 1 << 21
_NEW_GROUP_TAGS = 1 << 24
_PERSISTENT = 1 << 25
_PERSISTENT_TAGS = 1 << 25
_NOTHING = np.empty(0, np.uint8)

LostRanks: TypeAlias = Callable[[], frozenset[int]]


class MpiCommunicator:
    """One rank's two communicators in a group.

    No other group uses them, so no messages mix. `comm` carries native collectives and the user's transfers; the
    control communicator carries the messages of schedules, agreements and aborts.

    Args:
        library: the MPI of this process.
        comm: a communicator of exactly the group's ranks, in order; this object owns and frees it.
        timeout_s: limit in seconds for making this object, or a subgroup of it.
        lost: returns the ranks of MPI's world that died, as the job's store has noticed.

    Attributes:
        comm: the communicator given.
        rank: this rank.
        world_size: number of ranks.
        memory: shared memory of all ranks, where they are on one host.
        monitor: ends the waits.
        timeout_s: as given.
        blocked_until: see `BlockingCaller`.
    """

    def __init__(self, library: MpiLibrary, comm: MPI.Intracomm, timeout_s: float, lost: LostRanks) -> None:
        self.blocked_until = math.inf
        self._library = library
        self.timeout_s = timeout_s
        self._lost = lost
        self._closed = False
        self._interrupted = False
        self._shrinking: Future[MPI.Intracomm] | None = None
        self.comm = comm
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self._ranks = range(self.world_size)
        self._ready = False
        library.watchdog.watch(self)
        with self._blocking(time.monotonic() + timeout_s):
            self._control_comm = comm.Dup()
            self.memory = open_group_memory(self._control_comm)
            world_ranks = comm.Get_group().Translate_ranks(None, MPI.COMM_WORLD.Get_group())
        self.monitor = WaitMonitor(
            self._control_comm,
            self.memory,
            lambda: [rank for rank, world_rank in enumerate(world_ranks) if world_rank in lost()],
            oversubscribed=library.oversubscribed,
        )
        self._ready = True
        library.opened()
        self._release = weakref.finalize(self, library.drop, (self._control_comm, comm), self.monitor)
        self._release.atexit = False

    @property
    def may_block(self) -> bool:
        """True if this thread may use MPI's blocking collectives, which are quicker in some MPIs."""
        return self._library.blocks and not on_executor_thread()

    # -- calls -----------------------------------------------------------------------------------

    def agree_and_run(
        self,
        agreement: SharedMemoryAgreement,
        call: Call,
        blocking: Callable[..., object],
        nonblocking: Callable[..., MPI.Request],
        arguments: tuple[object, ...],
        deadline: float,
    ) -> None:
        """Agree on a call with all ranks, and run its collective, by MPI's blocking or nonblocking method.

        The blocking method is quicker in some MPIs, and not to be left. A signal handler may raise an exception between
        the agreement and the collective, when the other ranks may be in the collective: then this rank takes part, too,
        before the exception leaves. Between a signal and its handler no step of a `for` statement is lost, so `joined`
        is right.
        """
        begun, joined = agreement.number, False
        try:
            if not agreement.agree_on_blocking(call, self.may_block, deadline):
                joined = True
                self.run(nonblocking, arguments, deadline)
                return
            self.blocked_until = deadline
            for _ in starmap(blocking, (arguments,)):
                joined = True
        except MPI.Exception as error:
            raise self.translated(error) from error
        except (PeerLost, CollectiveMismatch):
            raise
        except BaseException:
            if not joined and agreement.number != begun and not agreement.take_back() and agreement.all_may_block():
                blocking(*arguments)
            raise
        finally:
            self.blocked_until = math.inf

    def run(self, nonblocking: Callable[..., MPI.Request], arguments: tuple[object, ...], deadline: float) -> None:
        """Run a collective on which all ranks have agreed; the wait for it can end with an error."""
        try:
            kept = begin(nonblocking, arguments)
            wait_for(cast(MPI.Request, kept[-1]), arguments, self.monitor, deadline, self._ranks)
            release(kept)
        except MPI.Exception as error:
            raise self.translated(error) from error

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
        return PostedMpiTransfers(self.monitor, self.comm_for, _pieces, self.translated)

    def persistent_exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], number: int
    ) -> MpiPersistentExchange | None:
        """See `Backend.persistent_exchange`; None where MPI's tags do not reach far enough."""
        if self._library.tag_limit < _PERSISTENT + _PERSISTENT_TAGS:
            return None
        comm, tag = self._control_comm, _PERSISTENT + number % _PERSISTENT_TAGS
        kept = PersistentRequests((sends, recvs))
        try:
            for method, messages in ((comm.Recv_init, recvs), (comm.Send_init, sends)):
                for peer, buffer in messages:
                    kept.requests += [method(piece, peer, tag) for piece in _pieces(buffer)]
        except MPI.Exception as error:
            raise self.translated(error) from error
        peers = [peer for peer, _ in (*recvs, *sends)]
        return MpiPersistentExchange(kept, peers, self.monitor, self.translated)

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
        except BaseException as error:
            messages.abandon()
            if isinstance(error, MPI.Exception):
                raise self.translated(error) from error
            raise

    def translated(self, error: MPI.Exception) -> Exception:
        """Make ferro's error of MPI's."""
        if not self._ready:
            return to_ferro_error(error, self.comm)
        translated = self.monitor.error_of(error, self.comm)
        return TimeoutError() if self._interrupted and not isinstance(translated, PeerLost) else translated

    # -- groups within the group -----------------------------------------------------------------

    def subgroup(self, ranks: Sequence[int], context: int) -> MpiCommunicator:
        """Make the communicators of some of these ranks; only they call this.

        Raises:
            TimeoutError, PeerLost: one of them does not call it.
        """
        deadline = time.monotonic() + self.timeout_s
        self._library.free_dropped()
        self._await_members(ranks, context, deadline)
        with self._blocking(deadline):
            group = self.comm.Get_group().Incl(list(ranks))
            comm = self.comm.Create_group(group, context % self._library.tag_limit)
            group.Free()
        return MpiCommunicator(self._library, comm, self.timeout_s, self._lost)

    def split(self, ranks: Sequence[int] | None) -> MpiCommunicator | None:
        """Make the communicators of this rank's part of the group; None if it is in no part. All ranks call it."""
        color = MPI.UNDEFINED if ranks is None else min(ranks)
        key = 0 if ranks is None else ranks.index(self.rank)
        self._library.free_dropped()
        with self._blocking(time.monotonic() + self.timeout_s):
            comm = cast(MPI.Intracomm, self.comm.Split(color, key))
        return None if ranks is None else MpiCommunicator(self._library, comm, self.timeout_s, self._lost)

    def shrink(self, ranks: Sequence[int], context: int) -> MpiCommunicator:
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
        with self._blocking(time.monotonic() + self.timeout_s):
            survivors = self._survivors()
            group = self.comm.Get_group().Incl(list(ranks))
            comm = survivors.Create_group(group, context % self._library.tag_limit)
            group.Free()
        return MpiCommunicator(self._library, comm, self.timeout_s, self._lost)

    def prepare_shrink(self) -> None:
        """Begin MPI_Comm_shrink in a thread, after a failure.

        It waits for every rank that lives, and `shrink` must go on without a rank that does not come. So each rank
        takes part as soon as it notices the failure, whether or not its program calls `shrink`.
        """
        with self._library.lock:
            if self._shrinking is None:
                self._shrinking = Future()
                self._library.shrinking.append(self._shrinking)
                try:
                    threading.Thread(target=self._run_shrink, args=(self._shrinking,), daemon=True).start()
                except RuntimeError as error:  # no thread can be started, or the interpreter ends
                    self._shrinking.set_exception(error)

    def _run_shrink(self, shrinking: Future[MPI.Intracomm]) -> None:
        try:
            shrinking.set_result(cast(MPI.Intracomm, self.comm.Shrink()))
        except MPI.Exception as error:
            shrinking.set_exception(error)

    def _survivors(self) -> MPI.Intracomm:
        """Wait for a communicator of all ranks that live."""
        self.prepare_shrink()
        assert self._shrinking is not None, "prepare_shrink made it"
        try:
            survivors = self._shrinking.result(self.timeout_s)
        except TimeoutError as error:
            message = f"a rank that lives did not answer within {self.timeout_s:g} s: read the other ranks' logs"
            raise RendezvousError(f"shrink: {message}", op="shrink", rank=self.rank) from error
        survivors.Set_errhandler(MPI.ERRORS_RETURN)
        return survivors

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
            raise self.translated(error) from error
        finally:
            self.blocked_until = math.inf

    # -- abort and close -------------------------------------------------------------------------

    def has_failed(self) -> bool:
        """See `BlockingCaller.has_failed`."""
        return self._ready and not self._closed and self.monitor.has_failed()

    def interrupt(self) -> None:
        """See `BlockingCaller.interrupt`."""
        if self.blocked_until < math.inf:
            self._interrupted = True
            self._revoke()
        self.prepare_shrink()

    def describe(self) -> str:
        """See `BlockingCaller.describe`."""
        return f"a call of rank {self.rank} in a group of {self.world_size}"

    def abort(self) -> None:
        """Wake every blocked call of this group, here and on the other ranks."""
        if self._closed or self._library.forked:
            return
        self._library.broken = True
        self.monitor.abort()
        if self._library.recovers:
            self._revoke()
            self.prepare_shrink()

    def close(self) -> None:
        """Leave the group, and free its communicators unless it was aborted. Idempotent."""
        if self._closed or self._library.forked:
            return
        self._closed = True
        if self.memory is not None:
            self.memory.leave()
        if self._release.detach():
            self._library.free((self._control_comm, self.comm), self.monitor)

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
