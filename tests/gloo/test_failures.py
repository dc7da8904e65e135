"""Every rank gets the right error when one dies, stalls, differs or raises: real processes.

All tests run over shared memory, and all but those of mismatches (see the conformance kit) over
sockets alone.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial

import numpy as np
import pytest

import ferro
from ferro_testing import run_ranks_outcomes

TRANSPORTS = {"shared memory": True, "TCP": False}


@pytest.fixture(params=TRANSPORTS.values(), ids=TRANSPORTS)
def outcomes_of(request):
    """Run a function on ranks that share memory, or do not; return their outcomes."""

    def run(function, world_size, **options):
        backend_options = {"shared_memory": request.param}
        return run_ranks_outcomes(
            function,
            world_size,
            backend="gloo",
            timeout_s=30,
            init_options={"backend_options": backend_options},
            **options,
        )

    return run


def caught(call):
    """Describe the error that a call raises, as a rank's result."""
    try:
        call()
    except ferro.FerroError as error:
        return [type(error).__name__, str(error), error.peer]
    return ["nothing", "", None]


def differ_in_dtype(group):
    dtype = np.int32 if group.rank == 1 else np.float32
    return caught(lambda: group.all_reduce(np.ones(5, dtype)))


def differ_in_length(group):
    return caught(lambda: group.all_reduce(np.ones(1_000_000 + (group.rank == 2))))


def differ_in_operation(group):
    if group.rank == group.world_size - 1:
        return caught(lambda: group.all_reduce(np.ones(5)))
    return caught(lambda: group.broadcast(np.ones(5)))


def differ_in_root(group):
    return caught(lambda: group.broadcast(np.ones(5), root=group.rank % 2))


def differ_in_reduction(group):
    return caught(lambda: group.all_reduce(np.ones(5), op="max" if group.rank == 0 else "sum"))


DIFFERENCES = [
    (differ_in_dtype, "int32", "float32"),
    (differ_in_length, "1000000 x", "1000001 x"),
    (differ_in_operation, "called all_reduce", "called broadcast"),
    (differ_in_root, "root=0", "root=1"),
    (differ_in_reduction, "op=max", "op=sum"),
]


@pytest.mark.parametrize(("differ", "one", "other"), DIFFERENCES)
def test_a_mismatch_is_told_to_every_rank_in_the_same_words(differ, one, other):
    outcomes = run_ranks_outcomes(differ, 3, backend="gloo", timeout_s=30)
    results = [outcome.result for outcome in outcomes]
    assert [result[0] for result in results] == ["CollectiveMismatch"] * 3, outcomes
    assert results[0][1] == results[1][1] == results[2][1]
    assert one in results[0][1]
    assert other in results[0][1]


def killed_in_the_middle(group):
    group.barrier()
    if group.rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return caught(lambda: [group.all_reduce(np.ones(1_000_000)) for _ in range(10_000)])


def test_a_killed_rank_is_named_on_all_others(outcomes_of):
    outcomes = outcomes_of(killed_in_the_middle, 4)
    assert outcomes[1].signal == "SIGKILL"
    for outcome in (outcomes[0], outcomes[2], outcomes[3]):
        assert outcome.ok, outcome.describe()
        kind, text, peer = outcome.result
        assert (kind, peer) == ("PeerLost", 1), text
        assert "rank 1 (host " in text


def stay_away(group):
    if group.rank == 2:
        # Comes when the others have given up: they say so in the store.
        group._dispatcher._info.store.get("failure/verdict", deadline=float("inf"))
    return caught(lambda: group.all_reduce(np.ones(3), timeout_s=0.5))


def test_a_rank_that_stays_away_is_named_on_all_itself_included(outcomes_of):
    outcomes = outcomes_of(stay_away, 3)
    results = [outcome.result for outcome in outcomes]
    assert [result[0] for result in results] == ["CollectiveTimeout"] * 3, results
    assert "did not arrive: rank 2 (host " in results[0][1]
    assert results[0][1] == results[1][1] == results[2][1]


def raise_alone(group):
    if group.rank == 0:
        raise ValueError("a bug of the program")
    return caught(lambda: group.all_reduce(np.ones(3)))


def test_an_exception_on_one_rank_does_not_leave_the_others_waiting(outcomes_of):
    outcomes = outcomes_of(raise_alone, 3)
    assert outcomes[0].error_type == "ValueError"
    assert [outcome.result[0] for outcome in outcomes[1:]] == ["PeerLost"] * 2
    assert [outcome.result[2] for outcome in outcomes[1:]] == [0, 0]


def leave_early(group):
    """Rank 0 ends well while the others still read what it sent last."""
    x = np.full(200_000, float(group.rank))
    for _ in range(5):
        total = group.all_reduce(x)
    return float(total[0])


def test_ranks_that_end_at_different_times_all_end_well(outcomes_of):
    outcomes = outcomes_of(leave_early, 4)
    assert [outcome.result for outcome in outcomes] == [6.0] * 4, [o.describe() for o in outcomes]


def differ_while_large(group):
    odd = group.rank == 2
    x = group.empty(300_000, np.float32)
    x[...] = 1
    return caught(lambda: group.all_reduce(x, "max" if odd else "sum", out=x))


def differ_in_a_large_root(group):
    return caught(lambda: group.broadcast(np.ones(300_000), root=group.rank))


