"""MpiBackend: one rank of a group, whose collectives are MPI's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro import PeerLost, RendezvousError
from ferro.backend import Backend
from ferro.collectives.choice import Choice
from ferro.collectives.label import Call
from ferro.collectives.partition import blocks
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_mpi import meeting
from ferro_mpi.agreement import BoardAgreement
from ferro_mpi.arithmetic import movable, native
from ferro_mpi.endpoint import Endpoint
from ferro_mpi.meeting import in_blocks
from ferro_mpi.mpi import MPI

_LARGEST = (1 << 31) - 1
_MOST_REMEMBERED = 1024
_SHARING = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")


class MpiBackend(Backend):
    """One rank of a group.

    A collective begins when all ranks agree on it; then MPI's own carries it out. Algorithms that
    the user fixed, and blocks beyond MPI's counts, are schedules over messages instead. Where ranks
    are more than cores, small operands come along with the agreement, and NumPy reduces or copies
    them: that is quicker than to agree and then to meet again in MPI.

    Args:
        endpoint: the group's communicators.
        choice: which algorithm serves which call.

    Attributes:
        largest: most elements that one MPI call counts; larger calls are cut, or are schedules. The
            same on all ranks.
    """

    largest = _LARGEST

    def __init__(self, endpoint: Endpoint, choice: Choice) -> None:
        super().__init__(endpoint.rank, endpoint.world_size, choice)
        self._endpoint = endpoint
        self._comm = endpoint.comm
        self._run_native = endpoint.run
        self._fixed = frozenset(choice.fixed)
        self._natives: dict[Reduction, MPI.Op | None] = {}
        self._quick: dict[Reduction, MPI.Op] = {}  # of them, what all_reduce uses at once
        self._agreement: BoardAgreement | None = None
        self._shares = False
        self._share_bytes = 0
        if endpoint.board is not None:
            self._agreement = BoardAgreement(
                endpoint.board, endpoint.lookout, self.rank, self.world_size
            )
            self._shares = endpoint.lookout.crowded
            self._share_bytes = endpoint.board.slot_bytes

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`; what may share operands agrees when it has them."""
        self.call = call
        if self._agreement is None:
            super().agree(call, deadline=deadline)
        elif not (self._shares and call.op in _SHARING):
            self._agreement(call, deadline)

    def _shared(self, operand: Array | None, deadline: float) -> Sequence[Array] | None:
        """Return all ranks' operands if they are small enough to come along with the agreement.

        Otherwise, or where ranks have operands of different sizes (None), the result is None, and
        the ranks have agreed without them.
        """
        if not self._shares:
            return None
        assert self._agreement is not None, "ranks share memory on a board"
        small = operand is not None and operand.nbytes <= self._share_bytes
        if operand is not None and small and self.call.op not in self._fixed:
            return self._agreement.share(self.call, operand, deadline)
        self._agreement(self.call, deadline)
        return None

    # -- transfers -------------------------------------------------------------------------------

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self._endpoint.exchange([(peer, buffer)], (), tag, deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self._endpoint.exchange((), [(peer, buffer)], tag, deadline)

    def exchange(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        *,
        tag: int,
        deadline: float,
    ) -> None:
        """See `Backend.exchange`."""
        self._endpoint.exchange(sends, recvs, tag, deadline)

    # -- reductions ------------------------------------------------------------------------------

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        op = self._quick.get(reduction)
        if op is None or buffer.size > self.largest:
            self._all_reduce(buffer, reduction, deadline)
            return
        comm = self._comm
        arguments = (MPI.IN_PLACE, buffer, op)
        self._run_native(comm.Allreduce, comm.Iallreduce, arguments, deadline)
        reduction.finish(buffer)

    def _all_reduce(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """Reduce the way that suits; if that is natively at once, remember it."""
        shared = self._shared(buffer, deadline)
        if shared is not None:
            reduction.into(buffer, shared, at_once=True)
            return
        op = self._native(reduction)
        if "all_reduce" in self._fixed:
            super().all_reduce(buffer, reduction, deadline=deadline)
        elif op is None:
            meeting.all_reduce(self._comm, buffer, reduction, self._finish(deadline))
        else:
            comm = self._comm
            for piece in self._pieces(buffer):
                arguments = (MPI.IN_PLACE, piece, op)
                self._run_native(comm.Allreduce, comm.Iallreduce, arguments, deadline)
            reduction.finish(buffer)
            if not self._shares:
                self._quick[reduction] = op

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        op = self._native(reduction)
        if "reduce" in self._fixed:
            super().reduce(buffer, reduction, root, deadline=deadline)
        elif op is None:
            meeting.reduce(self._comm, buffer, reduction, root, self._finish(deadline))
        else:
            comm = self._comm
            for piece in self._pieces(buffer):
                pair = (MPI.IN_PLACE, piece) if self.rank == root else (piece, None)
                self._run_native(comm.Reduce, comm.Ireduce, (*pair, op, root), deadline)
            reduction.finish(buffer)

    def reduce_scatter(
        self,
        source: Array,
        out: Array,
        counts: Sequence[int],
        reduction: Reduction,
        *,
        deadline: float,
    ) -> None:
        """See `Backend.reduce_scatter`."""
        shared = self._shared(source, deadline)
        if shared is not None:
            start = sum(counts[: self.rank])
            end = start + counts[self.rank]
            reduction.into(out, [operand[start:end] for operand in shared], at_once=True)
            return
        op, comm = self._native(reduction), self._comm
        if "reduce_scatter" in self._fixed or source.size > self.largest:
            super().reduce_scatter(source, out, counts, reduction, deadline=deadline)
        elif op is None:
            finish = self._finish(deadline)
            meeting.reduce_scatter(comm, source, out, counts, reduction, finish)
        elif _even(counts):
            arguments: tuple[object, ...] = (source, out, op)
            self._run_native(
                comm.Reduce_scatter_block, comm.Ireduce_scatter_block, arguments, deadline
            )
            reduction.finish(out)
        else:
            arguments = (source, out, list(counts), op)
            self._run_native(comm.Reduce_scatter, comm.Ireduce_scatter, arguments, deadline)
            reduction.finish(out)

    # -- movements -------------------------------------------------------------------------------

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        shared = self._shared(buffer, deadline)
        if shared is not None:
            buffer[...] = shared[root]
        elif "broadcast" in self._fixed:
            super().broadcast(buffer, root, deadline=deadline)
        else:
            comm = self._comm
            for piece in self._pieces(movable(buffer)):
                self._run_native(comm.Bcast, comm.Ibcast, (piece, root), deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        even = _even(counts)
        parts = blocks(buffer, counts) if self._shares else []
        shared = self._shared(parts[self.rank] if parts and even else None, deadline)
        if shared is not None:
            for part, theirs in zip(parts, shared, strict=True):
                part[...] = theirs
            return
        if "all_gather" in self._fixed or buffer.size > self.largest:
            super().all_gather(buffer, counts, deadline=deadline)
            return
        comm = self._comm
        if even:
            arguments: tuple[object, ...] = (MPI.IN_PLACE, movable(buffer))
            self._run_native(comm.Allgather, comm.Iallgather, arguments, deadline)
        else:
            arguments = (MPI.IN_PLACE, in_blocks(buffer, counts))
            self._run_native(comm.Allgatherv, comm.Iallgatherv, arguments, deadline)

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float
    ) -> None:
        """See `Backend.gather`."""
        if "gather" in self._fixed or sum(counts) > self.largest:
            super().gather(block, out, counts, root, deadline=deadline)
            return
        comm = self._comm
        if out is not None:
            blocks(out, counts)[root][...] = block
        mine = movable(block) if out is None else MPI.IN_PLACE
        if _even(counts):
            whole = None if out is None else movable(out)
            self._run_native(comm.Gather, comm.Igather, (mine, whole, root), deadline)
        else:
            taken = None if out is None else in_blocks(out, counts)
            self._run_native(comm.Gatherv, comm.Igatherv, (mine, taken, root), deadline)

    def scatter(
        self,
        block: Array,
        source: Array | None,
        counts: Sequence[int],
        root: int,
        *,
        deadline: float,
    ) -> None:
        """See `Backend.scatter`."""
        if "scatter" in self._fixed or sum(counts) > self.largest:
            super().scatter(block, source, counts, root, deadline=deadline)
            return
        comm = self._comm
        mine = movable(block) if source is None else MPI.IN_PLACE
        if _even(counts):
            whole = None if source is None else movable(source)
            self._run_native(comm.Scatter, comm.Iscatter, (whole, mine, root), deadline)
        else:
            given = None if source is None else in_blocks(source, counts)
            self._run_native(comm.Scatterv, comm.Iscatterv, (given, mine, root), deadline)
        if source is not None:
            block[...] = blocks(source, counts)[root]

    def all_to_all(
        self,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        *,
        deadline: float,
    ) -> None:
        """See `Backend.all_to_all`."""
        comm, even = self._comm, self.call.count > 0
        if "all_to_all" in self._fixed or self._most(source, out, even, deadline) > self.largest:
            super().all_to_all(source, out, send_counts, recv_counts, deadline=deadline)
        elif even:
            arguments: tuple[object, ...] = (movable(source), movable(out))
            self._run_native(comm.Alltoall, comm.Ialltoall, arguments, deadline)
        else:
            arguments = (in_blocks(source, send_counts), in_blocks(out, recv_counts))
            self._run_native(comm.Alltoallv, comm.Ialltoallv, arguments, deadline)

    def _most(self, source: Array, out: Array, even: bool, deadline: float) -> int:
        """Return the most elements that any rank sends or takes; all return the same."""
        most = max(source.size, out.size)
        if even:  # by the call's label, so all have the same sizes
            return most
        told = np.array([most], np.int64)
        comm = self._comm
        self._run_native(comm.Allreduce, comm.Iallreduce, (MPI.IN_PLACE, told, MPI.MAX), deadline)
        return int(told[0])

    # -- groups and their end --------------------------------------------------------------------

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return a group of some of these ranks, with communicators of its own."""
        try:
            return MpiBackend(self._endpoint.part(ranks, context), self.choice)
        except (TimeoutError, PeerLost) as error:
            raise RendezvousError(
                f"subgroup {tuple(ranks)}: not all members came ({error or 'in time'}); every "
                "member must call subgroup() with the same list",
                op="subgroup",
                rank=self.rank,
            ) from error

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """Return one of the groups into which all ranks part at once."""
        part = self._endpoint.split(ranks)
        return None if part is None else MpiBackend(part, self.choice)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the survivors' group, on an MPI that recovers (ULFM)."""
        return MpiBackend(self._endpoint.shrink(ranks), self.choice)

    def abort(self) -> None:
        """Wake every blocked call of this group, here and on the other ranks."""
        self._endpoint.abort()

    def close(self) -> None:
        """Leave the group. Other ranks that still call it lose this one."""
        self._endpoint.close()

    # -- shared by the collectives ---------------------------------------------------------------

    def _native(self, reduction: Reduction) -> MPI.Op | None:
        """Return MPI's operation for a reduction, None where NumPy is needed; remembered."""
        if reduction not in self._natives:
            op = native(reduction, deterministic=self.choice.deterministic)
            if reduction.op is None:  # a function, of which each call makes a reduction of its own
                return op
            if len(self._natives) >= _MOST_REMEMBERED:
                self._natives.clear()
                self._quick.clear()
            self._natives[reduction] = op
        return self._natives[reduction]

    def _finish(self, deadline: float) -> meeting.Finish:
        return lambda request, buffers: self._endpoint.finish(request, buffers, deadline)

    def _pieces(self, buffer: Array) -> Sequence[Array]:
        """Cut a buffer into what MPI can count; elementwise collectives do not mind."""
        length = self.largest
        if buffer.size <= length:
            return (buffer,)
        return [buffer[start : start + length] for start in range(0, buffer.size, length)]


def _even(counts: Sequence[int]) -> bool:
    return counts.count(counts[0]) == len(counts)
