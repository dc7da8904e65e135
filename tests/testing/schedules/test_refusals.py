"""The checker refuses wrong algorithms, in words that say where and what."""

import re

import pytest

from ferro.collectives.ring import ring_all_gather, ring_all_reduce
from ferro.collectives.schedule import Recv, Round, Schedule, Send
from ferro.errors import PluginError, UsageError
from ferro_testing.schedules import check


def by_hand(chunks, *ranks):
    """An algorithm that is written out: for each rank, its rounds."""

    def hand_made(rank, world_size, root):
        return Schedule(chunks, tuple(ranks[rank]))

    return hand_made


def refuse(collective, build, n, *, rank, says, root=0):
    with pytest.raises(PluginError, match=re.escape(says)) as caught:
        check(collective, build, n, root)
    name = build.__name__
    assert str(caught.value).startswith(f"{collective} by {name} with {n} ranks, root {root}: rank {rank}")
    assert (caught.value.op, caught.value.rank) == (collective, rank)


def test_missing_recv():
    build = by_hand(1, [Round((Send(1, (0,)),))], [])
    refuse("broadcast", build, 2, rank=0, says="round 1 sends chunks [0] to rank 1, which has no")


def test_missing_send():
    build = by_hand(1, [], [Round(), Round(recvs=(Recv(0, (0,)),))])
    refuse("broadcast", build, 2, rank=1, says="round 2 receives chunks [0] from rank 0, which has")


def test_wrong_chunk_order():
    build = by_hand(2, [Round((Send(1, (0, 1)),))], [Round(recvs=(Recv(0, (1, 0)),))])
    says = "round 1 receives chunks [1, 0] from rank 0, but the message due next is [0, 1], sent in"
    refuse("broadcast", build, 2, rank=1, says=says)


def test_cyclic_wait():
    def after_you(rank, world_size, root):
        successor, predecessor = (rank + 1) % world_size, (rank - 1) % world_size
        return Schedule(0, (Round(recvs=(Recv(predecessor, ()),)), Round((Send(successor, ()),))))

    says = "waits for rank 2 (round 1) waits for rank 1 (round 1) waits for rank 0 (round 1)"
    refuse("barrier", after_you, 3, rank=0, says=says)


def test_only_the_ranks_that_wait_for_each_other_are_named():
    build = by_hand(
        0,
        [Round(recvs=(Recv(1, ()),))],
        [Round(recvs=(Recv(2, ()),)), Round((Send(0, ()), Send(2, ())))],
        [Round(recvs=(Recv(1, ()),)), Round((Send(1, ()),))],
    )
    says = "never ends: rank 1 (round 1) waits for rank 2 (round 1) waits for rank 1 (round 1)."
    refuse("barrier", build, 3, rank=1, says=says)


def test_double_contribution():
    def twice(rank, world_size, root):
        swap = Round((Send(1 - rank, (0,)),), (Recv(1 - rank, (0,), reduce=True),))
        return Schedule(1, (swap, swap))

    says = "round 2 combines chunk 0 with the contributions of ranks [0, 1] twice"
    refuse("all_reduce", twice, 2, rank=0, says=says)


def test_same_peer_twice_in_a_round():
    build = by_hand(
        1,
        [Round((Send(1, (0,)), Send(1, (0,))))],
        [Round(recvs=(Recv(0, (0,), reduce=True), Recv(0, (0,), reduce=True)))],
    )
    says = "combines chunk 0 with the contributions of ranks [0] twice"
    refuse("reduce", build, 2, rank=1, says=says, root=1)


def test_missing_contribution():
    build = by_hand(1, [Round(recvs=(Recv(1, (0,), reduce=True),))], [Round((Send(0, (0,)),))], [])
    says = "ends with chunk 0 lacking the contributions of ranks [2]"
    refuse("reduce", build, 3, rank=0, says=says)


def test_overwritten_contribution():
    build = by_hand(1, [Round(recvs=(Recv(1, (0,)),))], [Round((Send(0, (0,)),))])
    refuse("reduce", build, 2, rank=0, says="ends with chunk 0 lacking the contributions of ranks")


def test_chunk_not_arrived():
    refuse("all_gather", by_hand(2, [], []), 2, rank=0, says="ends without chunk 1")


def test_sent_chunk_not_held():
    build = by_hand(
        1, [Round((Send(1, (0,)),))], [Round((Send(2, (0,)),), (Recv(0, (0,)),))], [Round(recvs=(Recv(1, (0,)),))]
    )
    says = "round 1 sends chunk 0 to rank 2, but does not hold it yet"
    refuse("broadcast", build, 3, rank=1, says=says)


