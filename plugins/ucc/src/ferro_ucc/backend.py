"""UccBackend: the collectives of a group, carried out by UCC.

Movements are UCC's own, as bytes. Of the reductions it does those that `natives` allows; for all
others every rank gets the contributions to its block and combines them with NumPy in order of
rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ferro.backend import Backend
from ferro.collectives import Choice
from ferro.collectives.label import LABEL_BYTES, Call, compare_labels
from ferro.collectives.partition import blocks
from ferro.collectives.reduction import Reduction
from ferro.errors import UnsupportedError
from ferro.types import Array
from ferro_ucc import operations
from ferro_ucc.abi import MAX_TEAM_ID
from ferro_ucc.context import Context
from ferro_ucc.natives import Native, native_reduction
from ferro_ucc.sole import NoTransfers, SoleBackend
from ferro_ucc.team import Team

if TYPE_CHECKING:
    from ferro.rendezvous import Store

# Up to so many bytes from all ranks together, each gets all of them and combines them itself.
_FEW_BYTES = 256 * 1024


class UccBackend(NoTransfers):
    """One rank of a group of several.

    Args:
        context: UCC's connections.
        store: part of the job's store in which every group has a part.
        ranks: the members' ranks in the world.
        rank: this one's in the group.
        choice: whether results must be those of reducing in order of rank.
        number: the group's number; 0 for the world, which owns the connections.
    """

    def __init__(
        self, context: Context, store: Store, ranks: Sequence[int], rank: int, choice: Choice, number: int = 0
    ) -> None:
        super().__init__(rank, len(ranks), choice)
        self._context = context
        self._store = store
        self._ranks = tuple(ranks)
        self._owns = number == 0
        self._closed = False
        part = store.prefix(f"team/{number}")
        self._team = Team(context, part, rank, self._ranks, number + 1)

    def agree(self, call: Call, *, deadline: float) -> None:
        """Show every rank all labels; returns when all have come."""
        self.call = call
        self._team.create(deadline)
        label = call.label()
        labels = np.empty(self.world_size * LABEL_BYTES, np.uint8)
        counts = [LABEL_BYTES] * self.world_size
        blocks(labels, counts)[self.rank][...] = np.frombuffer(label, np.uint8)
        self._team.run(operations.all_gather(labels, counts), deadline)
        shown = labels.tobytes()
        if shown == label * self.world_size:
            return
        for peer in range(self.world_size):
            compare_labels(self.rank, call, peer, shown[peer * LABEL_BYTES :][:LABEL_BYTES])

    def barrier(self, *, deadline: float) -> None:
        """Do nothing: `agree` was a barrier."""

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`: every element is rounded on one rank, or in one order."""
        native = self._native(reduction)
        if buffer.size == 0:
            return
        if native is not None and native.exact:
            self._team.run(operations.all_reduce(buffer, native), deadline)
        elif buffer.nbytes * self.world_size <= _FEW_BYTES:
            self._combine_all(buffer, reduction, deadline)
        else:
            counts = self._shares(buffer.size)
            mine = np.empty(counts[self.rank], buffer.dtype)
            self._reduce_blocks(buffer, mine, counts, reduction, deadline)
            blocks(buffer, counts)[self.rank][...] = mine
            self._team.run(operations.all_gather(buffer, counts), deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        native = self._native(reduction)
        if buffer.size == 0:
            return
        if native is not None:
            self._team.run(operations.reduce(buffer, native, root, self.rank), deadline)
            if self.rank == root:
                reduction.finish(buffer)
        elif buffer.nbytes * self.world_size <= _FEW_BYTES:
            self._combine_all(buffer, reduction, deadline)
        else:
            counts = self._shares(buffer.size)
            mine = np.empty(counts[self.rank], buffer.dtype)
            self._reduce_blocks(buffer, mine, counts, reduction, deadline)
            out = buffer if self.rank == root else None
            self.gather(mine, out, counts, root, deadline=deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        if buffer.nbytes:
            self._team.run(operations.broadcast(buffer, root), deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        if buffer.nbytes:
            self._team.run(operations.all_gather(buffer, counts), deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.gather`."""
        if not sum(counts):
            return
        if out is not None:
            blocks(out, counts)[root][...] = block
        if self._context.library.gathers:
            self._team.run(operations.gather(block, out, counts, root), deadline)
            return
        to, source = [0] * self.world_size, [0] * self.world_size
        if out is None:
            to[root] = counts[self.rank]
        else:
            source = list(counts)
            to[root] = counts[root]
        whole = block[:0] if out is None else out
        self._team.run(operations.all_to_all(block, whole, to, source), deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.scatter`."""
        if not sum(counts):
            return
        if source is not None:
            block[...] = blocks(source, counts)[root]
        if self._context.library.gathers:
            self._team.run(operations.scatter(block, source, counts, root), deadline)
            return
        came = [0] * self.world_size
        came[root] = counts[self.rank]
        whole, to = (block[:0], [0] * self.world_size) if source is None else (source, counts)
        self._team.run(operations.all_to_all(whole, block, to, came), deadline)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        if source.size:
            self._reduce_blocks(source, out, counts, reduction, deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """See `Backend.all_to_all`."""
        self._team.run(operations.all_to_all(source, out, send_counts, recv_counts), deadline)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return a group over the same connections, a team of its own.

        Raises:
            UnsupportedError: UCC cannot number so many groups.
        """
        if len(ranks) == 1:
            return SoleBackend(self.choice)
        if context >= MAX_TEAM_ID:
            raise UnsupportedError(
                f"ucc: UCC tells {MAX_TEAM_ID} groups of a job apart, and this is number "
                f"{context}: make groups once and keep them",
                op="subgroup",
            )
        members = [self._ranks[rank] for rank in ranks]
        rank = tuple(ranks).index(self.rank)
        return UccBackend(self._context, self._store, members, rank, self.choice, context)

    def abort(self) -> None:
        """End this group's operations on all its ranks; other groups go on."""
        self._team.abort.tell()

    def close(self) -> None:
        """Release the team; of the world, the connections, if the others do so soon.

        After a failure they stay until the process ends: other ranks may be gone.
        """
        if self._closed:
            return
        self._closed = True
        self._team.close()
        if self._owns:
            if self._team.abort.told():
                self._context.abandon(self._team)
            self._context.close()

    def _native(self, reduction: Reduction) -> Native | None:
        """Return how UCC does a reduction, where the result is what was asked for."""
        native = native_reduction(reduction)
        if native is not None and self.choice.deterministic and not native.exact:
            return None
        return native

    def _combine_all(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """Get every rank's `buffer`, and combine them into it in order of rank."""
        counts = [buffer.size] * self.world_size
        together = np.empty(sum(counts), buffer.dtype)
        contributions = blocks(together, counts)
        contributions[self.rank][...] = buffer
        self._team.run(operations.all_gather(together, counts), deadline)
        reduction.into(buffer, contributions, at_once=True)

    def _reduce_blocks(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, deadline: float
    ) -> None:
        """Reduce this rank's block of all ranks' `source` into `out`."""
        native = self._native(reduction)
        if native is not None:
            self._team.run(operations.reduce_scatter(source, out, counts, native), deadline)
            reduction.finish(out)
            return
        own = [counts[self.rank]] * self.world_size
        together = np.empty(sum(own), source.dtype)
        self._team.run(operations.all_to_all(source, together, counts, own), deadline)
        if out.size:
            reduction.into(out, blocks(together, own), at_once=True)

    def _shares(self, size: int) -> list[int]:
        """Return how many of `size` elements each rank reduces."""
        n = self.world_size
        return [size * (i + 1) // n - size * i // n for i in range(n)]
