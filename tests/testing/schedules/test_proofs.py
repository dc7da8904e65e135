"""Every algorithm of ours is proved right for every world size from 1 to 17, for 24 and 33, and most for 64."""

import inspect
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferro.collectives import direct, ring, tree
from ferro.collectives.schedule import Round, Schedule
from ferro.errors import PluginError
from ferro_testing.schedules import Proof, check, table

SIZES = (*range(1, 18), 24, 33)  # around every power of two up to 32; the costs below prove 64
ROOTED = ("broadcast", "reduce", "gather", "scatter")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
COLLECTIVES = (*ROOTED, "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "barrier")


def algorithms():
    """All public algorithms, as (collective, build): the name ends with the longest that fits."""
    found = []
    for module in (direct, ring, tree):
        for name, build in inspect.getmembers(module, inspect.isfunction):
            fits = [c for c in COLLECTIVES if name.endswith(f"_{c}")]
            if build.__module__ == module.__name__ and not name.startswith("_") and fits:
                found.append((max(fits, key=len), build))
    return found


ALGORITHMS = algorithms()
IDS = [build.__name__ for _, build in ALGORITHMS]


def log2(n: int) -> int:
    return math.ceil(math.log2(n))


def roots(collective: str, n: int) -> set[int]:
    return {0, n // 2, n - 1} if collective in ROOTED else {0}


def test_no_algorithm_is_missed():
    assert set(IDS) == {
        *("direct_all_reduce", "exchange_all_reduce", "star_all_reduce", "direct_all_gather", "direct_reduce_scatter"),
        *("direct_all_to_all", "pairwise_all_to_all", "direct_gather", "direct_scatter"),
        *("direct_broadcast", "direct_reduce", "ring_all_reduce", "ring_reduce_scatter"),
        *("ring_all_gather", "tree_broadcast", "tree_reduce", "tree_gather", "tree_scatter"),
        *("tree_all_reduce", "scatter_ring_broadcast", "dissemination_barrier"),
    }


@pytest.mark.parametrize(("collective", "build"), ALGORITHMS, ids=IDS)
def test_right_for_every_world_size_and_root(collective, build):
    for n in SIZES:
        for root in roots(collective, n):
            proof = check(collective, build, n, root)
            assert proof.same_everywhere
            if n == 1:
                assert proof == Proof(True, True, True, rounds=0, messages=0, chunks_sent=0)


@pytest.mark.parametrize(("collective", "build"), ALGORITHMS, ids=IDS)
def test_order_of_reduction(collective, build):
    name = build.__name__
    at_once = collective not in REDUCING or name.startswith(("direct", "exchange", "star"))
    for n in (2, 3, 4, 5, 8, 13):
        proof = check(collective, build, n)
        # With three ranks a tree is (x0 op x1) op x2: in rank order, but in two rounds.
        in_order = at_once or n == 2 or (n == 3 and name.startswith("tree"))
        assert (proof.rank_order, proof.combines_once) == (in_order, at_once or n == 2)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 64])
def test_cost_in_messages_and_chunks(n):
    def cost(collective, build):
        proof = check(collective, build, n)
        return proof.rounds, proof.messages, proof.chunks_sent

    assert cost("all_reduce", ring.ring_all_reduce) == (2 * (n - 1),) * 3
    assert cost("reduce_scatter", ring.ring_reduce_scatter) == (n - 1,) * 3
    assert cost("all_gather", ring.ring_all_gather) == (n - 1,) * 3
    assert cost("all_reduce", direct.direct_all_reduce) == (2, 2 * (n - 1), 2 * (n - 1))
    assert cost("all_reduce", direct.exchange_all_reduce) == (1, n - 1, n - 1)
    assert cost("all_to_all", direct.direct_all_to_all) == (1, n - 1, n - 1)
    assert cost("all_to_all", direct.pairwise_all_to_all) == (n - 1,) * 3
    assert cost("broadcast", tree.tree_broadcast) == (log2(n),) * 3
    assert cost("reduce", tree.tree_reduce) == (log2(n), 1, 1)
    assert cost("scatter", tree.tree_scatter) == (log2(n), log2(n), n - 1)
    assert cost("barrier", tree.dissemination_barrier) == (log2(n), log2(n), 0)
    rounds, _, chunks = cost("broadcast", tree.scatter_ring_broadcast)
    assert rounds == log2(n) + n - 1
    assert chunks == 2 * (n - 1)


@pytest.mark.parametrize(
    ("build", "n", "root"),
    [
        (direct.direct_all_reduce, 3, 0),
        (direct.pairwise_all_to_all, 3, 0),
        (ring.ring_all_reduce, 3, 0),
        (tree.tree_broadcast, 4, 0),
        (tree.tree_reduce, 4, 0),
        (tree.tree_scatter, 4, 0),
        (tree.scatter_ring_broadcast, 4, 1),
        (tree.dissemination_barrier, 3, 0),
    ],
)
def test_docstring_shows_the_very_table(build, n, root):
    drawn = [line.strip() for line in inspect.getdoc(build).splitlines()]
    drawn = [line for line in drawn if "→" in line]
    assert drawn == table(build, n, root).splitlines()


def test_drawing_of_ring_all_reduce():
    assert table(ring.ring_all_reduce, 3) == (
        "r1  0→1 [2]⊕  1→2 [0]⊕  2→0 [1]⊕\n"
        "r2  0→1 [1]⊕  1→2 [2]⊕  2→0 [0]⊕\n"
        "r3  0→1 [0]   1→2 [1]   2→0 [2]\n"
        "r4  0→1 [2]   1→2 [0]   2→0 [1]"
    )


def test_drawing_joins_neighbouring_chunks_and_is_empty_in_a_world_of_one():
    assert table(tree.tree_gather, 6, 4) == ("r1  1→0 [1]    3→2 [3]  5→4 [5]\nr2  0→4 [0-1]\nr3  2→4 [2-3]")
    assert table(ring.ring_all_reduce, 1) == ""


# Those in which every message is needed: scatter_ring_broadcast sends some chunks again, and
# a barrier hears of some ranks twice.
LEAN = [a for a in ALGORITHMS if a[1].__name__[:4] not in ("scat", "diss")]


@settings(deadline=None)
@given(st.data())
def test_without_any_one_message_every_algorithm_is_wrong(data):
    collective, build = data.draw(st.sampled_from(LEAN))
    n = data.draw(st.integers(2, 9))
    source = data.draw(st.sampled_from([r for r in range(n) if sends(build(r, n, 0))]))
    index, position = data.draw(st.sampled_from(sends(build(source, n, 0))))
    target = build(source, n, 0).rounds[index].sends[position].peer

    def cut(rank, world_size, root):
        schedule = build(rank, world_size, root)
        rounds = list(schedule.rounds)
        current = rounds[index]
        if rank == source:
            kept = tuple(s for s in current.sends if s.peer != target)
            rounds[index] = Round(kept, current.recvs)
        if rank == target:
            kept = tuple(r for r in current.recvs if r.peer != source)
            rounds[index] = Round(current.sends, kept)
        return Schedule(schedule.chunks, tuple(rounds))

    with pytest.raises(PluginError):
        check(collective, cut, n)


def sends(schedule):
    return [(i, j) for i, r in enumerate(schedule.rounds) for j in range(len(r.sends))]