def test_combined_chunk_not_held():
    build = by_hand(1, [Round((Send(1, (0,)),))], [Round(recvs=(Recv(0, (0,), reduce=True),))])
    says = "round 1 combines into chunk 0, but does not hold it yet"
    refuse("broadcast", build, 2, rank=1, says=says)


def three_into_rank_0(*recvs):
    return by_hand(1, [Round(recvs=recvs)], [Round((Send(0, (0,)),))], [Round((Send(0, (0,)),))])


def test_overwritten_twice():
    build = three_into_rank_0(Recv(1, (0,)), Recv(2, (0,)))
    refuse("reduce", build, 3, rank=0, says="round 1 overwrites chunk 0 twice")


def test_overwritten_and_combined():
    build = three_into_rank_0(Recv(1, (0,)), Recv(2, (0,), reduce=True))
    refuse("reduce", build, 3, rank=0, says="round 1 both overwrites and combines chunk 0")


def test_barrier_that_does_not_hear_of_all():
    build = by_hand(
        0,
        [Round((Send(1, ()),), (Recv(1, ()),))],
        [Round((Send(0, ()),), (Recv(0, ()),)), Round((Send(2, ()),), (Recv(2, ()),))],
        [Round((Send(1, ()),), (Recv(1, ()),))],
    )
    says = "ends before it has heard, even through others, of ranks [2]"
    refuse("barrier", build, 3, rank=0, says=says)


@pytest.mark.parametrize(
    ("send", "says"),
    [
        (Send(2, (0,)), "round 1 sends to rank 2. A peer is another rank"),
        (Send(-1, (0,)), "round 1 sends to rank -1. A peer is another rank"),
        (Send(0, (0,)), "round 1 sends to rank 0. A peer is another rank"),
        (Send(1, (1,)), "round 1 sends to rank 1 chunks [1], of which not all exist"),
        (Send(1, (0, 0)), "round 1 sends to rank 1 chunks [0, 0]. Name each chunk once"),
    ],
)
def test_peer_or_chunk_out_of_range(send, says):
    refuse("broadcast", by_hand(1, [Round((send,))], []), 2, rank=0, says=says)


@pytest.mark.parametrize(
    ("collective", "chunks", "needs"), [("all_reduce", 0, "at least 1"), ("all_gather", 2, "3"), ("all_to_all", 3, "9")]
)
def test_wrong_number_of_chunks(collective, chunks, needs):
    says = f"has {chunks} chunks; {collective} needs {needs}."
    refuse(collective, by_hand(chunks, [], [], []), 3, rank=0, says=says)


def test_ranks_that_cut_differently():
    def uneven(rank, world_size, root):
        return Schedule(rank + 1, ())

    refuse("all_reduce", uneven, 2, rank=1, says="has 2 chunks where rank 0 has 1")


def test_algorithm_for_another_collective():
    refuse("reduce_scatter", ring_all_gather, 3, rank=0, says="lacking the contributions of")


def test_call_for_an_unknown_collective_or_root():
    with pytest.raises(UsageError, match="no collective 'sum'"):
        check("sum", ring_all_reduce, 2)
    with pytest.raises(UsageError, match="world_size is 2 and root is 2"):
        check("all_reduce", ring_all_reduce, 2, root=2)
    with pytest.raises(UsageError, match="world_size is 0"):
        check("all_reduce", ring_all_reduce, 0)


def test_two_messages_that_look_alike_are_two():
    build = by_hand(
        0, [Round((Send(1, ()), Send(1, ())), (Recv(1, ()),))], [Round((Send(0, ()),), (Recv(0, ()), Recv(0, ())))]
    )
    assert check("barrier", build, 2).messages == 2


def test_growing_prefix_is_in_rank_order_but_not_at_once():
    def chain(rank, world_size, root):
        receive = Round(recvs=(Recv(rank - 1, (0,), reduce=True),))
        send = Round((Send(rank + 1, (0,)),))
        rounds = (receive,) * (rank > 0) + (send,) * (rank < world_size - 1)
        return Schedule(1, rounds)

    proof = check("reduce", chain, 5, root=4)
    assert proof.rank_order
    assert not proof.combines_once


def test_copies_that_differ_in_bits_are_noticed():
    def add(peer):
        return Recv(peer, (0,), reduce=True)

    # Ranks 0 and 1 get x0 op (x1 op x2); rank 2 gets x0 op x1 op x2 at once.
    build = by_hand(
        1,
        [Round((Send(1, (0,)), Send(2, (0,)))), Round(recvs=(add(1),))],
        [Round((Send(2, (0,)),), (add(2),)), Round((Send(0, (0,)),), (add(0),))],
        [Round((Send(1, (0,)),), (add(0), add(1)))],
    )
    proof = check("all_reduce", build, 3)
    assert not proof.same_everywhere
    assert not proof.rank_order
