"""Direct algorithms: every rank talks to every other in one round, or two.

They take the fewest rounds, and reduce in rank order whatever the world size, since every chunk is reduced from single
contributions. They send the most messages, n-1 per rank and round, so they suit few ranks or small arrays. Each rank
starts with its successor, so that no rank is everybody's first target. Algorithms without a root ignore `root`.

Costs below are per rank, with n ranks and m bytes in all chunks together. "Thakur 2005" is Thakur, Rabenseifner &
Gropp 2005, "Optimization of collective communication operations in MPICH".
"""

from __future__ import annotations

from collections.abc import Callable

from ferro.collectives.schedule import Recv, Round, Schedule, Send


def direct_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Reduce chunk i on rank i, which then sends it to all others.

    Two rounds, 2(n-1) messages, 2m(n-1)/n bytes: the least bandwidth possible. With 3 ranks:

        r1  0→1 [1]⊕  0→2 [2]⊕  1→0 [0]⊕  1→2 [2]⊕  2→0 [0]⊕  2→1 [1]⊕
        r2  0→1 [0]   0→2 [0]   1→0 [1]   1→2 [1]   2→0 [2]   2→1 [2]

    Source: Rabenseifner's decomposition into reduce_scatter and all_gather (Thakur 2005, section on reduce and
        allreduce). Theirs halves and doubles over log2(n) rounds; ours takes one round for each half, which keeps the
        order of ranks.
    """
    return _schedule(world_size, _reduce_scatter_round(rank, world_size), _all_gather_round(rank, world_size))


def exchange_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send the whole buffer to all others, and reduce all buffers here.

    One round, n-1 messages, m(n-1) bytes: one latency, for small arrays.

    Source: the latency-optimal end of the trade-off in Bruck et al. 1997, "Efficient algorithms for all-to-all
        communications in multiport message-passing systems", section on concatenation, with n-1 ports and a reduction
        in place of the concatenation.
    """
    return _schedule(
        1, Round(_sends(rank, world_size, lambda peer: 0), _recvs(rank, world_size, lambda peer: 0, reduce=True))
    )


def star_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send the whole buffer to the root, which reduces in rank order and sends the result back.

    Two rounds; 2(n-1) messages in all, where `exchange_all_reduce` has n(n-1) in one round. Where sending and receiving
    a message takes longer than its transmission (TCP within a host), fewer messages outweigh the second latency. Any
    root gives the same bits.

    Source: `direct_reduce`, then `direct_broadcast`.
    """
    reduce, broadcast = direct_reduce(rank, world_size, root), direct_broadcast(rank, world_size, root)
    return Schedule(1, reduce.rounds + broadcast.rounds)


def direct_reduce_scatter(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send chunk p to each rank p, and reduce this rank's own: one round, n-1 messages, m(n-1)/n bytes.

    Source: pairwise exchange in Thakur 2005, section on reduce-scatter; ours runs their n-1 steps as one round and
        reduces in rank order.
    """
    return _schedule(world_size, _reduce_scatter_round(rank, world_size))


def direct_all_gather(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send this rank's chunk to all others: one round, n-1 messages, m(n-1)/n bytes.

    Source: Chan, Heimlich, Purkayastha & van de Geijn 2007, "Collective communication: theory, practice, and
        experience", simultaneous broadcasts; ours sends them in one round.
    """
    return _schedule(world_size, _all_gather_round(rank, world_size))


def direct_all_to_all(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send to each rank its chunk of this rank's row.

    One round, n-1 messages; m counts all n*n chunks, so m(n-1)/n² bytes.

    Source: Thakur 2005, section on all-to-all, the algorithm for medium messages that posts all sends and receives at
        once, each rank starting with its successor.
    """
    return _schedule(world_size**2, _all_to_all_round(rank, world_size))


def pairwise_all_to_all(rank: int, world_size: int, root: int = 0) -> Schedule:
    """In round k send to the rank k after this one, and receive from the rank k before it.

    n-1 rounds and messages, m(n-1)/n² bytes, with m bytes in all n*n chunks. No rank ever receives from two at once,
    so large messages do not collide. With 3 ranks:

        r1  0→1 [1]  1→2 [5]  2→0 [6]
        r2  0→2 [2]  1→0 [3]  2→1 [7]

    Source: Thakur 2005, section on all-to-all, the pairwise algorithm for long messages. Theirs pairs ranks by
        exclusive or where n is a power of two; ours shifts for every n.
    """
    at_once = _all_to_all_round(rank, world_size)
    pairs = zip(at_once.sends, at_once.recvs, strict=True)
    return Schedule(world_size**2, tuple(Round((send,), (recv,)) for send, recv in pairs))


def direct_broadcast(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send the whole buffer from the root to all others: one round, n-1 messages, m(n-1) bytes at the root.

    Source: flat tree, Barnett et al. 1994, "Interprocessor collective communication library (InterCom)".
    """
    if rank != root:
        return _schedule(1, Round(recvs=(Recv(root, (0,)),)))
    return _schedule(1, Round(_sends(rank, world_size, lambda peer: 0)))


def direct_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send the whole buffer to the root, which reduces in rank order.

    One round; the root receives n-1 messages, m(n-1) bytes.

    Source: flat tree, as `direct_broadcast` with the arrows reversed.
    """
    if rank != root:
        return _schedule(1, Round((Send(root, (0,)),)))
    return _schedule(1, Round(recvs=_recvs(rank, world_size, lambda peer: 0, reduce=True)))


def direct_gather(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send this rank's chunk to the root: one round, n-1 messages, m(n-1)/n bytes there.

    Source: flat tree, as `direct_broadcast`; every byte crosses the network once.
    """
    if rank != root:
        return _schedule(world_size, Round((Send(root, (rank,)),)))
    return _schedule(world_size, Round(recvs=_recvs(rank, world_size, lambda peer: peer)))


def direct_scatter(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send each rank its chunk from the root: one round, n-1 messages, m(n-1)/n bytes there.

    Source: flat tree, as `direct_broadcast`; every byte crosses the network once.
    """
    if rank != root:
        return _schedule(world_size, Round(recvs=(Recv(root, (rank,)),)))
    return _schedule(world_size, Round(_sends(rank, world_size, lambda peer: peer)))


def _reduce_scatter_round(rank: int, n: int) -> Round:
    return Round(_sends(rank, n, lambda peer: peer), _recvs(rank, n, lambda peer: rank, reduce=True))


def _all_gather_round(rank: int, n: int) -> Round:
    return Round(_sends(rank, n, lambda peer: rank), _recvs(rank, n, lambda peer: peer))


def _all_to_all_round(rank: int, n: int) -> Round:
    return Round(_sends(rank, n, lambda peer: rank * n + peer), _recvs(rank, n, lambda peer: peer * n + rank))


def _sends(rank: int, n: int, chunk: Callable[[int], int]) -> tuple[Send, ...]:
    """Send each other rank its chunk, from the successor on."""
    return tuple(Send(peer, (chunk(peer),)) for peer in ((rank + step) % n for step in range(1, n)))


def _recvs(rank: int, n: int, chunk: Callable[[int], int], *, reduce: bool = False) -> tuple[Recv, ...]:
    """Receive a chunk from each other rank, from the predecessor back, the order in which the messages come."""
    return tuple(Recv(peer, (chunk(peer),), reduce) for peer in ((rank - step) % n for step in range(1, n)))


def _schedule(chunks: int, *rounds: Round) -> Schedule:
    """Leave out rounds in which nothing moves: all of them in a world of one."""
    return Schedule(chunks, tuple(r for r in rounds if r.sends or r.recvs))
