"""all_reduce and reduce of several hosts: inside each host, between hosts, inside again.

Costs are per host, with H hosts and m bytes: what crosses its link in each direction.
"""

from __future__ import annotations

import numpy as np

from ferro.collectives.partition import near_equal
from ferro.collectives.reduction import Reduction, reduction_for
from ferro.types import Array, ReduceOp
from ferro_gloo.hierarchy.levels import SLOTS, Levels, counts_of, nothing
from ferro_gloo.hierarchy.topology import by_leaders, number_of_blocks
from ferro_gloo.tcp.backend import TcpBackend


def partial_of(reduction: Reduction) -> Reduction:
    """Return how parts are reduced: a mean is a sum, to be finished once."""
    if reduction.op is ReduceOp.MEAN:
        return reduction_for(ReduceOp.SUM, reduction.dtype, reduction.ranks)
    return reduction


def all_reduce(levels: Levels, buffer: Array, reduction: Reduction, deadline: float) -> None:
    """Reduce in place: 2m(H-1)/H bytes, all rails at once.

        host 0              network                host 1
        reduce_scatter      rail 0: all_reduce     reduce_scatter
        all_gather          rail 1: all_reduce     all_gather

    A small array goes to the leader of each host, over rail 0, and back.

    Source: Träff & Hunold 2020, "Decomposing MPI collectives for exploiting multi-lane
        communication", the full-lane all-reduce; ours moves block after block, so that hosts
        and network work at the same time, and knows hosts of different sizes.
    """
    partial = partial_of(reduction)
    if by_leaders(buffer.nbytes):
        levels.local.reduce(buffer, partial, 0, deadline=deadline)
        if levels.rail is not None and levels.topology.place == 0:
            levels.rail.all_reduce(buffer, partial, deadline=deadline)
            reduction.finish(buffer)
        levels.local.broadcast(buffer, 0, deadline=deadline)
        return
    run = _InSlices(levels, buffer, partial, deadline)

    def network(number: int) -> None:
        assert levels.rail is not None, "the pipeline asks ranks on a rail only"
        piece = run.piece(number)
        levels.rail.all_reduce(piece, partial, deadline=deadline)
        reduction.finish(piece)

    def gather(number: int) -> None:
        parts = levels.slices(run.blocks[number])
        parts[levels.topology.place][...] = run.piece(number)
        levels.local.all_gather(run.blocks[number], counts_of(parts), deadline=deadline)

    levels.pipeline(len(run.blocks), run.reduce, network, nothing if levels.alone else gather)


def reduce(levels: Levels, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
    """Reduce in place at the root: m bytes into its host with two hosts, 2m(H-1)/H with more.

        host 0              network              host 1, with the root
        reduce_scatter      rail 0: reduce       reduce_scatter
                            rail 1: reduce       gather

    A small array goes by one rail, that of the root's place where there is one.
    """
    partial = partial_of(reduction)
    topology = levels.topology
    host, place = topology.home(root)
    at_home = topology.host == host
    if by_leaders(buffer.nbytes):
        agent = topology.agent(place)
        levels.local.reduce(buffer, partial, agent, deadline=deadline)
        if levels.rail is not None and topology.place == agent:
            levels.rail.reduce(buffer, partial, host, deadline=deadline)
            if at_home:
                reduction.finish(buffer)
        if at_home and agent != place:
            levels.local.broadcast(buffer, agent, deadline=deadline)
        return
    run = _InSlices(levels, buffer, partial, deadline)

    def network(number: int) -> None:
        assert levels.rail is not None, "the pipeline asks ranks on a rail only"
        piece = run.piece(number)
        _reduce_on(levels.rail, piece, partial, host, deadline)
        if at_home:
            reduction.finish(piece)

    def gather(number: int) -> None:
        whole = run.blocks[number] if topology.rank == root else None
        counts = counts_of(levels.slices(run.blocks[number]))
        levels.local.gather(run.piece(number), whole, counts, place, deadline=deadline)

    after = gather if at_home and not levels.alone else nothing
    levels.pipeline(len(run.blocks), run.reduce, network, after)


class _InSlices:
    """The first phase of both: each block is reduced on the host, a slice of it on every place.

    The slice is memory apart from the block: neighbours may still be reading theirs. On a rank
    that has its host for itself it is the block's own, and there is nothing to reduce.
    """

    def __init__(self, levels: Levels, buffer: Array, partial: Reduction, deadline: float) -> None:
        self.blocks = near_equal(buffer, number_of_blocks(buffer.nbytes))
        self._levels = levels
        self._partial = partial
        self._deadline = deadline
        largest = max((self._own(block) for block in self.blocks), key=np.size)
        self._pieces = [] if levels.alone else [np.empty_like(largest) for _ in range(SLOTS)]

    def piece(self, number: int) -> Array:
        """Return this rank's slice of a block."""
        own = self._own(self.blocks[number])
        return self._pieces[number % SLOTS][: own.size] if self._pieces else own

    def reduce(self, number: int) -> None:
        """Reduce a block over the host's ranks."""
        if self._levels.alone:
            return
        block = self.blocks[number]
        self._levels.local.reduce_scatter(
            block,
            self.piece(number),
            counts_of(self._levels.slices(block)),
            self._partial,
            deadline=self._deadline,
        )

    def _own(self, block: Array) -> Array:
        return self._levels.slices(block)[self._levels.topology.place]


def _reduce_on(
    rail: TcpBackend, piece: Array, partial: Reduction, root: int, deadline: float
) -> None:
    """Reduce on a rail: with more than two hosts, no link takes in more than twice the piece."""
    if rail.world_size == 2:
        rail.reduce(piece, partial, root, deadline=deadline)
        return
    chunks = near_equal(piece, rail.world_size)
    reduced = np.empty_like(chunks[rail.rank])
    counts = counts_of(chunks)
    rail.reduce_scatter(piece, reduced, counts, partial, deadline=deadline)
    whole = piece if rail.rank == root else None
    rail.gather(reduced, whole, counts, root, deadline=deadline)
