"""Ring algorithms: every rank sends to its successor and receives from its predecessor.

They move the fewest bytes in the fewest messages at a time, so they suit large arrays: every link is busy in every
round, and the cost in bytes hardly depends on the number of ranks. With n > 2 ranks most chunks are not reduced in rank
order: chunk i starts on rank i+1 and goes round. They have no root, and ignore `root`.

Costs below are per rank, with n ranks and m bytes in all chunks together.
"""

from __future__ import annotations

from ferro.collectives.schedule import Recv, Round, Schedule, Send


def ring_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Reduce-scatter round the ring, then all-gather round it.

    2(n-1) rounds and messages, 2m(n-1)/n bytes: the least bandwidth possible. With 3 ranks:

        r1  0→1 [2]⊕  1→2 [0]⊕  2→0 [1]⊕
        r2  0→1 [1]⊕  1→2 [2]⊕  2→0 [0]⊕
        r3  0→1 [0]   1→2 [1]   2→0 [2]
        r4  0→1 [2]   1→2 [0]   2→0 [1]

    Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations". Ours ends the
        first half with chunk i on rank i (theirs: i+1), so that the two halves are the reduce_scatter and the
        all_gather below.
    """
    return Schedule(world_size, _reduce_scatter_rounds(rank, world_size) + gather_rounds(rank, world_size, first=rank))


def ring_reduce_scatter(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Pass partial sums on until chunk i reaches rank i: n-1 rounds and messages, m(n-1)/n bytes.

    Source: the bucket algorithm, Barnett et al. 1994, "Interprocessor collective communication library (InterCom)";
        Chan, Heimlich, Purkayastha & van de Geijn 2007, "Collective communication: theory, practice, and experience".
    """
    return Schedule(world_size, _reduce_scatter_rounds(rank, world_size))


def ring_all_gather(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Pass on the chunk that came last, starting with this rank's own: n-1 rounds and messages, m(n-1)/n bytes.

    Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH", section
        on allgather, the ring algorithm.
    """
    return Schedule(world_size, gather_rounds(rank, world_size, first=rank))


def gather_rounds(rank: int, world_size: int, *, first: int) -> tuple[Round, ...]:
    """Make the rounds of a ring all_gather in which this rank starts with chunk `first`.

    `first - rank` (modulo n) must be the same on all ranks.
    """
    return tuple(_round(rank, world_size, first - step, reduce=False) for step in range(world_size - 1))


def _reduce_scatter_rounds(rank: int, n: int) -> tuple[Round, ...]:
    return tuple(_round(rank, n, rank - step - 1, reduce=True) for step in range(n - 1))


def _round(rank: int, n: int, chunk: int, *, reduce: bool) -> Round:
    """Make a round that sends `chunk` (modulo n) to the successor, and receives the chunk before it."""
    sends = (Send((rank + 1) % n, (chunk % n,)),)
    return Round(sends, (Recv((rank - 1) % n, ((chunk - 1) % n,), reduce),))
