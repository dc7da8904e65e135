"""UccBackend: the collectives of a group, carried out by UCC.

UCC moves data as bytes. It carries out the reductions that `reductions.py` allows. For all others every rank receives
the contributions to its block, and combines them with NumPy in order of rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ferro.backend import Backend
from ferro.collectives import Choice
from ferro.collectives.label import LABEL_BYTES, Call, compare_labels
from ferro.collectives.partition import blocks, even_sizes
from ferro.collectives.reduction import Reduction
from ferro.errors import UnsupportedError
from ferro.types import Array
from ferro_ucc import operations
from ferro_ucc.abi import MAX_TEAM_ID
from ferro_ucc.context import Context
from ferro_ucc.reductions import UccReduction, native_reduction
from ferro_ucc.team import Team

if TYPE_CHECKING:
    from ferro.rendezvous import Store

# Up to this size of all contributions together, each rank receives all of them and combines them itself.
_SMALL_BYTES = 256 * 1024


class CollectivesOnlyBackend(Backend):
    """Refuses messages between two ranks: UCC has collectives only."""

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Raise UnsupportedError."""
        _refuse("send")

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """Raise UnsupportedError."""
        _refuse("recv")

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """Raise UnsupportedError, unless there is nothing to exchange."""
        if sends or recvs:
            _refuse("sendrecv")


