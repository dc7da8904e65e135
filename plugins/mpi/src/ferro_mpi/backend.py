"""MpiBackend: the backend whose collectives are MPI's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ferro import PeerLost, RendezvousError
from ferro.backend import Backend
from ferro.collectives import Choice
from ferro.collectives.fast_path import EvenCollective, FastPath, Turn
from ferro.collectives.gathered_reduction import GatheredReduction
from ferro.collectives.label import Call
from ferro.collectives.partition import blocks
from ferro.collectives.posted_transfers import PostedTransfers
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_mpi.agreement import SharedMemoryAgreement
from ferro_mpi.communicator import MpiCommunicator
from ferro_mpi.mpi import MPI
from ferro_mpi.native_collectives import NativeCollective
from ferro_mpi.persistent_exchange import MpiPersistentExchange
from ferro_mpi.reductions import MpiTransfers, all_equal, buffer_spec, mpi_view, native_op
from ferro_mpi.shared_operands import shared_count
from ferro_mpi.small_collectives import SmallCollective

_LARGEST = (1 << 31) - 1
_MOST_CACHED = 1024
_SEGMENT_BYTES = 8 << 20  # of a gathered reduction
_MOST_BYTES_READ = 128 << 10  # by each of the ranks that share operands and have a core each


class MpiBackend(Backend):
    """One rank of a group.

    A collective begins when all ranks agree on it; then MPI's own collective runs. Algorithms that the user has fixed,
    and blocks too large for MPI's counts, run as schedules of messages instead. On one host small operands are shared
    with the agreement, and NumPy reduces or copies them: that is quicker than to agree and then to synchronise in MPI.

    Args:
        communicator: the group's communicators.
        choice: the algorithm for each call.

    Attributes:
        largest: the largest number of elements in one MPI call, the same on all ranks. Larger calls are cut into
            several, or run as schedules.
    """

    largest = _LARGEST

    def __init__(self, communicator: MpiCommunicator, choice: Choice) -> None:
        super().__init__(communicator.rank, communicator.world_size, choice)
        self._communicator = communicator
        self._comm = communicator.comm
        self._fixed = frozenset(choice.fixed)
        self._native_ops: dict[Reduction, MPI.Op | None] = {}
        self._agreement: SharedMemoryAgreement | None = None
        self._agreed, self._deadline = False, 0.0  # of the current call
        self._share_bytes = 0  # the largest operands that are shared with the agreement
        if communicator.memory is not None:
            self._agreement = SharedMemoryAgreement(
                communicator.memory, communicator.monitor, self.rank, self.world_size
            )
            # A rank reads the operands of all: with a core each, many ranks are quicker in MPI, which reads fewer.
            most = _MOST_BYTES_READ if not communicator.monitor.oversubscribed else math.inf
            self._share_bytes = int(min(communicator.memory.slot_bytes, most // self.world_size))

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`; ranks that share memory agree later, with operands or just before MPI's collective."""
        self.call = call
        self._agreed, self._deadline = False, deadline
        if self._agreement is None:
            super().agree(call, deadline=deadline)

    def _agree(self) -> None:
        """Agree on the current call, unless that was done."""
        if self._agreement is not None and not self._agreed:
            self._agreed = True
            self._agreement.agree(self.call, self._deadline)

    def _shares(self, op: str, count: int, dtype: np.dtype) -> bool:
        """Say whether operands of `count` elements, the same number on all ranks, are shared with the agreement."""
        return count * dtype.itemsize <= self._share_bytes and op not in self._fixed

    def _share(self, operand: Array | None, count: int, dtype: np.dtype, deadline: float) -> Sequence[Array] | None:
        """Agree, and share all ranks' operands.

        The result is None, and the ranks have not agreed, if operands are large. `operand` is None on a rank that has
        none to share; `count` and `dtype` are those of all operands.
        """
        if self._agreement is None or not self._shares(self.call.op, count, dtype):
            return None
        return self._agreement.agree_with_operands(self.call, operand, dtype, count, deadline)

    def fast_path(self, collective: EvenCollective, turn: Turn) -> FastPath | None:
        """See `Backend.fast_path`: most collectives of ranks that share memory have one."""
        op, reduction, agreement = collective.op, collective.reduction, self._agreement
        count = shared_count(op, collective.count, self.world_size)
        if agreement is None or op in self._fixed or (not count and op != "barrier"):
            return None
        communicator = self._communicator
        if self._shares(op, count, collective.dtype):
            return SmallCollective(collective, turn, agreement, communicator.monitor, self.rank, self.world_size)
        native = None if reduction is None else self._native_op(reduction)
        if op not in NativeCollective.OPS or (native is None and reduction is not None):
            return None
        if collective.count * self.world_size > self.largest:
            return None
        return NativeCollective(collective, native, turn, agreement, communicator)

    def _run_native(
        self,
        blocking: Callable[..., object],
        nonblocking: Callable[..., MPI.Request],
        arguments: tuple[object, ...],
        deadline: float,
    ) -> None:
        """Run a collective of MPI; ranks that share memory agree just before each, since it may block."""
        self._agreed = True
        if self._agreement is None:
            self._communicator.run(nonblocking, arguments, deadline)
        else:
            self._communicator.agree_and_run(self._agreement, self.call, blocking, nonblocking, arguments, deadline)

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`: the agreement is one."""
        self._agree()

    # -- transfers -------------------------------------------------------------------------------

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self._communicator.exchange([(peer, buffer)], (), tag, deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self._communicator.exchange((), [(peer, buffer)], tag, deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """See `Backend.exchange`."""
        self._communicator.exchange(sends, recvs, tag, deadline)

    def persistent_exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, number: int, deadline: float
    ) -> MpiPersistentExchange | None:
        """See `Backend.persistent_exchange`."""
        return self._communicator.persistent_exchange(sends, recvs, number)

    def posted_transfers(self) -> PostedTransfers:
        """See `Backend.posted_transfers`."""
        return self._communicator.posted_transfers()

    # -- reductions ------------------------------------------------------------------------------

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        shared = self._share(buffer, buffer.size, buffer.dtype, deadline)
        if shared is not None:
            reduction.into(buffer, shared, at_once=True)
            return
        op = self._native_op(reduction)
        if "all_reduce" in self._fixed:
            self._agree()
            super().all_reduce(buffer, reduction, deadline=deadline)
        elif op is None:
            self._gathered(reduction, deadline).all_reduce(buffer)
        else:
            comm = self._comm
            for piece in self._pieces(buffer):
                arguments = (MPI.IN_PLACE, piece, op)
                self._run_native(comm.Allreduce, comm.Iallreduce, arguments, deadline)
            reduction.finish(buffer)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        shared = self._share(buffer, buffer.size, buffer.dtype, deadline)
        if shared is not None:
            if self.rank == root:
                reduction.into(buffer, shared, at_once=True)
            return
        op = self._native_op(reduction)
        if "reduce" in self._fixed:
            self._agree()
            super().reduce(buffer, reduction, root, deadline=deadline)
        elif op is None:
            self._gathered(reduction, deadline).reduce(buffer, root)
        else:
            comm = self._comm
            for piece in self._pieces(buffer):
                pair = (MPI.IN_PLACE, piece) if self.rank == root else (piece, None)
                self._run_native(comm.Reduce, comm.Ireduce, (*pair, op, root), deadline)
            reduction.finish(buffer)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        shared = self._share(source, source.size, source.dtype, deadline)
        if shared is not None:
            start = sum(counts[: self.rank])
            end = start + counts[self.rank]
            reduction.into(out, [operand[start:end] for operand in shared], at_once=True)
            return
        op, comm = self._native_op(reduction), self._comm
        if "reduce_scatter" in self._fixed or source.size > self.largest:
            self._agree()
            super().reduce_scatter(source, out, counts, reduction, deadline=deadline)
        elif op is None:
            self._gathered(reduction, deadline).reduce_scatter(source, out, counts)
        elif all_equal(counts):
            arguments: tuple[object, ...] = (source, out, op)
            self._run_native(comm.Reduce_scatter_block, comm.Ireduce_scatter_block, arguments, deadline)
            reduction.finish(out)
        else:
            arguments = (source, out, list(counts), op)
            self._run_native(comm.Reduce_scatter, comm.Ireduce_scatter, arguments, deadline)
            reduction.finish(out)

    # -- data movement ---------------------------------------------------------------------------

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        mine = buffer if self.rank == root else None
        shared = self._share(mine, buffer.size, buffer.dtype, deadline)
        if shared is not None:
            if mine is None:
                buffer[...] = shared[root]
        elif "broadcast" in self._fixed:
            self._agree()
            super().broadcast(buffer, root, deadline=deadline)
        else:
            comm = self._comm
            for piece in self._pieces(mpi_view(buffer)):
                self._run_native(comm.Bcast, comm.Ibcast, (piece, root), deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        even = all_equal(counts)
        if even and self._share_bytes:
            parts = blocks(buffer, counts)
            shared = self._share(parts[self.rank], counts[0], buffer.dtype, deadline)
            if shared is not None:
                for part, operand in zip(parts, shared, strict=True):
                    part[...] = operand
                return
        if "all_gather" in self._fixed or buffer.size > self.largest:
            self._agree()
            super().all_gather(buffer, counts, deadline=deadline)
            return
        comm = self._comm
        if even:
            arguments: tuple[object, ...] = (MPI.IN_PLACE, mpi_view(buffer))
            self._run_native(comm.Allgather, comm.Iallgather, arguments, deadline)
        else:
            arguments = (MPI.IN_PLACE, buffer_spec(buffer, counts))
            self._run_native(comm.Allgatherv, comm.Iallgatherv, arguments, deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.gather`."""
        shared = self._share(block, block.size, block.dtype, deadline) if all_equal(counts) else None
        if shared is not None:
            if out is not None:
                for part, operand in zip(blocks(out, counts), shared, strict=True):
                    part[...] = operand
            return
        if "gather" in self._fixed or sum(counts) > self.largest:
            self._agree()
            super().gather(block, out, counts, root, deadline=deadline)
            return
        comm = self._comm
        if out is not None:
            blocks(out, counts)[root][...] = block
        mine = mpi_view(block) if out is None else MPI.IN_PLACE
        if all_equal(counts):
            whole = None if out is None else mpi_view(out)
            self._run_native(comm.Gather, comm.Igather, (mine, whole, root), deadline)
        else:
            received = None if out is None else buffer_spec(out, counts)
            self._run_native(comm.Gatherv, comm.Igatherv, (mine, received, root), deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.scatter`."""
        shared = self._share(source, sum(counts), block.dtype, deadline) if all_equal(counts) else None
        if shared is not None:
            block[...] = blocks(shared[root], counts)[self.rank]
            return
        if "scatter" in self._fixed or sum(counts) > self.largest:
            self._agree()
            super().scatter(block, source, counts, root, deadline=deadline)
            return
        comm = self._comm
        mine = mpi_view(block) if source is None else MPI.IN_PLACE
        if all_equal(counts):
            whole = None if source is None else mpi_view(source)
            self._run_native(comm.Scatter, comm.Iscatter, (whole, mine, root), deadline)
        else:
            sent = None if source is None else buffer_spec(source, counts)
            self._run_native(comm.Scatterv, comm.Iscatterv, (sent, mine, root), deadline)
        if source is not None:
            block[...] = blocks(source, counts)[root]

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """See `Backend.all_to_all`."""
        comm, even = self._comm, self.call.count > 0
        shared = self._share(source, source.size, source.dtype, deadline) if even else None
        if shared is not None:
            for part, operand in zip(blocks(out, recv_counts), shared, strict=True):
                part[...] = blocks(operand, send_counts)[self.rank]
            return
        if "all_to_all" in self._fixed or self._largest_count(source, out, even, deadline) > self.largest:
            self._agree()
            super().all_to_all(source, out, send_counts, recv_counts, deadline=deadline)
        elif even:
            arguments: tuple[object, ...] = (mpi_view(source), mpi_view(out))
            self._run_native(comm.Alltoall, comm.Ialltoall, arguments, deadline)
        else:
            arguments = (buffer_spec(source, send_counts), buffer_spec(out, recv_counts))
            self._run_native(comm.Alltoallv, comm.Ialltoallv, arguments, deadline)

    def _largest_count(self, source: Array, out: Array, even: bool, deadline: float) -> int:
        """Find the most elements that any rank sends or receives, the same on all ranks."""
        most = max(source.size, out.size)
        if even:  # sizes are in the call's label, so all ranks have the same
            return most
        largest = np.array([most], np.int64)
        comm = self._comm
        self._run_native(comm.Allreduce, comm.Iallreduce, (MPI.IN_PLACE, largest, MPI.MAX), deadline)
        return int(largest[0])

    # -- sub-groups, abort, close ------------------------------------------------------------------

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a group of some of these ranks, with communicators of its own."""
        try:
            return MpiBackend(self._communicator.subgroup(ranks, context), self.choice)
        except (TimeoutError, PeerLost) as error:
            raise RendezvousError(
                f"subgroup {tuple(ranks)}: not all members came ({error or 'in time'}); every "
                "member must call subgroup() with the same list",
                op="subgroup",
                rank=self.rank,
            ) from error

    def split(self, ranks: Sequence[int] | None, context: int) -> Backend | None:
        """Split all ranks into groups; make the group of this rank."""
        self._agree()
        part = self._communicator.split(ranks)
        return None if part is None else MpiBackend(part, self.choice)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the survivors' group, with an MPI that can go on after a death (ULFM)."""
        return MpiBackend(self._communicator.shrink(ranks, context), self.choice)

    def abort(self) -> None:
        """Wake every blocked call of this group, here and on the other ranks."""
        self._communicator.abort()

    def close(self) -> None:
        """Leave the group. Other ranks that still use it get PeerLost."""
        self._communicator.close()

    # -- shared by the collectives ---------------------------------------------------------------

    def _native_op(self, reduction: Reduction) -> MPI.Op | None:
        """Find MPI's operation for a reduction, None where NumPy is needed; remember it."""
        if reduction not in self._native_ops:
            op = native_op(reduction, deterministic=self.choice.deterministic)
            if reduction.op is None:  # a user's function, for which each call makes a new Reduction
                return op
            if len(self._native_ops) >= _MOST_CACHED:
                self._native_ops.clear()
            self._native_ops[reduction] = op
        return self._native_ops[reduction]

    def _gathered(self, reduction: Reduction, deadline: float) -> GatheredReduction:
        """Agree, and make a reduction that gathers all contributions and reduces them with NumPy."""
        self._agree()
        communicator = self._communicator
        transfers = MpiTransfers(self._comm, lambda method, arguments: communicator.run(method, arguments, deadline))
        return GatheredReduction(transfers, self.rank, self.world_size, reduction, segment_bytes=_SEGMENT_BYTES)

    def _pieces(self, buffer: Array) -> Sequence[Array]:
        """Cut a buffer into pieces that MPI can count, for elementwise collectives."""
        length = self.largest
        if buffer.size <= length:
            return (buffer,)
        return [buffer[start : start + length] for start in range(0, buffer.size, length)]
