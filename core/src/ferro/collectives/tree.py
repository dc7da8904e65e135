"""Logarithmic algorithms: ceil(log2 n) rounds of a binomial tree, or of dissemination.

They suit rooted collectives over many ranks. A rank's place is its distance from the root,
place = (rank - root) mod n, and the tree is the same for all: in the round of span s, place p
(a multiple of 2s) and place p+s talk to each other, and p+s stands for places p+s … p+2s-1.

    place   0 ─┬─ 4 ─┬─ 6 ── 7      away from the root: spans 4, 2, 1
               │     └─ 5           to the root: spans 1, 2, 4
               ├─ 2 ── 3
               └─ 1

Ranks with nothing to do in a round have an empty one, so that round k is the same round on all.
Costs below have n ranks and m bytes in all chunks together; log is ceil(log2).

Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in
    MPICH", sections on broadcast and on reduce (the binomial tree algorithms for short messages);
    Chan, Heimlich, Purkayastha & van de Geijn 2007, "Collective communication: theory, practice,
    and experience", minimum-spanning-tree algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ferro.collectives.ring import gather_rounds
from ferro.collectives.schedule import Recv, Round, Schedule, Send


def tree_broadcast(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Every rank that has the array sends it to half of the ranks it stands for.

    log n rounds; the root sends log n messages, m log n bytes. With 4 ranks and root 0:

        r1  0→2 [0]
        r2  0→1 [0]  2→3 [0]
    """
    return Schedule(1, _rounds_from_root(rank, world_size, root, _everything))


def tree_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Pairs reduce, then pairs of pairs, up to the root.

    log n rounds; a rank sends one message of m bytes, the root receives log n of them. To root 0
    the operands stand in rank order, but are bracketed as the tree is; with 4 ranks
    (x0 op x1) op (x2 op x3):

        r1  1→0 [0]⊕  3→2 [0]⊕
        r2  2→0 [0]⊕
    """
    return Schedule(1, _rounds_to_root(rank, world_size, root, _everything, reduce=True))


def tree_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """`tree_reduce` to the root, then `tree_broadcast` from it; any root gives a right result.

    2 log n rounds; a rank sends at most log n messages of m bytes. For small arrays over many
    ranks, where `exchange_all_reduce` would send n-1 messages.
    """
    up = tree_reduce(rank, world_size, root)
    down = tree_broadcast(rank, world_size, root)
    return Schedule(1, up.rounds + down.rounds)


def tree_scatter(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Every rank hands on half of the chunks it has, to the rank that stands for their owners.

    log n rounds; the root sends log n messages, m(n-1)/n bytes. With 4 ranks and root 0:

        r1  0→2 [2-3]
        r2  0→1 [1]    2→3 [3]

    MPICH keeps the chunks in order of place in a temporary; ours names them by rank, so nothing
    is moved about.
    """
    return Schedule(world_size, _rounds_from_root(rank, world_size, root, _owned_by(world_size, root)))


def tree_gather(rank: int, world_size: int, root: int = 0) -> Schedule:
    """`tree_scatter` with the arrows and the order of the rounds turned round: the same cost."""
    chunks = _owned_by(world_size, root)
    return Schedule(world_size, _rounds_to_root(rank, world_size, root, chunks, reduce=False))