class SingleRankBackend(CollectivesOnlyBackend):
    """A group of one rank: core's schedules move nothing, and UCC takes no part."""

    def __init__(self, choice: Choice | None = None) -> None:
        super().__init__(0, 1, choice)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make another group of one rank."""
        return SingleRankBackend(self.choice)

    def close(self) -> None:
        """Do nothing: nothing is open."""


class UccBackend(CollectivesOnlyBackend):
    """One rank of a group of several.

    Args:
        context: UCC's connections.
        store: the job's store, with a prefix for ucc; every group adds one of its own.
        ranks: the members' ranks in the world.
        rank: this rank in the group.
        choice: says whether floating-point reductions must be in order of rank.
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
        self._team = Team(context, store.prefix(f"team/{number}"), rank, self._ranks, number + 1)

    def agree(self, call: Call, *, deadline: float) -> None:
        """Gather the labels of all ranks, and compare them with this rank's."""
        self.call = call
        self._team.create(deadline)
        label = call.label()
        labels = np.empty(self.world_size * LABEL_BYTES, np.uint8)
        counts = [LABEL_BYTES] * self.world_size
        blocks(labels, counts)[self.rank][...] = np.frombuffer(label, np.uint8)
        self._team.run(operations.all_gather(labels, counts), deadline)
        gathered = labels.tobytes()
        if gathered == label * self.world_size:
            return
        for peer in range(self.world_size):
            compare_labels(self.rank, call, peer, gathered[peer * LABEL_BYTES :][:LABEL_BYTES])

    def barrier(self, *, deadline: float) -> None:
        """Do nothing: `agree` was a barrier."""

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """Reduce so that every element is rounded on one rank only, or in the same order on all ranks."""
        native = self._native(reduction)
        if buffer.size == 0:
            return
        if native is not None and native.exact:
            self._team.run(operations.all_reduce(buffer, native), deadline)
        elif buffer.nbytes * self.world_size <= _SMALL_BYTES:
            self._combine_all(buffer, reduction, deadline)
        else:
            counts = even_sizes(buffer.size, self.world_size)
            mine = np.empty(counts[self.rank], buffer.dtype)
            self._reduce_blocks(buffer, mine, counts, reduction, deadline)
            blocks(buffer, counts)[self.rank][...] = mine
            self._team.run(operations.all_gather(buffer, counts), deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """Reduce to the root."""
        native = self._native(reduction)
        if buffer.size == 0:
            return
        if native is not None:
            self._team.run(operations.reduce(buffer, native, root, self.rank), deadline)
            if self.rank == root:
                reduction.finish(buffer)
        elif buffer.nbytes * self.world_size <= _SMALL_BYTES:
            self._combine_all(buffer, reduction, deadline)
        else:
            counts = even_sizes(buffer.size, self.world_size)
            mine = np.empty(counts[self.rank], buffer.dtype)
            self._reduce_blocks(buffer, mine, counts, reduction, deadline)
            out = buffer if self.rank == root else None
            self.gather(mine, out, counts, root, deadline=deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """Broadcast the root's buffer."""
        if buffer.nbytes:
            self._team.run(operations.broadcast(buffer, root), deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """Gather all blocks on all ranks."""
        if buffer.nbytes:
            self._team.run(operations.all_gather(buffer, counts), deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """Gather all blocks at the root; UCC 1.1 does so by an all-to-all."""
        if not sum(counts):
            return
        if out is not None:
            blocks(out, counts)[root][...] = block
        if self._context.library.has_gather:
            self._team.run(operations.gather(block, out, counts, root), deadline)
            return
        send_counts, recv_counts = [0] * self.world_size, [0] * self.world_size
        send_counts[root] = counts[self.rank]
        if out is not None:
            recv_counts = list(counts)
        whole = block[:0] if out is None else out
        self._team.run(operations.all_to_all(block, whole, send_counts, recv_counts), deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """Scatter the root's blocks; UCC 1.1 does so by an all-to-all."""
        if not sum(counts):
            return
        if source is not None:
            block[...] = blocks(source, counts)[root]
        if self._context.library.has_gather:
            self._team.run(operations.scatter(block, source, counts, root), deadline)
            return
        recv_counts = [0] * self.world_size
        recv_counts[root] = counts[self.rank]
        whole, send_counts = (block[:0], [0] * self.world_size) if source is None else (source, counts)
        self._team.run(operations.all_to_all(whole, block, send_counts, recv_counts), deadline)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """Reduce, and keep this rank's block."""
        if source.size:
            self._reduce_blocks(source, out, counts, reduction, deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """Exchange a block with each rank."""
        self._team.run(operations.all_to_all(source, out, send_counts, recv_counts), deadline)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a group with a team of its own over the same connections.

        Raises:
            UnsupportedError: UCC cannot number so many groups.
        """
        if len(ranks) == 1:
            return SingleRankBackend(self.choice)
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
        self._team.abort.set()

    def close(self) -> None:
        """Release the team, and for the world the connections, if the other ranks close soon.

        After a failure the connections stay until the process ends, since other ranks may be gone.
        """
        if self._closed:
            return
        self._closed = True
        self._team.close()
        if self._owns:
            if self._team.abort.is_set():
                self._context.abandon(self._team)
            self._context.close()

    def _native(self, reduction: Reduction) -> UccReduction | None:
        """Return UCC's codes for a reduction; None if its result would not be the one that was asked for."""
        native = native_reduction(reduction)
        if native is not None and self.choice.deterministic and not native.exact:
            return None
        return native

    def _combine_all(self, buffer: Array, reduction: Reduction, deadline: float) -> None:
        """Gather every rank's `buffer`, and combine the contributions into it in order of rank."""
        counts = [buffer.size] * self.world_size
        gathered = np.empty(sum(counts), buffer.dtype)
        contributions = blocks(gathered, counts)
        contributions[self.rank][...] = buffer
        self._team.run(operations.all_gather(gathered, counts), deadline)
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
        contributions = np.empty(sum(own), source.dtype)
        self._team.run(operations.all_to_all(source, contributions, counts, own), deadline)
        if out.size:
            reduction.into(out, blocks(contributions, own), at_once=True)


def _refuse(op: str) -> NoReturn:
    raise UnsupportedError(
        f"{op}: UCC has collectives only, no messages between two ranks. Use a backend that has "
        "them, such as mpi or gloo, alone or for transfers beside ucc (HybridBackend)",
        op=op,
    )
