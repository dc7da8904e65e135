"""Conformance of what runs at the same time: async operations, groups, transfers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.group import ProcessGroup
from ferro.testing.case import Case
from ferro.testing.samples import Findings, reduced, sample
from ferro.work import Work

_OUTSTANDING = 20


def check_async(case: Case) -> None:
    """Many operations may be outstanding; they end with the results of their own inputs."""
    if case.supports("all_reduce", "all_gather"):
        case.verify_all(_overlap_operations)


def check_groups(case: Case) -> None:
    """`split` and `subgroup` give the groups asked for, also within one another."""
    if case.supports("split", "subgroup", "all_gather"):
        case.verify_all(_make_groups)


def check_overlapping_groups(case: Case) -> None:
    """Groups that share ranks may be used at the same time, in different orders."""
    if case.supports("subgroup", "all_reduce"):
        case.verify_all(_overlap_groups)


def check_transfers(case: Case) -> None:
    """Every rank sends to every other; tags keep messages apart, whatever their order."""
    if case.supports("send", "recv", "sendrecv"):
        case.verify_all(_transfer, case.dtypes)


def _overlap_operations(group: ProcessGroup) -> list[str]:
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    works: list[Work[object]] = []
    for index in range(_OUTSTANDING):
        given = np.array(sample(me, (index * 37,), "float32", salt=index))
        works.append(group.all_reduce(given, async_op=True))
        works.append(group.all_gather(given, async_op=True))
        given[...] = -1  # an input may be reused as soon as the call has returned
    last = group.all_reduce(np.array(1))  # after all that was issued before
    found.true(int(last) == n, "all_reduce after async operations has a wrong result")
    found.true(all(work.done() for work in works), "operations ran in another order than issued")
    for index in range(_OUTSTANDING):
        everyones = [sample(rank, (index * 37,), "float32", salt=index) for rank in range(n)]
        reduction, gathering = works[2 * index : 2 * index + 2]
        found.same(reduction.wait(), reduced(everyones, "sum"), f"async all_reduce {index}")
        found.same(gathering.wait(), np.concatenate(everyones), f"async all_gather {index}")
        found.true(gathering.seq == reduction.seq + 1, f"async pair {index} is misnumbered")
    return found.report()


def _make_groups(group: ProcessGroup) -> list[str]:
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    everyone = group.subgroup(range(n))
    found.true((everyone.rank, everyone.world_size) == (me, n), "subgroup of all: wrong rank")
    backwards = group.split(0, key=-me)
    found.true(backwards is not None and backwards.rank == n - 1 - me, "split: key is not heeded")
    parity = group.split(me % 2)
    members = [rank for rank in range(n) if rank % 2 == me % 2]
    if parity is None:
        found.note("split: gave no group")
        return found.report()
    found.true(parity.global_ranks == tuple(members), f"split: has {parity.global_ranks}")
    found.same(parity.all_gather(np.array(me)), np.array(members), "all_gather in a split")
    alone = parity.subgroup([parity.rank])
    found.same(alone.all_gather(np.array([me])), np.array([me]), "all_gather in a group of one")
    reverse = parity.subgroup(list(range(parity.world_size))[::-1])
    wanted = np.array(members[::-1])
    found.same(reverse.all_gather(np.array(me)), wanted, "all_gather in a group within a group")
    absent = group.split(None if me == 0 else 1)
    found.true((absent is None) == (me == 0), "split: color None is in a group, or another is not")
    for made in (everyone, backwards, parity, alone, reverse, absent):
        if made is not None:
            made.close()
    found.same(group.all_gather(np.array(me)), np.arange(n), "all_gather after groups were closed")
    return found.report()


def _overlap_groups(group: ProcessGroup) -> list[str]:
    """Every group is one rank short of the world; ranks issue on them in different orders."""
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    if n < 3:
        return []
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


def _transfer(group: ProcessGroup, dtypes: Sequence[str]) -> list[str]:
    found = Findings(group.rank)
    n, me = group.world_size, group.rank
    others = [rank for rank in range(n) if rank != me]
    for shape in ((), (0,), (5, 3), (100_000,)):
        sends = [
            group.send(sample(me, shape, "float32", salt=peer + 10 * tag), peer, tag, async_op=True)
            for peer in others
            for tag in (0, 1, 7)
        ]
        for tag in (7, 0, 1):  # another order than they are sent in
            for peer in reversed(others):
                buffer = np.empty(shape, np.float32)
                result = group.recv(buffer, peer, tag)
                found.true(result is buffer, "recv does not return its buffer")
                wanted = sample(peer, shape, "float32", salt=me + 10 * tag)
                found.same(buffer, wanted, f"recv of {list(shape)} from rank {peer}, tag {tag}")
        for work in sends:
            work.wait()
    if others:
        _transfer_around(group, dtypes, found)
        _transfer_in_order(group, found)
    return found.report()


def _transfer_around(group: ProcessGroup, dtypes: Sequence[str], found: Findings) -> None:
    """Sendrecv on a ring: to the next rank, from the one before; small and large."""
    n, me = group.world_size, group.rank
    after, before = (me + 1) % n, (me - 1) % n
    for dtype in dtypes:
        for shape in ((), (0,), (3, 5), (50_000,)):
            given = sample(me, shape, dtype)
            buffer = np.empty(shape, given.dtype)
            group.sendrecv(given, buffer, after, before, tag=3)
            found.same(buffer, sample(before, shape, dtype), f"sendrecv of {dtype}{list(shape)}")


def _transfer_in_order(group: ProcessGroup, found: Findings) -> None:
    """Messages with one tag arrive in the order sent, also into receives that wait already."""
    n, me = group.world_size, group.rank
    after, before = (me + 1) % n, (me - 1) % n
    buffers = [np.empty(index * 100 + 1) for index in range(8)]
    receives = [group.recv(buffer, before, 5, async_op=True) for buffer in buffers]
    for index, buffer in enumerate(buffers):
        group.send(np.full(buffer.shape, me * 100.0 + index), after, 5)
    for index, (buffer, work) in enumerate(zip(buffers, receives, strict=True)):
        work.wait()
        found.same(buffer, np.full(buffer.shape, before * 100.0 + index), f"message {index}")
