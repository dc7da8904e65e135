"""Direct algorithms: every rank talks to every other in one round, or two.

They take the fewest rounds, and reduce in rank order whatever the world size, since every chunk
is reduced from single contributions. They send the most messages, n-1 per rank and round, so
they suit few ranks or small arrays. Each rank starts with its successor, so that no rank is
everybody's first target.

Costs below are per rank, with n ranks and m bytes in all chunks together.
"""

from __future__ import annotations

from ferro.collectives.schedule import Recv, Round, Schedule, Send


def direct_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Reduce chunk i on rank i, then hand it to everybody; `root` is ignored.

    Two rounds, 2(n-1) messages, 2m(n-1)/n bytes: the least bandwidth possible. With 3 ranks:

        r1  0→1 [1]⊕  0→2 [2]⊕  1→0 [0]⊕  1→2 [2]⊕  2→0 [0]⊕  2→1 [1]⊕
        r2  0→1 [0]   0→2 [0]   1→0 [1]   1→2 [1]   2→0 [2]   2→1 [2]

    Source: Rabenseifner's decomposition into reduce_scatter and all_gather (Thakur, Rabenseifner
        & Gropp 2005, "Optimization of collective communication operations in MPICH", section on
        reduce and allreduce). Theirs halves and doubles over log2(n) rounds; ours takes one
        round for each half, which keeps the order of ranks.
    """
    return _schedule(world_size, _reduce_scatter_round(rank, world_size), _all_gather_round(rank, world_size))


def exchange_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send everything to everybody, reduce everything here; `root` is ignored.

    One round, n-1 messages, m(n-1) bytes: one latency, for small arrays.

    Source: the latency-optimal end of the trade-off in Bruck et al. 1997, "Efficient algorithms
        for all-to-all communications in multiport message-passing systems", section on
        concatenation, with n-1 ports and a reduction in place of the concatenation.
    """
    sends = tuple(Send(peer, (0,)) for peer in _after(rank, world_size))
    recvs = tuple(Recv(peer, (0,), reduce=True) for peer in _before(rank, world_size))
    return _schedule(1, Round(sends, recvs))


def star_all_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Everybody sends everything to the root, which reduces in rank order and sends it back.

    Two rounds; 2(n-1) messages in all, where `exchange_all_reduce` has n(n-1) in one round. Where
    a message costs its ends more time than it spends on the way (TCP within a host), that counts
    for more than the second latency. Any root gives the same bits.

    Source: `direct_reduce`, then `direct_broadcast`.
    """
    up = direct_reduce(rank, world_size, root)
    down = direct_broadcast(rank, world_size, root)
    return Schedule(1, up.rounds + down.rounds)


def direct_reduce_scatter(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send chunk p to each rank p, reduce one's own; `root` is ignored.

    One round, n-1 messages, m(n-1)/n bytes.

    Source: pairwise exchange in Thakur, Rabenseifner & Gropp 2005, section on reduce-scatter;
        ours runs their n-1 steps as one round and reduces in rank order.
    """
    return _schedule(world_size, _reduce_scatter_round(rank, world_size))


