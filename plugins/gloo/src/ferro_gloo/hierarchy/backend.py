"""Hierarchy: the collectives of a group whose ranks live on several hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ferro.backend import Backend
from ferro.collectives.defaults import release
from ferro.collectives.label import Call
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.hierarchy import gatherings, movements, reductions
from ferro_gloo.hierarchy.levels import Levels
from ferro_gloo.tcp.backend import TcpBackend

if TYPE_CHECKING:
    from ferro_gloo.hierarchy.levels import Local


class Hierarchy(Backend):
    """One rank of a group on several hosts: fast within a host, each host's link full between.

    A collective is made of steps on the host (`local`) and on rails, each of which connects one
    rank of every host (see `topology`). A call that differs on one rank is found out as on one
    level: every message and every round through shared memory carries the call's label, rooted
    calls begin with all ranks telling rank 0 (and those that collect end with its answer), and
    the result of any other call hangs on data from every rank, so that no rank can end before
    the one that differs has been met by one of its partners. What that one raises reaches the
    others as any failure does: by the group's death, which wakes waits on both levels.

    Contributions are combined host by host, so a floating-point sum differs from that in order
    of rank by rounding; it has the same bits on all ranks. Where the result must be that of all
    contributions meeting at once in order of rank (half precision, users' functions, a
    `deterministic` group), the call is served by the flat group, whose algorithms do that.

    Args:
        flat: the group over TCP, of which `local` and the rails are parts.
        hosts: the members' ranks by host, each list ascending, hosts by their lowest rank; two
            at least, of any sizes.
        local: the ranks of this rank's host, numbered by their place in its list.
    """

    labels_frames = True

    def __init__(self, flat: TcpBackend, hosts: Sequence[Sequence[int]], local: Local) -> None:
        super().__init__(flat.rank, flat.world_size, flat.choice)
        self._flat = flat
        self._levels = Levels(flat, hosts, local)

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self._flat.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self._flat.recv(buffer, peer, tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        *,
        tag: int,
        deadline: float,
    ) -> None:
        """See `Backend.exchange`."""
        self._flat.exchange(sends, recvs, tag=tag, deadline=deadline)

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`."""
        self.call = call
        self._flat.agree(call, deadline=deadline)
        self._levels.begin(call)

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`; the leaders meet between two meetings of each host."""
        self._levels.local.barrier(deadline=deadline)
        if self._levels.rail is not None and self._levels.topology.place == 0:
            self._levels.rail.barrier(deadline=deadline)
        self._levels.local.barrier(deadline=deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        if self._at_once(reduction):
            self._flat.all_reduce(buffer, reduction, deadline=deadline)
        else:
            reductions.all_reduce(self._levels, buffer, reduction, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        if self._at_once(reduction):
            self._flat.reduce(buffer, reduction, root, deadline=deadline)
        else:
            reductions.reduce(self._levels, buffer, reduction, root, deadline)
            release(self, deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        movements.broadcast(self._levels, buffer, root, deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        gatherings.all_gather(self._levels, buffer, counts, deadline)

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float
    ) -> None:
        """See `Backend.gather`; every byte has one way to go, so no level helps."""
        self._flat.gather(block, out, counts, root, deadline=deadline)

    def scatter(
        self,
        block: Array,
        source: Array | None,
        counts: Sequence[int],
        root: int,
        *,
        deadline: float,
    ) -> None:
        """See `Backend.scatter`; every byte has one way to go, so no level helps."""
        self._flat.scatter(block, source, counts, root, deadline=deadline)

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
        if self._at_once(reduction):
            self._flat.reduce_scatter(source, out, counts, reduction, deadline=deadline)
        else:
            gatherings.reduce_scatter(self._levels, source, out, counts, reduction, deadline)

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
        movements.all_to_all(self._levels, source, out, send_counts, recv_counts, deadline)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return a group over the same connections, on one level."""
        return self._flat.subgroup(ranks, context)

    def abort(self) -> None:
        """End this group's operations on all its ranks; waits on both levels are woken."""
        self._levels.local.abort()
        self._flat.abort()

    def close(self) -> None:
        """Let the thread beside end; close what `flat` owns."""
        self._levels.close()
        self._flat.close()

    def _at_once(self, reduction: Reduction) -> bool:
        return reduction.needs_all or self.choice.deterministic
