"""A forked child holds nothing of its parent's connections, and whatever it does ends nothing of its parent's."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

import ferro
from ferro_testing import run_ranks_outcomes

LAYOUTS = {"shared memory": ({}, [""] * 3), "TCP": ({"shared_memory": False}, [""] * 3), "hosts": ({}, ["a", "a", "b"])}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def outcomes_of(request):
    options, hosts = request.param

    def run(function):
        return run_ranks_outcomes(
            function,
            3,
            backend="gloo",
            timeout_s=60,
            env=lambda rank: {"FERRO_HOST_ID": hosts[rank]},
            init_options={"backend_options": options, "timeout_s": 30.0},
        )

    return run


def all_reduce_on_and_on(group):
    while True:
        group.all_reduce(np.ones(3))


def die_with_a_child(group):
    """Rank 1 dies while a child of it lives on, as the workers of a data loader do."""
    group.all_reduce(np.ones(3))
    store = group._dispatcher._info.store
    if group.rank == 1:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            signal.pause()
        store.set("child", b"%d" % child)
        os.kill(os.getpid(), signal.SIGKILL)
    child = int(store.get("child", deadline=float("inf")))
    began = time.monotonic()
    with pytest.raises(ferro.PeerLost) as caught:
        all_reduce_on_and_on(group)
    seconds = time.monotonic() - began
    if group.rank == 0:
        os.kill(child, signal.SIGKILL)
    return caught.value.peer, seconds


def test_the_death_of_a_rank_with_forked_workers_is_noticed_at_once(outcomes_of):
    outcomes = outcomes_of(die_with_a_child)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok, outcome.describe()
        peer, seconds = outcome.result
        assert peer == 1
        assert seconds < 15, "noticed by the deadline, not by the closed connection"


def fork_children(group):
    """A child of rank 0 tries all that ends a group; the group goes on."""
    other = group.subgroup(range(group.world_size))
    x = group.empty(300_000)
    x[...] = 1
    totals = [float(group.all_reduce(x)[-1])]
    backend = group._backend
    if group.rank == 0:
        child = os.fork()
        if child == 0:
            try:
                backend.abort()
                backend.close()
                other._backend.abort()
                other._backend.close()
                del x
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    totals += [float(group.all_reduce(x)[-1]), float(other.all_reduce(x)[-1])]
    totals.append(float(group.subgroup(range(3)).all_reduce(1.0)))
    return totals


def test_a_forked_child_ends_nothing_of_its_parents(outcomes_of):
    outcomes = outcomes_of(fork_children)
    assert [outcome.result for outcome in outcomes] == [[3.0] * 4] * 3, [o.describe() for o in outcomes]


def wait_in_a_child(group):
    """A child of rank 0 waits for its parent's receive, which cannot end there."""
    if group.rank == 1:
        group.recv(np.zeros(1), 0)  # until rank 0's child has been seen to end
        group.send(np.ones(1), 0)
        return True
    if group.rank == 2:
        return True
    work = group.recv(np.zeros(1), 1, async_op=True)
    child = os.fork()
    if child == 0:
        try:
            with pytest.raises(
                ferro.UsageError, match=r"recv #0 was under way in process .* Wait for it before the fork"
            ):
                work.wait()
            os._exit(0)
        finally:
            os._exit(1)
    ended = os.waitpid(child, 0)[1] == 0
    group.send(np.ones(1), 1)
    return ended and work.wait()[0] == 1


def test_a_forked_child_does_not_wait_for_its_parents_work(outcomes_of):
    outcomes = outcomes_of(wait_in_a_child)
    assert [outcome.result for outcome in outcomes] == [True] * 3, [o.describe() for o in outcomes]
