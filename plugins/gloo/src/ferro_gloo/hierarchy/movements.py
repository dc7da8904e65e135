"""broadcast and all_to_all of several hosts."""

from __future__ import annotations

from collections.abc import Sequence

from ferro.collectives.partition import blocks, near_equal
from ferro.types import Array
from ferro_gloo.hierarchy.levels import Levels, counts_of, nothing
from ferro_gloo.hierarchy.regions import Region
from ferro_gloo.hierarchy.topology import by_leaders, number_of_blocks
from ferro_gloo.tcp.backend import TcpBackend

# What a pair of ranks on two hosts moves at once: no rank gets far ahead of the others.
_SEGMENT_BYTES = 4 << 20


def broadcast(levels: Levels, buffer: Array, root: int, deadline: float) -> None:
    """Fill `buffer` with the root's: m bytes out of its host with two hosts, 2m(H-1)/H with more.

        host 0, with the root     network               host 1
        broadcast                 rail 0: broadcast     all_gather
                                  rail 1: broadcast

    A small array goes by one rail, that of the root's place where there is one.
    """
    topology = levels.topology
    host, place = topology.home(root)
    at_home = topology.host == host
    if by_leaders(buffer.nbytes):
        agent = topology.agent(place)
        local_first = at_home and place != agent
        if local_first:
            levels.local.broadcast(buffer, place, deadline=deadline)
        if levels.rail is not None and topology.place == agent:
            levels.rail.broadcast(buffer, host, deadline=deadline)
        if not local_first:
            levels.local.broadcast(buffer, agent, deadline=deadline)
        return
    whole = near_equal(buffer, number_of_blocks(buffer.nbytes))

    def spread(number: int) -> None:
        levels.local.broadcast(whole[number], place, deadline=deadline)

    def network(number: int) -> None:
        assert levels.rail is not None, "the pipeline asks ranks on a rail only"
        piece = levels.slices(whole[number])[topology.place]
        _broadcast_on(levels.rail, piece, host, deadline)

    def gather(number: int) -> None:
        counts = counts_of(levels.slices(whole[number]))
        levels.local.all_gather(whole[number], counts, deadline=deadline)

    before, after = (spread, nothing) if at_home else (nothing, gather)
    levels.pipeline(len(whole), before, network, after)


def _broadcast_on(rail: TcpBackend, piece: Array, root: int, deadline: float) -> None:
    """Broadcast on a rail: with more than two hosts, no link sends more than twice the piece."""
    if rail.world_size == 2:
        rail.broadcast(piece, root, deadline=deadline)
        return
    chunks = near_equal(piece, rail.world_size)
    counts = counts_of(chunks)
    whole = piece if rail.rank == root else None
    rail.scatter(chunks[rail.rank], whole, counts, root, deadline=deadline)
    rail.all_gather(piece, counts, deadline=deadline)


def all_to_all(
    levels: Levels,
    source: Array,
    out: Array,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    deadline: float,
) -> None:
    """Send block j of `source` to rank j; block i of `out` comes from rank i.

    Blocks for ranks on this host go through it while those for others cross the network, each
    directly: no rank could make fewer bytes of them. Ranks may differ in the size of `source`,
    so they need not do these two in the same way.
    """
    far = _Far(levels, source, out, send_counts, recv_counts, deadline)
    small = by_leaders(max(source.nbytes, out.nbytes))
    crossing = None if small else levels.beside(far.run)
    neighbours = levels.topology.neighbours
    going = Region.of(source, send_counts, neighbours)
    coming = Region.of(out, recv_counts, neighbours)
    going.load()
    levels.local.all_to_all(
        going.whole, coming.whole, going.counts, coming.counts, deadline=deadline
    )
    coming.store()
    if crossing is None:
        far.run()
    else:
        crossing.wait()


class _Far:
    """The blocks of an all_to_all that cross the network."""

    def __init__(
        self,
        levels: Levels,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        deadline: float,
    ) -> None:
        n, rank = levels.flat.world_size, levels.flat.rank
        neighbours = levels.topology.neighbours
        after = ((rank + step) % n for step in range(1, n))
        self._peers = [peer for peer in after if peer not in neighbours]
        self._flat = levels.flat
        self._sending = blocks(source, send_counts)
        self._receiving = blocks(out, recv_counts)
        self._length = max(1, _SEGMENT_BYTES // source.itemsize)
        self._deadline = deadline

    def run(self) -> None:
        """Move them, a segment with every peer at a time."""
        moved = [*self._sending, *self._receiving]
        for start in range(0, max(1, *(block.size for block in moved)), self._length):
            sends = self._segments(self._sending, start)
            recvs = self._segments(self._receiving, start)
            if sends or recvs:
                self._flat.exchange(sends, recvs, tag=self._flat.tag, deadline=self._deadline)

    def _segments(self, everyones: Sequence[Array], start: int) -> list[tuple[int, Array]]:
        """Return what is left of each peer's block at `start`; the first may be empty."""
        return [
            (peer, everyones[peer][start : start + self._length])
            for peer in self._peers
            if start == 0 or start < everyones[peer].size
        ]