def scatter_ring_broadcast(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Scatter n chunks down the tree, then pass them round the ring.

    ceil(log2 n) + n-1 rounds; no rank sends more than about 2m(n-1)/n bytes, where a tree sends
    m log2(n) from its root. Chunk c is the one of the rank c places after the root. With 4 ranks
    and root 1:

        r1  1→3 [2-3]
        r2  1→2 [1]    3→0 [3]
        r3  0→1 [3]    1→2 [0]  2→3 [1]  3→0 [2]
        r4  0→1 [2]    1→2 [3]  2→3 [0]  3→0 [1]
        r5  0→1 [1]    1→2 [2]  2→3 [3]  3→0 [0]

    Source: van de Geijn's broadcast, Barnett et al. 1994, "Interprocessor collective
        communication library (InterCom)"; Thakur, Rabenseifner & Gropp 2005, "Optimization of
        collective communication operations in MPICH", section on broadcast. Like theirs, the ring
        sends again what inner ranks of the tree already have.
    """
    place = (rank - root) % world_size
    scatter = _rounds_from_root(rank, world_size, root, tuple)
    return Schedule(world_size, scatter + gather_rounds(rank, world_size, first=place))


def dissemination_barrier(rank: int, world_size: int, root: int = 0) -> Schedule:
    """In round k send to the rank 2**k places on, receive from the one 2**k places back.

    `root` is ignored. ceil(log2 n) rounds and messages, no bytes, for every n. With 3 ranks:

        r1  0→1 []  1→2 []  2→0 []
        r2  0→2 []  1→0 []  2→1 []

    Source: Hensgen, Finkel & Manber 1988, "Two algorithms for barrier synchronization", the
        dissemination algorithm. Theirs sets flags in shared memory; ours sends empty messages.
    """
    n = world_size
    distances = [1 << bit for bit in range((n - 1).bit_length())]
    return Schedule(0, tuple(_pass_rumour(rank, n, distance) for distance in distances))


def _rounds_from_root(
    rank: int, world_size: int, root: int, chunks: Callable[[range], tuple[int, ...]]
) -> tuple[Round, ...]:
    """The rounds of one rank when data flows from the root down the tree.

    Args:
        chunks: what to send down an edge, given the places that are below it.
    """
    edges = reversed(_edges(rank, world_size, root))
    return tuple(_round(edge, chunks, down=True, reduce=False) for edge in edges)


def _rounds_to_root(
    rank: int, n: int, root: int, chunks: Callable[[range], tuple[int, ...]], *, reduce: bool
) -> tuple[Round, ...]:
    """The rounds of one rank when data flows up the tree to the root."""
    edges = _edges(rank, n, root)
    return tuple(_round(edge, chunks, down=False, reduce=reduce) for edge in edges)


def _round(edge: _Edge | None, chunks: Callable[[range], tuple[int, ...]], *, down: bool, reduce: bool) -> Round:
    if edge is None:
        return Round()
    moved = chunks(edge.below)
    if edge.peer_is_below == down:
        return Round(sends=(Send(edge.peer, moved),))
    return Round(recvs=(Recv(edge.peer, moved, reduce),))


def _everything(below: range) -> tuple[int, ...]:
    """Down or up every edge goes the one chunk there is."""
    return (0,)


def _owned_by(n: int, root: int) -> Callable[[range], tuple[int, ...]]:
    """Down or up an edge go the chunks of the ranks at the places below it."""
    return lambda below: tuple((place + root) % n for place in below)


def _pass_rumour(rank: int, n: int, distance: int) -> Round:
    return Round(sends=(Send((rank + distance) % n, ()),), recvs=(Recv((rank - distance) % n, ()),))


@dataclass(frozen=True, slots=True)
class _Edge:
    """The edge of the tree that a rank uses in one round, seen from that rank."""

    peer: int
    peer_is_below: bool
    below: range


def _edges(rank: int, n: int, root: int) -> list[_Edge | None]:
    """This rank's edges for spans 1, 2, 4, …; None where it has nothing to do."""
    spans = [1 << bit for bit in range((n - 1).bit_length())]
    return [_edge(rank, n, root, span) for span in spans]


def _edge(rank: int, n: int, root: int, span: int) -> _Edge | None:
    place = (rank - root) % n
    offset = place % (2 * span)
    upper = place - offset
    lower = upper + span
    if offset not in (0, span) or lower >= n:
        return None
    peer_place = lower if offset == 0 else upper
    return _Edge((peer_place + root) % n, offset == 0, range(lower, min(lower + span, n)))