@pytest.mark.parametrize("differ", [differ_while_large, differ_in_a_large_root])
def test_a_mismatch_of_large_arrays_is_told_to_every_rank(differ):
    outcomes = run_ranks_outcomes(differ, 3, backend="gloo", timeout_s=30)
    results = [outcome.result for outcome in outcomes]
    assert [result[0] for result in results] == ["CollectiveMismatch"] * 3, results
    assert results[0][1] == results[1][1] == results[2][1]


def fail_in_a_reduction(group, size):
    def reduction(a, b, out):
        raise ZeroDivisionError("a bug of the program")

    group.barrier()
    try:
        group.all_reduce(np.ones(size), reduction)
    except (ferro.FerroError, ZeroDivisionError) as error:
        return type(error).__name__, str(error.__cause__ or error)
    return "nothing", ""


@pytest.mark.parametrize("size", [10, 300_000])
def test_an_exception_in_a_reduction_ends_the_group_on_all_ranks(outcomes_of, size):
    outcomes = outcomes_of(fail_in_a_reduction, 3, args=(size,))
    assert all(outcome.ok for outcome in outcomes), [o.describe() for o in outcomes]
    results = [outcome.result for outcome in outcomes]
    assert "nothing" not in [kind for kind, _ in results], results
    assert any("a bug of the program" in text for _, text in results), results


def interrupted_in_a_wait(group):
    group.barrier()
    if group.rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            group.barrier()
        except KeyboardInterrupt:
            return ["interrupted", "", None]
    if group.rank == 0:
        return caught(lambda: group.recv(np.empty(1), 1))
    return caught(group.barrier)


def test_an_interrupt_ends_a_wait_and_the_others_learn_of_it(outcomes_of):
    """Rank 0 comes to no barrier, so that rank 1 is interrupted while it waits."""
    outcomes = outcomes_of(interrupted_in_a_wait, 3)
    assert outcomes[1].result[0] == "interrupted", outcomes[1].describe()
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok, outcome.describe()
        assert outcome.result[0] == "GroupClosed", outcome.result
        assert "failed on rank 1 of 3: KeyboardInterrupt" in outcome.result[1]


def abort_while_waiting(group):
    """Abort on rank 0 from another thread than the one that waits."""
    group.barrier()
    if group.rank == 2:
        return caught(lambda: group.recv(np.empty(1), 0))
    if group.rank == 0:
        threading.Timer(0.2, group.abort).start()
    return caught(lambda: group.all_reduce(np.ones(100_000)))


def test_abort_from_another_thread_ends_all_waits(outcomes_of):
    outcomes = outcomes_of(abort_while_waiting, 3)
    assert [outcome.result[0] for outcome in outcomes] == ["GroupClosed"] * 3, [
        outcome.describe() for outcome in outcomes
    ]


def all_reduce_on_and_on(group, x):
    for _ in range(1000):
        group.all_reduce(x)


def go_on_without_the_dead(group):
    """Ranks 1 and 3 die one after the other; the rest goes on, each time in a new group."""
    totals, me = [], group.rank
    x = group.empty(200_000, np.float32)
    for victim in (1, 3):
        x[...] = me
        totals.append(float(group.all_reduce(x, out=x)[-1]))
        store = group._dispatcher._info.store
        store.set(f"has its total/{group.rank}", b"1")
        if me == victim:
            # Not before: what a killed rank sent last may be lost with it, and a total with that.
            for rank in range(group.world_size):
                store.get(f"has its total/{rank}", deadline=float("inf"))
            os.kill(os.getpid(), signal.SIGKILL)
        assert caught(partial(all_reduce_on_and_on, group, x))[0] == "PeerLost"
        group = group.shrink(timeout_s=10)
    x[...] = me
    totals.append(float(group.all_reduce(x, out=x)[-1]))
    totals.append(float(group.subgroup([0, 1]).all_reduce(np.ones(1))[0]) if group.rank < 2 else 2)
    return totals


def test_the_survivors_go_on_twice(outcomes_of):
    outcomes = outcomes_of(go_on_without_the_dead, 5)
    assert [outcomes[rank].signal for rank in (1, 3)] == ["SIGKILL"] * 2
    for rank in (0, 2, 4):
        assert outcomes[rank].ok, outcomes[rank].describe()
        assert outcomes[rank].result == [10.0, 9.0, 6.0, 2.0]


def fail_in_one_group(group):
    """A group fails; another with the same ranks, and arrays in the same memory, goes on."""
    other = group.subgroup(range(group.world_size))
    x = other.empty(100_000, np.float64)
    x[...] = group.rank
    group.all_reduce(x)
    kind = caught(lambda: group.broadcast(x, root=group.rank % 2, out=x))[0]
    totals = []
    for number in range(5):
        y = other.empty(100_000, np.float64)
        y[...] = number
        totals.append(float(other.all_reduce(y, out=y)[-1]))
        del y
    return [kind, totals]


def test_a_group_outlives_the_failure_of_another(outcomes_of):
    outcomes = outcomes_of(fail_in_one_group, 3)
    expected = ["CollectiveMismatch", [0.0, 3.0, 6.0, 9.0, 12.0]]
    assert [outcome.result for outcome in outcomes] == [expected] * 3, [outcome.describe() for outcome in outcomes]
