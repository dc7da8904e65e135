"""broadcast, all_gather and all_to_all of groups on several hosts."""

from __future__ import annotations

from collections.abc import Sequence

from ferro.collectives.partition import blocks, near_equal
from ferro.types import Array
from ferro_gloo.hierarchy.groups import HierarchyGroups, counts_of, no_phase
from ferro_gloo.hierarchy.host_blocks import HostBlocks
from ferro_gloo.hierarchy.topology import block_count, uses_leaders
from ferro_gloo.tcp.backend import TcpBackend

# Two ranks on different hosts exchange this many bytes at once, so no rank gets far ahead of the others.
_SEGMENT_BYTES = 4 << 20


def broadcast(groups: HierarchyGroups, buffer: Array, root: int, deadline: float) -> None:
    """Broadcast: m bytes leave the root's host with two hosts, 2m(H-1)/H with more.

        host 0, with the root     network               host 1
        broadcast                 rail 0: broadcast     all_gather
                                  rail 1: broadcast

    A small array goes over one rail: the root's, if it has one.
    """
    topology = groups.topology
    root_host, root_local_rank = topology.locate(root)
    on_root_host = topology.host_index == root_host
    if uses_leaders(buffer.nbytes):
        leader = topology.leader_for(root_local_rank)
        local_first = on_root_host and root_local_rank != leader
        if local_first:
            groups.local.broadcast(buffer, root_local_rank, deadline=deadline)
        if groups.rail is not None and topology.local_rank == leader:
            groups.rail.broadcast(buffer, root_host, deadline=deadline)
        if not local_first:
            groups.local.broadcast(buffer, leader, deadline=deadline)
        return
    pipeline_blocks = near_equal(buffer, block_count(buffer.nbytes))

    def spread(index: int) -> None:
        groups.local.broadcast(pipeline_blocks[index], root_local_rank, deadline=deadline)

    def network(index: int) -> None:
        assert groups.rail is not None, "the pipeline asks ranks on a rail only"
        own_slice = groups.own_slice(pipeline_blocks[index])
        _broadcast_on_rail(groups.rail, own_slice, root_host, deadline)

    def gather(index: int) -> None:
        counts = counts_of(groups.slices(pipeline_blocks[index]))
        groups.local.all_gather(pipeline_blocks[index], counts, deadline=deadline)

    before, after = (spread, no_phase) if on_root_host else (no_phase, gather)
    groups.run_pipeline(len(pipeline_blocks), before, network, after)


def _broadcast_on_rail(rail: TcpBackend, buffer: Array, root: int, deadline: float) -> None:
    """Broadcast on a rail; with more than two hosts, no link sends more than twice the buffer."""
    if rail.world_size == 2:
        rail.broadcast(buffer, root, deadline=deadline)
        return
    chunks = near_equal(buffer, rail.world_size)
    counts = counts_of(chunks)
    source = buffer if rail.rank == root else None
    rail.scatter(chunks[rail.rank], source, counts, root, deadline=deadline)
    rail.all_gather(buffer, counts, deadline=deadline)


def all_gather(groups: HierarchyGroups, buffer: Array, counts: Sequence[int], deadline: float) -> None:
    """Fill `buffer`, which holds this rank's block already.

        host 0                       network                       host 1
        all_gather of its blocks     rail 0: the first slice       all_gather of its blocks
        all_gather of the other's    rail 1: the second slice      all_gather of the other's

    Every byte crosses the network once to each other host. For a small array, the leaders exchange
    their hosts' blocks, and broadcast the result on their hosts.
    """
    topology = groups.topology
    hosts_blocks = [HostBlocks.of(buffer, counts, host) for host in topology.hosts]
    mine = hosts_blocks[topology.host_index]
    mine.pack()
    groups.local.all_gather(mine.packed, mine.counts, deadline=deadline)
    if uses_leaders(buffer.nbytes):
        if topology.local_rank == 0:
            wholes = [host_blocks.packed for host_blocks in hosts_blocks]
            groups.exchange_on_rail([mine.packed] * len(hosts_blocks), wholes, deadline)
            for host_blocks in hosts_blocks:
                host_blocks.unpack()
        groups.local.broadcast(buffer, 0, deadline=deadline)
        return
    count = block_count(buffer.nbytes)
    pipeline_blocks = [near_equal(host_blocks.packed, count) for host_blocks in hosts_blocks]

    def network(index: int) -> None:
        slices = [groups.own_slice(parts[index]) for parts in pipeline_blocks]
        groups.exchange_on_rail([slices[topology.host_index]] * len(slices), slices, deadline)

    def gather(index: int) -> None:
        for host in topology.other_hosts:
            block = pipeline_blocks[host][index]
            groups.local.all_gather(block, counts_of(groups.slices(block)), deadline=deadline)

    groups.run_pipeline(count, no_phase, network, no_phase if groups.is_alone else gather)
    for host_blocks in hosts_blocks:
        host_blocks.unpack()


def all_to_all(
    groups: HierarchyGroups,
    source: Array,
    out: Array,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    deadline: float,
) -> None:
    """Send block j of `source` to rank j; block i of `out` comes from rank i.

    Blocks for ranks on this host go through the local group while those for other hosts cross the
    network directly, since no algorithm could make them smaller. Ranks may differ in the size of
    `source`, and so in whether they do these two at the same time.
    """
    inter_host = _InterHostBlocks(groups, source, out, send_counts, recv_counts, deadline)
    small = uses_leaders(max(source.nbytes, out.nbytes))
    inter_host_work = None if small else groups.start_on_network_thread(inter_host.run)
    host_ranks = groups.topology.host_ranks
    sends = HostBlocks.of(source, send_counts, host_ranks)
    recvs = HostBlocks.of(out, recv_counts, host_ranks)
    sends.pack()
    groups.local.all_to_all(sends.packed, recvs.packed, sends.counts, recvs.counts, deadline=deadline)
    recvs.unpack()
    if inter_host_work is None:
        inter_host.run()
    else:
        inter_host_work.wait()


class _InterHostBlocks:
    """The blocks of an all_to_all that cross the network."""

    def __init__(
        self,
        groups: HierarchyGroups,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        deadline: float,
    ) -> None:
        n, rank = groups.flat.world_size, groups.flat.rank
        host_ranks = groups.topology.host_ranks
        after = ((rank + step) % n for step in range(1, n))
        self._peers = [peer for peer in after if peer not in host_ranks]
        self._flat = groups.flat
        self._sending = blocks(source, send_counts)
        self._receiving = blocks(out, recv_counts)
        self._length = max(1, _SEGMENT_BYTES // source.itemsize)
        self._deadline = deadline

    def run(self) -> None:
        """Exchange the blocks, a segment with every peer at a time."""
        moved = [*self._sending, *self._receiving]
        for start in range(0, max(1, *(block.size for block in moved)), self._length):
            sends = self._segments(self._sending, start)
            recvs = self._segments(self._receiving, start)
            if sends or recvs:
                self._flat.exchange(sends, recvs, tag=self._flat.tag, deadline=self._deadline)

    def _segments(self, rank_blocks: Sequence[Array], start: int) -> list[tuple[int, Array]]:
        """Slice a segment of each peer's block; a block's first segment may be empty."""
        return [
            (peer, rank_blocks[peer][start : start + self._length])
            for peer in self._peers
            if start == 0 or start < rank_blocks[peer].size
        ]
