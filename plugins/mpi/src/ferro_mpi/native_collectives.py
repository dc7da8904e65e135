"""NativeCollective: the fast path of large collectives of ranks on one host, which run as MPI's own.

It does what the ordinary path does, in fewer steps of Python: agree, then call MPI. A large array has just driven the
interpreter's data out of the processor's caches, so each step costs several times as much as otherwise: with 2 ranks
the ordinary path took 10 to 20 us more than this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import starmap
from typing import Any, cast

import numpy as np

from ferro import CollectiveMismatch, PeerLost
from ferro.collectives.fast_path import BUSY, NUMBER, BoundFastPath, EvenCollective, Turn
from ferro.types import Array
from ferro_mpi.agreement import SharedMemoryAgreement
from ferro_mpi.communicator import MpiCommunicator
from ferro_mpi.mpi import MPI
from ferro_mpi.reductions import mpi_view
from ferro_mpi.requests import begin, release, wait_for


class NativeCollective:
    """A collective of one kind and size on one rank; see `FastPath`.

    Args:
        collective: its kind: all_reduce, broadcast, all_gather, reduce_scatter or all_to_all.
        op: MPI's operation for its reduction, None where nothing is reduced.
        turn: the order of the group's collectives.
        agreement: the group's agreement.
        communicator: the group's communicators.
    """

    OPS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all")

    def __init__(
        self,
        collective: EvenCollective,
        op: MPI.Op | None,
        turn: Turn,
        agreement: SharedMemoryAgreement,
        communicator: MpiCommunicator,
    ) -> None:
        comm = communicator.comm
        methods: dict[str, tuple[Callable[..., object], Callable[..., MPI.Request]]] = {
            "all_reduce": (comm.Allreduce, comm.Iallreduce),
            "broadcast": (comm.Bcast, comm.Ibcast),
            "all_gather": (comm.Allgather, comm.Iallgather),
            "reduce_scatter": (comm.Reduce_scatter_block, comm.Ireduce_scatter_block),
            "all_to_all": (comm.Alltoall, comm.Ialltoall),
        }
        self._blocking, self._nonblocking = methods[collective.op]
        self._collective = collective
        self._op = op
        self._turn = turn
        self._agreement = agreement
        self._communicator = communicator
        self._label = collective.call.label()
        self._digest = agreement.digest(self._label)
        self._in_place = collective.op in ("all_reduce", "broadcast", "all_gather")
        self._spins = range(communicator.monitor.spins)
        # Of the call under way: the arguments of MPI's methods, and whether this rank has called one.
        self._arguments: tuple[Any, ...] = ()
        self._joined = False

    def __call__(self, source: Array | None, target: Array | None, /) -> bool:
        """See `FastPath.__call__`. The group has checked dtypes and shapes."""
        turn, state = self._turn, self._turn.state
        if target is None or not target.flags.carray or turn.lock.locked():
            return False
        if not self._in_place and (
            source is None or not source.flags.c_contiguous or np.may_share_memory(source, target)
        ):
            return False
        with turn.lock:
            if state[BUSY] or turn.pending:
                return False
            begun, self._joined = self._agreement.number, False
            try:
                self._arguments = self._prepare(source, target)
                may_block = self._communicator.may_block
                self._agreement.publish_with(may_block, self._label, self._digest)
                state[NUMBER] += 1
                self._await_others()
                if may_block and self._agreement.all_may_block():
                    self._run_blocking()
                else:
                    self._run_nonblocking()
                if self._collective.reduction is not None:
                    self._collective.reduction.finish(target)
            except BaseException as error:
                if not state[BUSY]:
                    if self._agreement.number != begun and not isinstance(error, MPI.Exception):
                        self._join_others()
                    self._end_group(error)
                raise
            finally:
                self._arguments = ()
        return True

    def bind(self, source: Array | None, target: Array | None, /) -> BoundFastPath:
        """See `FastPath.bind`."""
        return BoundNativeCollective(self, source, target)

    def _prepare(self, source: Array | None, target: Array) -> tuple[Any, ...]:
        """Make the arguments of MPI's methods."""
        op, rank = self._collective.op, self._communicator.rank
        if op == "all_gather" and source is not None:
            if source.flags.c_contiguous and not np.may_share_memory(source, target):
                return mpi_view(source), mpi_view(target)
            target.reshape(self._communicator.world_size, -1)[rank] = source.reshape(-1)
            return MPI.IN_PLACE, mpi_view(target)
        if not self._in_place:
            both = mpi_view(cast(Array, source)), mpi_view(target)
            return both if self._op is None else (*both, self._op)
        if source is not None and source is not target:
            target[...] = source
        if op == "broadcast":
            return mpi_view(target), self._collective.root
        return MPI.IN_PLACE, target, self._op

    def _await_others(self) -> None:
        """Wait until all ranks are in the call."""
        agreement, yield_core = self._agreement, self._communicator.monitor.yield_core
        words, word = agreement.words, agreement.word
        for index in agreement.looks[agreement.number & 1]:
            for _ in self._spins:
                if words[index] == word:
                    break
                yield_core()
            else:
                self._turn.late(self._collective.call, self._wait_for_late)
                return

    def _wait_for_late(self, *, deadline: float) -> None:
        try:
            self._agreement.wait_for_all(self._collective.call, deadline)
        except (PeerLost, CollectiveMismatch):
            raise
        except BaseException:
            self._join_others()
            raise

    def _run_blocking(self) -> None:
        communicator = self._communicator
        # The group's timeout, since a fast path is not told that of the call: all ranks are here, and about to end.
        communicator.blocked_until = time.monotonic() + communicator.timeout_s
        try:
            for _ in starmap(self._blocking, (self._arguments,)):
                self._joined = True
        finally:
            communicator.blocked_until = math.inf

    def _run_nonblocking(self) -> None:
        kept = begin(self._nonblocking, self._arguments)
        self._joined = True
        request = cast(MPI.Request, kept[-1])
        for _ in self._spins:
            if request.Test():
                break
        else:
            self._turn.late(self._collective.call, partial(self._wait_for_request, request, kept))
        release(kept)

    def _wait_for_request(self, request: MPI.Request, kept: list[object], *, deadline: float) -> None:
        ranks = range(self._communicator.world_size)
        try:
            wait_for(request, kept, self._communicator.monitor, deadline, ranks)
        except MPI.Exception as error:
            raise self._communicator.translated(error) from error

    def _join_others(self) -> None:
        """Take part in MPI's collective before an exception leaves, if the other ranks may be in it."""
        if not self._joined and not self._agreement.take_back() and self._agreement.all_may_block():
            self._joined = True
            self._blocking(*self._arguments)

    def _end_group(self, error: BaseException) -> None:
        """End the group, in whose collective an exception was raised."""
        raised = self._communicator.translated(error) if isinstance(error, MPI.Exception) else error

        def raise_error(*, deadline: float) -> None:
            raise raised

        self._turn.late(self._collective.call, raise_error)


class BoundNativeCollective:
    """A native collective with its buffers; see `BoundFastPath`. A step that is started goes the ordinary path."""

    def __init__(self, collective: NativeCollective, source: Array | None, target: Array | None) -> None:
        self._collective = collective
        self._source = source
        self._target = target

    def __call__(self) -> bool:
        """See `FastPath.__call__`."""
        return self._collective(self._source, self._target)

    def start(self) -> bool:
        """See `BoundFastPath.start`: MPI carries nothing on before it is called again, so a thread must."""
        return False

    def test(self) -> bool:
        """See `BoundFastPath.test`."""
        return True

    def finish(self) -> None:
        """See `BoundFastPath.finish`."""

    def close(self) -> None:
        """See `BoundFastPath.close`."""
        self._source = self._target = None