def direct_all_gather(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send one's own chunk to everybody; `root` is ignored.

    One round, n-1 messages, m(n-1)/n bytes.

    Source: Chan, Heimlich, Purkayastha & van de Geijn 2007, "Collective communication: theory,
        practice, and experience", simultaneous broadcasts; ours sends them in one round.
    """
    return _schedule(world_size, _all_gather_round(rank, world_size))


def direct_all_to_all(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Send to each rank its chunk of this rank's row; `root` is ignored.

    One round, n-1 messages; m counts all n*n chunks, so m(n-1)/n² bytes.

    Source: Thakur, Rabenseifner & Gropp 2005, section on all-to-all, the algorithm for medium
        messages that posts all sends and receives at once, each rank starting with its successor.
    """
    n = world_size
    sends = tuple(Send(peer, (rank * n + peer,)) for peer in _after(rank, n))
    recvs = tuple(Recv(peer, (peer * n + rank,)) for peer in _before(rank, n))
    return _schedule(n * n, Round(sends, recvs))


def pairwise_all_to_all(rank: int, world_size: int, root: int = 0) -> Schedule:
    """In round k send to the rank k places on, receive from the one k places back.

    `root` is ignored. n-1 rounds and messages, m(n-1)/n² bytes per rank, with m bytes in all n*n
    chunks. No rank ever receives from two at once, so large messages do not collide. With 3 ranks:

        r1  0→1 [1]  1→2 [5]  2→0 [6]
        r2  0→2 [2]  1→0 [3]  2→1 [7]

    Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication
        operations in MPICH", section on all-to-all, the pairwise algorithm for long messages.
        Theirs pairs ranks by exclusive or where n is a power of two; ours shifts for every n.
    """
    return Schedule(world_size * world_size, tuple(_shift(rank, world_size, step) for step in range(1, world_size)))


def direct_broadcast(rank: int, world_size: int, root: int = 0) -> Schedule:
    """The root sends everything to everybody: one round, n-1 messages, m(n-1) bytes at the root.

    Source: flat tree, Barnett et al. 1994, "Interprocessor collective communication library
        (InterCom)".
    """
    if rank != root:
        return _schedule(1, Round(recvs=(Recv(root, (0,)),)))
    return _schedule(1, Round(tuple(Send(peer, (0,)) for peer in _after(rank, world_size))))


def direct_reduce(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Everybody sends everything to the root, which reduces in rank order.

    One round; the root receives n-1 messages, m(n-1) bytes.

    Source: flat tree, as `direct_broadcast` with the arrows turned round.
    """
    if rank != root:
        return _schedule(1, Round((Send(root, (0,)),)))
    recvs = tuple(Recv(peer, (0,), reduce=True) for peer in _before(rank, world_size))
    return _schedule(1, Round(recvs=recvs))


def direct_gather(rank: int, world_size: int, root: int = 0) -> Schedule:
    """Everybody sends its chunk to the root: one round, n-1 messages, m(n-1)/n bytes there.

    Source: flat tree, as `direct_broadcast`; every byte crosses the network once.
    """
    if rank != root:
        return _schedule(world_size, Round((Send(root, (rank,)),)))
    recvs = tuple(Recv(peer, (peer,)) for peer in _before(rank, world_size))
    return _schedule(world_size, Round(recvs=recvs))


def direct_scatter(rank: int, world_size: int, root: int = 0) -> Schedule:
    """The root sends to each rank its chunk: one round, n-1 messages, m(n-1)/n bytes there.

    Source: flat tree, as `direct_broadcast`; every byte crosses the network once.
    """
    if rank != root:
        return _schedule(world_size, Round(recvs=(Recv(root, (rank,)),)))
    sends = tuple(Send(peer, (peer,)) for peer in _after(rank, world_size))
    return _schedule(world_size, Round(sends))


def _reduce_scatter_round(rank: int, n: int) -> Round:
    return Round(
        sends=tuple(Send(peer, (peer,)) for peer in _after(rank, n)),
        recvs=tuple(Recv(peer, (rank,), reduce=True) for peer in _before(rank, n)),
    )


def _all_gather_round(rank: int, n: int) -> Round:
    return Round(
        sends=tuple(Send(peer, (rank,)) for peer in _after(rank, n)),
        recvs=tuple(Recv(peer, (peer,)) for peer in _before(rank, n)),
    )


def _shift(rank: int, n: int, step: int) -> Round:
    target, source = (rank + step) % n, (rank - step) % n
    return Round(sends=(Send(target, (rank * n + target,)),), recvs=(Recv(source, (source * n + rank,)),))


def _after(rank: int, n: int) -> tuple[int, ...]:
    """The other ranks, from the successor on."""
    return tuple((rank + step) % n for step in range(1, n))


def _before(rank: int, n: int) -> tuple[int, ...]:
    """The other ranks, from the predecessor back: the order in which their messages come."""
    return tuple((rank - step) % n for step in range(1, n))


def _schedule(chunks: int, *rounds: Round) -> Schedule:
    """Leave out rounds in which nothing moves: all of them in a world of one."""
    return Schedule(chunks, tuple(r for r in rounds if r.sends or r.recvs))
