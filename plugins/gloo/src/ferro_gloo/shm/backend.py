"""ShmBackend: the collectives of ranks on one host, through memory that they share.

Everything is reduced in order of rank, so results are the same bits on every rank, and the same
with and without `deterministic=True`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ferro.backend import Backend
from ferro.collectives.label import Call
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.arena import Arenas
from ferro_gloo.shm.movements import Movements
from ferro_gloo.shm.operation import Runner
from ferro_gloo.shm.reductions import Reductions
from ferro_gloo.shm.region import Region
from ferro_gloo.shm.small import Small
from ferro_gloo.shm.stream import Stream
from ferro_gloo.tcp.backend import TcpBackend

# Up to so much in all ranks' arrays together each rank reduces it all, in one round; beyond, each
# reduces its part and shows the result, in two. Measured with 4 ranks on 2 cores: 256 KiB take
# 72 us in one round, 100 in two.
_REDUCED_BY_ALL_BYTES = 1 << 20


class ShmBackend(Backend):
    """One rank of a group whose ranks share a region.

    Args:
        region: the memory.
        part: the same ranks over TCP, for transfers, and where the loss of a rank shows.
        arenas: where arrays are that can be used in place.
    """

    labels_frames = True

    def __init__(self, region: Region, part: TcpBackend, arenas: Arenas) -> None:
        super().__init__(part.rank, part.world_size, part.choice)
        self._part = part
        self._stream = Stream(region, part)
        runner = Runner(region, self._stream, part, arenas)
        rank, ranks, slot_bytes = part.rank, part.world_size, region.slot_bytes
        self._small = Small(region, self._stream, rank)
        self._movements = Movements(runner, rank, ranks, slot_bytes)
        self._reductions = Reductions(runner, rank, ranks, slot_bytes)
        self._most_bytes = slot_bytes
        self._most_reduced = min(slot_bytes, _REDUCED_BY_ALL_BYTES // ranks)

    def begin(self, call: Call) -> None:
        """Begin a collective: its first chunk will carry this call's label."""
        self.call = call
        self._stream.begin(call)

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`: every operation begins with a round in which labels are compared."""
        self.begin(call)

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`."""
        self._small.barrier(deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        way = self._small if buffer.nbytes <= self._most_reduced else self._reductions
        way.all_reduce(buffer, reduction, deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        way = self._small if buffer.nbytes <= self._most_bytes else self._reductions
        way.reduce(buffer, reduction, root, deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        way = self._small if buffer.nbytes <= self._most_bytes else self._movements
        way.broadcast(buffer, root, deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        if buffer.nbytes <= self._most_bytes and _even(counts):
            self._small.all_gather(buffer, deadline)
        else:
            self._movements.all_gather(buffer, counts, deadline)

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float
    ) -> None:
        """See `Backend.gather`."""
        if block.nbytes <= self._most_bytes and _even(counts):
            self._small.gather(block, out, deadline)
        else:
            self._movements.gather(block, out, counts, root, deadline)

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
        if sum(counts) * block.itemsize <= self._most_bytes and _even(counts):
            self._small.scatter(block, source, root, deadline)
        else:
            self._movements.scatter(block, source, counts, root, deadline)

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
        if source.nbytes <= self._most_bytes and _even(counts):
            self._small.reduce_scatter(source, out, reduction, deadline)
        else:
            self._reductions.reduce_scatter(source, out, counts, reduction, deadline)

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
        small = source.nbytes <= self._most_bytes and _even([*send_counts, *recv_counts])
        if not (small and self._small.all_to_all(source, out, deadline)):
            self._movements.all_to_all(source, out, send_counts, recv_counts, deadline, met=small)

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`; over TCP."""
        self._part.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`; over TCP."""
        self._part.recv(buffer, peer, tag=tag, deadline=deadline)

    def abort(self) -> None:
        """See `Backend.abort`."""
        self._stream.give_up()
        self._part.abort()

    def close(self) -> None:
        """Do nothing: the memory is released when nobody uses it any more."""


def _even(counts: Sequence[int]) -> bool:
    return counts.count(counts[0]) == len(counts)
