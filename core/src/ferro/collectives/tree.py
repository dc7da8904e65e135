"""Logarithmic algorithms: ceil(log2 n) rounds of a binomial tree, or of dissemination.

They suit rooted collectives over many ranks. The relative rank of a rank is (rank - root) mod n, and the tree is the
same for all roots: in the round of span s, relative rank p (a multiple of 2s) and p+s talk to each other, and p+s is
the root of the subtree of relative ranks p+s … p+2s-1.

    relative rank   0 ─┬─ 4 ─┬─ 6 ── 7      away from the root: spans 4, 2, 1
                       │     └─ 5           to the root: spans 1, 2, 4
                       ├─ 2 ── 3
                       └─ 1

Ranks with nothing to do in a round have an empty one, so that round k is the same round on all. Costs below have n
ranks and m bytes in all chunks together; log is ceil(log2).

Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH", sections on
    broadcast and on reduce (the binomial tree algorithms for short messages); Chan, Heimlich, Purkayastha & van de
    Geijn 2007, "Collective communication: theory, practice, and experience", minimum-spanning-tree algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ferro.collectives.ring import gather_rounds
from ferro.collectives.schedule import Recv, Round, Schedule, Send

_SubtreeChunks: TypeAlias = Callable[[range], tuple[int, ...]]
"""A function that lists the chunks to move along the edge above a subtree, given its relative ranks."""


def tree_broadcast(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send the whole buffer from the root down the tree.

    log n rounds; the root sends log n messages, m log n bytes. With 4 ranks and root 0:

        r1  0→2 [0]
        r2  0→1 [0]  2→3 [0]
    """
    return Schedule(1, _rounds(rank, world_size, root, lambda subtree: (0,), to_root=False))


def tree_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Reduce the whole buffer up the tree to the root.

    log n rounds; a rank sends one message of m bytes, the root receives log n of them. To root 0 the operands stand in
    rank order, but are bracketed as the tree is; with 4 ranks (x0 op x1) op (x2 op x3):

        r1  1→0 [0]⊕  3→2 [0]⊕
        r2  2→0 [0]⊕
    """
    return Schedule(1, _rounds(rank, world_size, root, lambda subtree: (0,), to_root=True, reduce=True))


def tree_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Run `tree_reduce` to the root, then `tree_broadcast` from it; any root gives a right result.

    2 log n rounds; a rank sends at most log n messages of m bytes. It suits small arrays over many ranks, where
    `exchange_all_reduce` would send n-1 messages.
    """
    reduce, broadcast = tree_reduce(rank, world_size, root), tree_broadcast(rank, world_size, root)
    return Schedule(1, reduce.rounds + broadcast.rounds)


def tree_scatter(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send each subtree the chunks of its ranks.

    log n rounds; the root sends log n messages, m(n-1)/n bytes. With 4 ranks and root 0:

        r1  0→2 [2-3]
        r2  0→1 [1]    2→3 [3]

    MPICH keeps the chunks in order of relative rank in a temporary; ours names them by rank, so no chunk is copied.
    """
    return Schedule(world_size, _rounds(rank, world_size, root, _own_chunks(world_size, root), to_root=False))


def tree_gather(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Run `tree_scatter` with the arrows and the order of the rounds reversed, at the same cost."""
    return Schedule(world_size, _rounds(rank, world_size, root, _own_chunks(world_size, root), to_root=True))


def scatter_ring_broadcast(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Scatter n chunks down the tree, then gather them round the ring.

    ceil(log2 n) + n-1 rounds; no rank sends more than about 2m(n-1)/n bytes, where a tree sends m log2(n) from its
    root. Chunk c is that of relative rank c. With 4 ranks and root 1:

        r1  1→3 [2-3]
        r2  1→2 [1]    3→0 [3]
        r3  0→1 [3]    1→2 [0]  2→3 [1]  3→0 [2]
        r4  0→1 [2]    1→2 [3]  2→3 [0]  3→0 [1]
        r5  0→1 [1]    1→2 [2]  2→3 [3]  3→0 [0]

    Source: van de Geijn's broadcast, Barnett et al. 1994, "Interprocessor collective communication library
        (InterCom)"; Thakur, Rabenseifner & Gropp 2005, section on broadcast. Like theirs, the ring sends again chunks
        that inner ranks of the tree already have.
    """
    scatter = _rounds(rank, world_size, root, tuple, to_root=False)
    return Schedule(world_size, scatter + gather_rounds(rank, world_size, first=(rank - root) % world_size))


def dissemination_barrier(rank: int, world_size: int, root: int = 0) -> Schedule:
    """In round k send to the rank 2**k after this one, and receive from the rank 2**k before it; `root` is ignored.

    ceil(log2 n) rounds and messages, no bytes, for every n. With 3 ranks:

        r1  0→1 []  1→2 []  2→0 []
        r2  0→2 []  1→0 []  2→1 []

    Source: Hensgen, Finkel & Manber 1988, "Two algorithms for barrier synchronization", the dissemination algorithm.
        Theirs sets flags in shared memory; ours sends empty messages.
    """
    n = world_size
    rounds = [Round((Send((rank + span) % n, ()),), (Recv((rank - span) % n, ()),)) for span in _spans(n)]
    return Schedule(0, tuple(rounds))


def _rounds(
    rank: int, n: int, root: int, chunks: _SubtreeChunks, *, to_root: bool, reduce: bool = False
) -> tuple[Round, ...]:
    spans = _spans(n) if to_root else reversed(_spans(n))
    return tuple(_round(rank, n, root, span, chunks, to_root, reduce) for span in spans)


def _spans(n: int) -> list[int]:
    return [1 << bit for bit in range((n - 1).bit_length())]


def _round(rank: int, n: int, root: int, span: int, chunks: _SubtreeChunks, to_root: bool, reduce: bool) -> Round:
    """Make the round of one rank in which subtrees of `span` ranks talk to their parents."""
    relative = (rank - root) % n
    offset = relative % (2 * span)
    parent = relative - offset
    child = parent + span
    if offset not in (0, span) or child >= n:
        return Round()
    moved = chunks(range(child, min(child + span, n)))
    is_parent = offset == 0
    peer = ((child if is_parent else parent) + root) % n
    if is_parent != to_root:
        return Round(sends=(Send(peer, moved),))
    return Round(recvs=(Recv(peer, moved, reduce),))


def _own_chunks(n: int, root: int) -> _SubtreeChunks:
    return lambda subtree: tuple((relative + root) % n for relative in subtree)
