"""HierarchicalBackend: collectives on several hosts, by shared memory within hosts and TCP between."""

from __future__ import annotations

from collections.abc import Sequence

from ferro.backend import Backend
from ferro.collectives.label import Call
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.hierarchy import data_movement, reductions
from ferro_gloo.hierarchy.groups import HierarchyGroups, LocalBackend
from ferro_gloo.tcp.backend import TcpBackend


class HierarchicalBackend(Backend):
    """One rank of a group on several hosts.

    A collective consists of steps within each host (`local`) and steps on rails, each of which connects one rank of
    every host (see `topology`). If one rank makes another call, some rank that exchanges data with it finds the
    mismatch, because every message and every round carries the call's label. That rank's error ends the group and wakes
    all ranks that wait. No rank can have returned before: rooted calls begin with a barrier, and the result of any
    other call depends on data from every rank.

    Contributions are combined host by host, so a floating-point sum may differ from that in order
    of rank by rounding; it has the same bits on all ranks. Where the result must be that of rank
    order (half precision, users' functions, a `deterministic` group), the flat group's algorithms
    run the call.

    Args:
        flat: the group over TCP, of which `local` and the rails are parts.
        hosts: the group's ranks by host, each list ascending, hosts by their lowest rank; at least two hosts, of any
            sizes.
        local: the group of the ranks on this rank's host, in the order of its list.
    """

    labels_frames = True

    def __init__(self, flat: TcpBackend, hosts: Sequence[Sequence[int]], local: LocalBackend) -> None:
        super().__init__(flat.rank, flat.world_size, flat.choice)
        self._flat = flat
        self._groups = HierarchyGroups(flat, hosts, local)

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self._flat.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self._flat.recv(buffer, peer, tag=tag, deadline=deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """See `Backend.exchange`."""
        self._flat.exchange(sends, recvs, tag=tag, deadline=deadline)

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`; a rooted call begins with a barrier.

        Otherwise a rank could wait for one that waits for it in another call, without a message between them.
        """
        self.call = call
        self._flat.begin(call)
        self._groups.begin(call)
        if call.root >= 0:
            self.barrier(deadline=deadline)

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`: a barrier on each host, one of the hosts' leaders, and again one on each host."""
        self._groups.local.barrier(deadline=deadline)
        if self._groups.rail is not None and self._groups.topology.local_rank == 0:
            self._groups.rail.barrier(deadline=deadline)
        self._groups.local.barrier(deadline=deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        if self._needs_rank_order(reduction):
            self._groups.local.barrier(deadline=deadline)  # a rank in another call may wait here for this one
            self._flat.all_reduce(buffer, reduction, deadline=deadline)
        else:
            reductions.all_reduce(self._groups, buffer, reduction, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        if self._needs_rank_order(reduction):
            self._flat.reduce(buffer, reduction, root, deadline=deadline)
        else:
            reductions.reduce(self._groups, buffer, reduction, root, deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        data_movement.broadcast(self._groups, buffer, root, deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        data_movement.all_gather(self._groups, buffer, counts, deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.gather`; the flat algorithm, because a hierarchy would send as many bytes."""
        self._flat.gather(block, out, counts, root, deadline=deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.scatter`; the flat algorithm, because a hierarchy would send as many bytes."""
        self._flat.scatter(block, source, counts, root, deadline=deadline)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        if self._needs_rank_order(reduction):
            self._groups.local.barrier(deadline=deadline)  # a rank in another call may wait here for this one
            self._flat.reduce_scatter(source, out, counts, reduction, deadline=deadline)
        else:
            reductions.reduce_scatter(self._groups, source, out, counts, reduction, deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """See `Backend.all_to_all`."""
        data_movement.all_to_all(self._groups, source, out, send_counts, recv_counts, deadline)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a flat group over the same connections."""
        return self._flat.subgroup(ranks, context)

    def abort(self) -> None:
        """End this group's operations on all its ranks, and wake all that wait in `local` or the flat group."""
        self._groups.local.abort()
        self._flat.abort()

    def close(self) -> None:
        """End the network thread; close the local and the flat group."""
        self._groups.close()
        self._flat.close()

    def _needs_rank_order(self, reduction: Reduction) -> bool:
        return reduction.needs_all or self.choice.deterministic
