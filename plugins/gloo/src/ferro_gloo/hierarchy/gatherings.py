"""all_gather and reduce_scatter of several hosts: one is the other backwards.

What belongs to a host is a region. Every byte of it crosses the network once to each other host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.collectives.partition import blocks, near_equal
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.hierarchy.levels import SLOTS, Levels, counts_of, nothing
from ferro_gloo.hierarchy.reductions import partial_of
from ferro_gloo.hierarchy.regions import Region
from ferro_gloo.hierarchy.topology import by_leaders, number_of_blocks


def all_gather(levels: Levels, buffer: Array, counts: Sequence[int], deadline: float) -> None:
    """Fill `buffer`, in which this rank's block is in its place.

        host 0                       network                host 1
        all_gather region 0          rail 0: both regions'  all_gather region 1
                                     first slices
        all_gather region 1          rail 1: the second     all_gather region 0

    Of a small array the leaders swap whole regions and broadcast the result.
    """
    topology = levels.topology
    regions = [Region.of(buffer, counts, host) for host in topology.hosts]
    mine = regions[topology.host]
    mine.load()
    levels.local.all_gather(mine.whole, mine.counts, deadline=deadline)
    if by_leaders(buffer.nbytes):
        if topology.place == 0:
            wholes = [region.whole for region in regions]
            _swap(levels, [mine.whole] * len(regions), wholes, deadline)
            _store(regions)
        levels.local.broadcast(buffer, 0, deadline=deadline)
        return
    count = number_of_blocks(buffer.nbytes)
    cut = [near_equal(region.whole, count) for region in regions]

    def network(number: int) -> None:
        pieces = [levels.slices(parts[number])[topology.place] for parts in cut]
        _swap(levels, [pieces[topology.host]] * len(pieces), pieces, deadline)

    def gather(number: int) -> None:
        for host in topology.others:
            block = cut[host][number]
            levels.local.all_gather(block, counts_of(levels.slices(block)), deadline=deadline)

    levels.pipeline(count, nothing, network, nothing if levels.alone else gather)
    _store(regions)


def reduce_scatter(
    levels: Levels,
    source: Array,
    out: Array,
    counts: Sequence[int],
    reduction: Reduction,
    deadline: float,
) -> None:
    """Reduce `source`, which is not changed; put this rank's block into `out`.

        host 0                       network                host 1
        reduce_scatter both regions  rail 0, rail 1:        reduce_scatter both regions
        all_gather region 0          partial results of     all_gather region 1
                                     the other's region

    Contributions are combined in order of hosts. Of a small array the leaders have all, and
    scatter the result.
    """
    if by_leaders(source.nbytes):
        _reduce_scatter_by_leaders(levels, source, out, counts, reduction, deadline)
        return
    run = _ScatterInSlices(levels, source, out, counts, reduction, deadline)
    after = nothing if levels.alone else run.gather
    levels.pipeline(run.count, run.reduce, run.swap, after)
    run.end()


def _reduce_scatter_by_leaders(
    levels: Levels,
    source: Array,
    out: Array,
    counts: Sequence[int],
    reduction: Reduction,
    deadline: float,
) -> None:
    topology, partial = levels.topology, partial_of(reduction)
    scratch = source.copy()
    levels.local.reduce(scratch, partial, 0, deadline=deadline)
    regions = [Region.of(scratch, counts, host) for host in topology.hosts]
    mine = regions[topology.host]
    if topology.place == 0:
        for region in regions:
            region.load()
        operands = [np.empty_like(mine.whole) for _ in regions]
        operands[topology.host] = mine.whole
        _swap(levels, [region.whole for region in regions], operands, deadline)
        partial.combine(operands, topology.host, at_once=False)
        reduction.finish(mine.whole)
    whole = mine.whole if topology.place == 0 else None
    levels.local.scatter(out, whole, mine.counts, 0, deadline=deadline)


class _ScatterInSlices:
    """A large reduce_scatter, block by block.

    Of each block of another host's region this rank reduces its slice over the host, to be sent;
    of its own host's, into `held`, where the other hosts' are added. When all blocks are there,
    its own part of `held` is the result: `held` is `out` where it has its host for itself.
    """

    def __init__(
        self,
        levels: Levels,
        source: Array,
        out: Array,
        counts: Sequence[int],
        reduction: Reduction,
        deadline: float,
    ) -> None:
        topology = levels.topology
        self.count = number_of_blocks(source.nbytes)
        self._levels = levels
        self._out = out
        self._reduction = reduction
        self._partial = partial_of(reduction)
        self._deadline = deadline
        regions = [Region.of(source, counts, host) for host in topology.hosts]
        for region in regions:
            region.load()
        self._counts = regions[topology.host].counts
        self._cut = [near_equal(region.whole, self.count) for region in regions]
        self._held = out if levels.alone else np.empty(sum(self._counts), source.dtype)
        self._held_cut = near_equal(self._held, self.count)
        hosts = len(regions)
        longest = max(self._own(block).size for cut in self._cut for block in cut)
        self._outgoing = np.empty((0 if levels.alone else SLOTS, hosts, longest), source.dtype)
        self._incoming = np.empty((hosts, longest), source.dtype)

    def reduce(self, number: int) -> None:
        """Reduce a block of every region over this host."""
        if self._levels.alone:
            self._held_cut[number][...] = self._cut[self._levels.topology.host][number]
            return
        for host, cut in enumerate(self._cut):
            self._levels.local.reduce_scatter(
                cut[number],
                self._piece(host, number),
                counts_of(self._levels.slices(cut[number])),
                self._partial,
                deadline=self._deadline,
            )

    def swap(self, number: int) -> None:
        """Give the other hosts what is theirs; add what they have for this one."""
        pieces = [self._piece(host, number) for host in range(len(self._cut))]
        mine = self._levels.topology.host
        operands = [memory[: pieces[mine].size] for memory in self._incoming]
        operands[mine] = pieces[mine]
        _swap(self._levels, pieces, operands, self._deadline)
        self._partial.combine(operands, mine, at_once=False)
        self._reduction.finish(pieces[mine])

    def gather(self, number: int) -> None:
        """Bring the slices of this host's region together."""
        held = self._held_cut[number]
        counts = counts_of(self._levels.slices(held))
        self._levels.local.all_gather(held, counts, deadline=self._deadline)

    def end(self) -> None:
        """Keep this rank's block."""
        if not self._levels.alone:
            self._out[...] = blocks(self._held, self._counts)[self._levels.topology.place]

    def _piece(self, host: int, number: int) -> Array:
        """Return this rank's slice of a block, as reduced over this host."""
        if host == self._levels.topology.host:
            return self._own(self._held_cut[number])
        own = self._own(self._cut[host][number])
        if self._levels.alone:
            return own
        piece: Array = self._outgoing[number % SLOTS, host, : own.size]
        return piece

    def _own(self, block: Array) -> Array:
        return self._levels.slices(block)[self._levels.topology.place]


def _swap(
    levels: Levels, sending: Sequence[Array], receiving: Sequence[Array], deadline: float
) -> None:
    """On this rank's rail, send every other host its array and receive one from it."""
    rail = levels.rail
    assert rail is not None, "only ranks on a rail talk to other hosts"
    others = levels.topology.others
    rail.exchange(
        [(host, sending[host]) for host in others],
        [(host, receiving[host]) for host in others],
        tag=rail.tag,
        deadline=deadline,
    )


def _store(regions: Sequence[Region]) -> None:
    for region in regions:
        region.store()
