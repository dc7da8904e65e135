"""Algorithms that the user asks for run over TCP, beside collectives in shared memory."""

import numpy as np

import ferro
from ferro_testing import run_ranks

RING = {"algorithms": {"all_reduce": "ring"}}


def total(group):
    group.barrier()
    return [group.all_reduce(np.arange(5.0)).tolist(), group.all_gather(group.rank).tolist()]


def test_both_are_right_one_after_the_other():
    results = run_ranks(total, 3, backend="gloo", timeout_s=30, init_options=RING)
    assert results == [[[0.0, 3.0, 6.0, 9.0, 12.0], [0, 1, 2]]] * 3


def differ(group):
    try:
        group.all_reduce(np.ones(4)) if group.rank == 0 else group.barrier()
    except ferro.CollectiveMismatch as error:
        return str(error)
    return "nothing"


def test_a_call_of_each_kind_at_once_is_a_mismatch():
    one, other = run_ranks(differ, 2, backend="gloo", timeout_s=30, init_options=RING)
    assert "called all_reduce" in one
    assert "called barrier" in one
    assert one == other
