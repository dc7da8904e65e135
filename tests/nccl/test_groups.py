"""Groups within the group, each with a communicator: by commSplit, or of their members alone."""

from __future__ import annotations

import threading

import numpy as np


def test_split_and_subgroup(machine, on_ranks):
    n = 4

    def total(group, value):
        return int(machine.host(group.all_reduce(machine.array([value])))[0])

    def work(group):
        me = group.rank
        parity = group.split(me % 2, key=-me)
        found = [parity.rank, total(parity, me)]
        assert (group.split(None if me == 3 else 0) is None) == (me == 3)
        if me in (0, 3):
            side = group.subgroup([3, 0])
            found += [side.rank, total(side, me)]
            side.close()
        parity.close()
        return [*found, total(group, me)]

    assert on_ranks(n, work) == {0: [1, 2, 1, 3, 6], 1: [1, 4, 6], 2: [0, 2, 6], 3: [0, 4, 0, 3, 6]}


def test_a_split_waits_for_what_was_launched(machine, on_ranks):
    """NCCL must not split with operations under way; the stand-in would not have it."""

    def work(group):
        unblock = machine.block()
        group.all_reduce(machine.array(np.ones(5)), async_op=True)
        timer = threading.Timer(0.05, unblock.set)
        timer.start()
        part = group.backend.split([1, 0], 7)
        timer.join()
        part.close()
        return part.rank

    assert on_ranks(2, work) == {0: 1, 1: 0}


def test_each_group_has_a_stream_of_its_own(machine, on_ranks):
    """Waiting work on one group's stream does not hold up the other group."""

    def work(group):
        other = group.split(0)
        unblock = machine.block(group.backend._queue.stream)
        slow = group.all_reduce(machine.array([1.0]), async_op=True)
        quick = machine.host(other.all_reduce(machine.array([2.0], float)))
        before = slow.done()
        unblock.set()
        return before, quick.tolist(), machine.host(slow.wait()).tolist()

    assert on_ranks(2, work) == dict.fromkeys(range(2), (False, [4.0], [2.0]))


def test_all_communicators_are_released(machine, on_ranks):
    def work(group):
        group.all_reduce(machine.array([1.0]))
        part = group.split(0)
        part.all_reduce(machine.array([1.0]))
        group.close()  # and with it what was made from it

    on_ranks(2, work)
    assert {c.over for c in machine.nccl.communicators} == {"destroyed"}
    assert len(machine.nccl.communicators) == 4
