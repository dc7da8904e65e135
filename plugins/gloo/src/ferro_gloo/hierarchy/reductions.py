"""all_reduce, reduce and reduce_scatter of groups on several hosts.

A cost is the number of bytes that cross a host's link in each direction, with H hosts and arrays of m bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.collectives.partition import blocks, near_equal
from ferro.collectives.reduction import Reduction, reduction_for
from ferro.types import Array, ReduceOp
from ferro_gloo.hierarchy.groups import BLOCKS_IN_FLIGHT, HierarchyGroups, counts_of, no_phase
from ferro_gloo.hierarchy.host_blocks import HostBlocks
from ferro_gloo.hierarchy.topology import block_count, uses_leaders
from ferro_gloo.tcp.backend import TcpBackend


def all_reduce(groups: HierarchyGroups, buffer: Array, reduction: Reduction, deadline: float) -> None:
    """Reduce in place: 2m(H-1)/H bytes, on all rails at once.

        host 0              network                host 1
        reduce_scatter      rail 0: all_reduce     reduce_scatter
        all_gather          rail 1: all_reduce     all_gather

    For a small array, the leaders reduce over rail 0, and broadcast on their hosts.

    Source: Träff & Hunold 2020, "Decomposing MPI collectives for exploiting multi-lane
        communication", the full-lane all-reduce; ours moves block after block, so that hosts
        and network work at the same time, and allows hosts of different sizes.
    """
    partial = partial_reduction(reduction)
    if uses_leaders(buffer.nbytes):
        groups.local.reduce(buffer, partial, 0, deadline=deadline)
        if groups.rail is not None and groups.topology.local_rank == 0:
            groups.rail.all_reduce(buffer, partial, deadline=deadline)
            reduction.finish(buffer)
        groups.local.broadcast(buffer, 0, deadline=deadline)
        return
    run = _SlicedReduction(groups, buffer, partial, deadline)

    def network(index: int) -> None:
        assert groups.rail is not None, "the pipeline asks ranks on a rail only"
        own_slice = run.reduced_slice(index)
        groups.rail.all_reduce(own_slice, partial, deadline=deadline)
        reduction.finish(own_slice)

    def gather(index: int) -> None:
        parts = groups.slices(run.blocks[index])
        parts[groups.topology.local_rank][...] = run.reduced_slice(index)
        groups.local.all_gather(run.blocks[index], counts_of(parts), deadline=deadline)

    groups.run_pipeline(len(run.blocks), run.reduce, network, no_phase if groups.is_alone else gather)


def reduce(groups: HierarchyGroups, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
    """Reduce in place at the root: m bytes into its host with two hosts, 2m(H-1)/H with more.

        host 0              network              host 1, with the root
        reduce_scatter      rail 0: reduce       reduce_scatter
                            rail 1: reduce       gather

    A small array goes over one rail: the root's, if it has one.
    """
    partial = partial_reduction(reduction)
    topology = groups.topology
    root_host, root_local_rank = topology.locate(root)
    on_root_host = topology.host_index == root_host
    if uses_leaders(buffer.nbytes):
        leader = topology.leader_for(root_local_rank)
        groups.local.reduce(buffer, partial, leader, deadline=deadline)
        if groups.rail is not None and topology.local_rank == leader:
            groups.rail.reduce(buffer, partial, root_host, deadline=deadline)
            if on_root_host:
                reduction.finish(buffer)
        if on_root_host and leader != root_local_rank:
            groups.local.broadcast(buffer, leader, deadline=deadline)
        return
    run = _SlicedReduction(groups, buffer, partial, deadline)

    def network(index: int) -> None:
        assert groups.rail is not None, "the pipeline asks ranks on a rail only"
        own_slice = run.reduced_slice(index)
        _reduce_on_rail(groups.rail, own_slice, partial, root_host, deadline)
        if on_root_host:
            reduction.finish(own_slice)

    def gather(index: int) -> None:
        whole = run.blocks[index] if topology.rank == root else None
        counts = counts_of(groups.slices(run.blocks[index]))
        groups.local.gather(run.reduced_slice(index), whole, counts, root_local_rank, deadline=deadline)

    after = gather if on_root_host and not groups.is_alone else no_phase
    groups.run_pipeline(len(run.blocks), run.reduce, network, after)


class _SlicedReduction:
    """The first phase of all_reduce and reduce: the ranks of a host reduce each block, one slice per local rank.

    A reduced slice has memory of its own, because other ranks may still read the block. On a host
    with a single rank it is the slice of the block, and there is nothing to reduce.
    """

    def __init__(self, groups: HierarchyGroups, buffer: Array, partial: Reduction, deadline: float) -> None:
        self.blocks = near_equal(buffer, block_count(buffer.nbytes))
        self._groups = groups
        self._partial = partial
        self._deadline = deadline
        largest = max((self._groups.own_slice(block) for block in self.blocks), key=np.size)
        self._slices = [] if groups.is_alone else [np.empty_like(largest) for _ in range(BLOCKS_IN_FLIGHT)]

    def reduced_slice(self, index: int) -> Array:
        """Get the memory of this rank's reduced slice of a block."""
        own = self._groups.own_slice(self.blocks[index])
        return self._slices[index % BLOCKS_IN_FLIGHT][: own.size] if self._slices else own

    def reduce(self, index: int) -> None:
        """Reduce a block over the host's ranks."""
        if self._groups.is_alone:
            return
        block = self.blocks[index]
        self._groups.local.reduce_scatter(
            block,
            self.reduced_slice(index),
            counts_of(self._groups.slices(block)),
            self._partial,
            deadline=self._deadline,
        )


