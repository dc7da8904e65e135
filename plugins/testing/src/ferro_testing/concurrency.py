"""Conformance of concurrent operations: asynchronous ones, and those of groups that share ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro import ProcessGroup, Work
from ferro_testing.case import Case
from ferro_testing.samples import Findings, reduced, sample

_OUTSTANDING = 20


def check_async(case: Case) -> None:
    """Many operations may be outstanding; they end with the results of their own inputs."""
    if case.supports("all_reduce", "all_gather"):
        case.verify_all(_overlap_operations)


def check_groups(case: Case) -> None:
    """`split` and `subgroup` make the groups asked for, also inside one another."""
    ways = [op for op in ("split", "subgroup") if case.supports(op)]
    if ways and case.supports("all_gather"):
        case.verify_all(_make_groups, ways)


def check_overlapping_groups(case: Case) -> None:
    """Groups that share ranks may be used at the same time, in different orders."""
    if case.supports("subgroup", "all_reduce", "overlapping"):
        for world_size in case.world_sizes:
            if world_size >= 3:  # otherwise no two groups share ranks
                case.verify(_overlap_groups, world_size)


def _overlap_operations(group: ProcessGroup) -> list[str]:
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    works: list[Work[object]] = []
    for index in range(_OUTSTANDING):
        given = np.array(sample(me, (index * 37,), "float32", salt=index))
        works.append(group.all_reduce(given, async_op=True))
        works.append(group.all_gather(given, async_op=True))
        given[...] = -1  # an input may be reused as soon as the call has returned
    last = group.all_reduce(np.array(1))  # after all operations that were issued before
    found.true(int(last) == n, "all_reduce after async operations has a wrong result")
    found.true(all(work.done() for work in works), "operations ran in another order than issued")
    for index in range(_OUTSTANDING):
        everyones = [sample(rank, (index * 37,), "float32", salt=index) for rank in range(n)]
        reduction, gathering = works[2 * index : 2 * index + 2]
        found.same(reduction.wait(), reduced(everyones, "sum"), f"async all_reduce {index}")
        found.same(gathering.wait(), np.concatenate(everyones), f"async all_gather {index}")
        found.true(gathering.seq == reduction.seq + 1, f"async pair {index} is misnumbered")
    return found.report()


def _make_groups(group: ProcessGroup, ways: Sequence[str]) -> list[str]:
    found = Findings(group.rank)
    if "subgroup" in ways:
        _choose(group, found)
    if "split" in ways:
        _split(group, ways, found)
    members = group.all_gather(np.array(group.rank))
    wanted = np.arange(group.world_size)
    found.same(members, wanted, "all_gather after groups were closed")
    return found.report()


def _choose(group: ProcessGroup, found: Findings) -> None:
    """Make groups by naming their members."""
    n, me = group.world_size, group.rank
    everyone = group.subgroup(range(n))
    found.true((everyone.rank, everyone.world_size) == (me, n), "subgroup of all: wrong rank")
    alone = everyone.subgroup([me])
    found.same(alone.all_gather(np.array([me])), np.array([me]), "all_gather in a group of one")
    reverse = everyone.subgroup(list(range(n))[::-1])
    wanted = np.arange(n)[::-1]
    found.same(reverse.all_gather(np.array(me)), wanted, "all_gather in a group within a group")
    for made in (alone, reverse, everyone):
        made.close()


def _split(group: ProcessGroup, ways: Sequence[str], found: Findings) -> None:
    """Make groups by colour, and groups inside those."""
    n, me = group.world_size, group.rank
    backwards = group.split(0, key=-me)
    found.true(backwards is not None and backwards.rank == n - 1 - me, "split: key is not heeded")
    parity = group.split(me % 2)
    members = [rank for rank in range(n) if rank % 2 == me % 2]
    if parity is None:
        found.note("split: gave no group")
        return
    found.true(parity.global_ranks == tuple(members), f"split: has {parity.global_ranks}")
    found.same(parity.all_gather(np.array(me)), np.array(members), "all_gather in a split")
    if "subgroup" in ways:
        reverse = parity.subgroup(list(range(parity.world_size))[::-1])
        wanted = np.array(members[::-1])
        found.same(reverse.all_gather(np.array(me)), wanted, "all_gather in a group in a split")
        reverse.close()
    absent = group.split(None if me == 0 else 1)
    found.true((absent is None) == (me == 0), "split: color None is in a group, or another is not")
    for made in (backwards, parity, absent):
        if made is not None:
            made.close()


def _overlap_groups(group: ProcessGroup) -> list[str]:
    """Use groups that each lack one rank of the world; ranks issue operations on them in different orders."""
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    members = {left: [rank for rank in range(n) if rank != left] for left in range(n)}
    groups = {left: group.subgroup(members[left]) for left in range(n) if left != me}
    works: list[tuple[int, int, Work[object]]] = []
    order = sorted(groups, key=lambda left: (left + me) % n)
    for index in range(5):
        for left in order:
            given = sample(me, (index * 500 + 1,), "int64", salt=left)
            works.append((left, index, groups[left].all_reduce(given, async_op=True)))
    total = group.all_reduce(np.array(me))
    found.true(int(total) == n * (n - 1) // 2, "all_reduce beside other groups is wrong")
    for left, index, work in works:
        everyones = [sample(rank, (index * 500 + 1,), "int64", salt=left) for rank in members[left]]
        what = f"all_reduce {index} on the group without rank {left}"
        found.same(work.wait(), reduced(everyones, "sum"), what)
    for made in groups.values():
        made.close()
    return found.report()
