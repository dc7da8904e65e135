"""Transfers match in order and without tags; those of one exchange run at the same time."""

from __future__ import annotations

import numpy as np
import pytest

from ferro import UnsupportedError


def test_sends_and_receives_match_in_order(machine, on_ranks):
    def work(group):
        received = []
        for k in range(3):
            if group.rank == 0:
                group.send(machine.array([k, 10 * k]), 1)
            else:
                received.append(machine.host(group.recv(machine.empty((2,), int), 0)).tolist())
        return received

    assert on_ranks(2, work)[1] == [[0, 0], [1, 10], [2, 20]]


def test_a_ring_of_sendrecv(machine, on_ranks):
    n = 3

    def work(group):
        me = group.rank
        x = machine.array(np.full((2, 2), float(me)))
        got = group.sendrecv(x, machine.empty((2, 2)), (me + 1) % n, (me - 1) % n)
        staged = group.sendrecv(np.array([me]), np.zeros(1, int), (me + 1) % n, (me - 1) % n)
        return machine.host(got)[0, 0], int(staged[0])

    assert on_ranks(n, work) == {0: (2.0, 2), 1: (0.0, 0), 2: (1.0, 1)}


def test_objects_travel(on_ranks):
    def work(group):
        if group.rank == 0:
            group.send_object({"a": [1, 2]}, 1)
            return None
        return group.recv_object(0)

    assert on_ranks(2, work)[1] == {"a": [1, 2]}


def test_a_users_tag_is_refused_and_the_group_lives(machine, on_ranks):
    def work(group):
        peer = 1 - group.rank
        with pytest.raises(UnsupportedError, match=r"NCCL has no tags.*Use tag 0"):
            group.send(machine.array([1.0]), peer, 7)
        with pytest.raises(UnsupportedError, match="NCCL has no tags"):
            group.recv(np.zeros(1), peer, 7)
        return machine.host(group.all_reduce(machine.array([1.0]))).tolist()

    assert on_ranks(2, work) == {0: [2.0], 1: [2.0]}


def test_a_group_of_calls_is_closed_when_one_raises(machine):
    library = machine.library()
    with pytest.raises(ZeroDivisionError), library.grouped():
        raise ZeroDivisionError
    assert machine.nccl.depth == 0