def _reduce_on_rail(rail: TcpBackend, buffer: Array, partial: Reduction, root: int, deadline: float) -> None:
    """Reduce on a rail; with more than two hosts, no link receives more than twice the buffer."""
    if rail.world_size == 2:
        rail.reduce(buffer, partial, root, deadline=deadline)
        return
    chunks = near_equal(buffer, rail.world_size)
    reduced = np.empty_like(chunks[rail.rank])
    counts = counts_of(chunks)
    rail.reduce_scatter(buffer, reduced, counts, partial, deadline=deadline)
    whole = buffer if rail.rank == root else None
    rail.gather(reduced, whole, counts, root, deadline=deadline)


def reduce_scatter(
    groups: HierarchyGroups, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, deadline: float
) -> None:
    """Reduce `source`, which is not changed; put this rank's block into `out`.

        host 0                       network                 host 1
        reduce_scatter of            rail 0, rail 1:         reduce_scatter of
        both hosts' blocks           partial results of      both hosts' blocks
        all_gather of its blocks     the other's blocks      all_gather of its blocks

    Contributions are combined in order of hosts. For a small array, the leaders reduce everything, and scatter the
    result on their hosts.
    """
    if uses_leaders(source.nbytes):
        _reduce_scatter_by_leaders(groups, source, out, counts, reduction, deadline)
        return
    run = _SlicedReduceScatter(groups, source, out, counts, reduction, deadline)
    after = no_phase if groups.is_alone else run.gather
    groups.run_pipeline(run.count, run.reduce, run.exchange, after)
    run.finish()


def _reduce_scatter_by_leaders(
    groups: HierarchyGroups, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, deadline: float
) -> None:
    topology, partial = groups.topology, partial_reduction(reduction)
    scratch = source.copy()
    groups.local.reduce(scratch, partial, 0, deadline=deadline)
    hosts_blocks = [HostBlocks.of(scratch, counts, host) for host in topology.hosts]
    mine = hosts_blocks[topology.host_index]
    if topology.local_rank == 0:
        for host_blocks in hosts_blocks:
            host_blocks.pack()
        operands = [np.empty_like(mine.packed) for _ in hosts_blocks]
        operands[topology.host_index] = mine.packed
        groups.exchange_on_rail([host_blocks.packed for host_blocks in hosts_blocks], operands, deadline)
        partial.combine(operands, topology.host_index, at_once=False)
        reduction.finish(mine.packed)
    whole = mine.packed if topology.local_rank == 0 else None
    groups.local.scatter(out, whole, mine.counts, 0, deadline=deadline)


class _SlicedReduceScatter:
    """A large reduce_scatter, block by block.

    Every host's blocks, packed, are cut into pipeline blocks. The ranks of this host reduce each of
    them, a slice on every local rank. This rank sends its slice of another host's block; it keeps
    that of its own host's in `result`, and adds those of the other hosts to it. When all are done,
    `result` is gathered on the host, and this rank takes its block. On a host with a single rank
    `result` is `out`.
    """

    def __init__(
        self,
        groups: HierarchyGroups,
        source: Array,
        out: Array,
        counts: Sequence[int],
        reduction: Reduction,
        deadline: float,
    ) -> None:
        topology = groups.topology
        self.count = block_count(source.nbytes)
        self._groups = groups
        self._out = out
        self._reduction = reduction
        self._partial = partial_reduction(reduction)
        self._deadline = deadline
        hosts_blocks = [HostBlocks.of(source, counts, host) for host in topology.hosts]
        for host_blocks in hosts_blocks:
            host_blocks.pack()
        self._counts = hosts_blocks[topology.host_index].counts
        self._blocks_by_host = [near_equal(host_blocks.packed, self.count) for host_blocks in hosts_blocks]
        self._result = out if groups.is_alone else np.empty(sum(self._counts), source.dtype)
        self._result_blocks = near_equal(self._result, self.count)
        hosts = len(hosts_blocks)
        longest = max(
            self._groups.own_slice(block).size for pipeline_blocks in self._blocks_by_host for block in pipeline_blocks
        )
        self._outgoing = np.empty((0 if groups.is_alone else BLOCKS_IN_FLIGHT, hosts, longest), source.dtype)
        self._incoming = np.empty((hosts, longest), source.dtype)

    def reduce(self, index: int) -> None:
        """Reduce one pipeline block of every host over the ranks of this host."""
        if self._groups.is_alone:
            own_blocks = self._blocks_by_host[self._groups.topology.host_index]
            self._result_blocks[index][...] = own_blocks[index]
            return
        for host, pipeline_blocks in enumerate(self._blocks_by_host):
            self._groups.local.reduce_scatter(
                pipeline_blocks[index],
                self._reduced_slice(host, index),
                counts_of(self._groups.slices(pipeline_blocks[index])),
                self._partial,
                deadline=self._deadline,
            )

    def exchange(self, index: int) -> None:
        """Send the other hosts their slices; add the slices from them to this host's."""
        slices = [self._reduced_slice(host, index) for host in range(len(self._blocks_by_host))]
        mine = self._groups.topology.host_index
        operands = [memory[: slices[mine].size] for memory in self._incoming]
        operands[mine] = slices[mine]
        self._groups.exchange_on_rail(slices, operands, self._deadline)
        self._partial.combine(operands, mine, at_once=False)
        self._reduction.finish(slices[mine])

    def gather(self, index: int) -> None:
        """Gather the slices of this host's pipeline block on all its ranks."""
        block = self._result_blocks[index]
        counts = counts_of(self._groups.slices(block))
        self._groups.local.all_gather(block, counts, deadline=self._deadline)

    def finish(self) -> None:
        """Copy this rank's block of the result into `out`."""
        if not self._groups.is_alone:
            self._out[...] = blocks(self._result, self._counts)[self._groups.topology.local_rank]

    def _reduced_slice(self, host: int, index: int) -> Array:
        """Get the memory of this rank's reduced slice of a host's pipeline block."""
        if host == self._groups.topology.host_index:
            return self._groups.own_slice(self._result_blocks[index])
        own = self._groups.own_slice(self._blocks_by_host[host][index])
        if self._groups.is_alone:
            return own
        own_slice: Array = self._outgoing[index % BLOCKS_IN_FLIGHT, host, : own.size]
        return own_slice


def partial_reduction(reduction: Reduction) -> Reduction:
    """Return the reduction for partial results: a mean is computed as a sum, and divided at the end."""
    if reduction.op is ReduceOp.MEAN:
        return reduction_for(ReduceOp.SUM, reduction.dtype, reduction.ranks)
    return reduction
