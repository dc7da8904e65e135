"""Calls on the short path that meet other calls, late and dead ranks, interrupts, aborts, as on the ordinary path."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

import ferro
from ferro_gloo.shm.native import ABSENT, NATIVE
from ferro_testing import run_ranks, run_ranks_outcomes

from .short_paths import Short

pytestmark = pytest.mark.skipif(NATIVE is None, reason=ABSENT)

LATE_S = 0.6


def outcomes_of(function, ranks, *args):
    return run_ranks_outcomes(function, ranks, backend="gloo", timeout_s=40, args=args)


def caught(call):
    """Describe the error that a call raises, as a rank's result."""
    try:
        call()
    except ferro.FerroError as error:
        return [type(error).__name__, str(error), error.peer]
    return ["nothing", "", None]


def ones(size, dtype=np.float32):
    return np.ones(size, dtype)


CALLS = {
    "all_reduce": lambda group: group.all_reduce(ones(4)),
    "dtype": lambda group: group.all_reduce(ones(4, np.int32)),
    "size": lambda group: group.all_reduce(ones(5)),
    "reduction": lambda group: group.all_reduce(ones(4), "max"),
    "large": lambda group: group.all_reduce(ones(300_000)),
    "barrier": lambda group: group.barrier(),
    "all_gather": lambda group: group.all_gather(ones(4)),
    "broadcast": lambda group: group.broadcast(ones(4), 0),
    "root": lambda group: group.broadcast(ones(4), 1),
    "reduce": lambda group: group.reduce(ones(4), 1),
    "scatter": lambda group: group.scatter(ones(12) if group.rank == 0 else None, out=ones(12 // group.world_size)),
    "scatter's root": lambda group: group.scatter(ones(12) if group.rank == 1 else None, 1),
    "ordinary": lambda group: group.all_reduce(ones(5), timeout_s=30),
    "asynchronous": lambda group: group.all_reduce(ones(6), async_op=True).wait(),
}
DIFFERENCES = [
    ("all_reduce", other) for other in ("dtype", "size", "reduction", "large", "barrier", "ordinary", "asynchronous")
] + [("barrier", "all_gather"), ("broadcast", "root"), ("reduce", "all_gather"), ("large", "barrier")]
DIFFERENCES += [("scatter", "barrier"), ("scatter", "scatter's root")]


def differ(group, usual, other, odd):
    for call in (usual, other):
        for _ in range(4):
            CALLS[call](group)
    began = time.monotonic()
    found = caught(lambda: CALLS[other if group.rank == odd else usual](group))
    return [*found, time.monotonic() - began]


FEW = [(ranks, odd, *calls) for ranks, odd in [(2, 1), (3, 0)] for calls in DIFFERENCES]
# In groups of more than 4 ranks an all_reduce takes two rounds.
MANY = [(6, odd, "all_reduce", other) for odd in (0, 4) for other in ("size", "large", "ordinary", "barrier")]


@pytest.mark.parametrize(("ranks", "odd", "usual", "other"), FEW + MANY)
def test_a_mismatch_is_told_to_every_rank_in_the_same_words(ranks, odd, usual, other):
    outcomes = outcomes_of(differ, ranks, usual, other, odd)
    results = [outcome.result for outcome in outcomes]
    assert all(outcome.ok for outcome in outcomes), [outcome.describe() for outcome in outcomes]
    assert [result[0] for result in results] == ["CollectiveMismatch"] * ranks, results
    assert len({result[1] for result in results}) == 1, results
    assert max(result[3] for result in results) < 30, "the ranks found it by their deadlines only"


def come_late(group, late):
    """One rank comes late; return the processor time of another rank's wait, and the result."""
    x = np.full(3, group.rank + 1.0)
    for _ in range(4):
        group.all_reduce(x)
    if group.rank == late:
        threading.Event().wait(LATE_S)
    began, used = time.monotonic(), time.process_time()
    total = group.all_reduce(x)
    used, took = time.process_time() - used, time.monotonic() - began
    if group.rank != late:
        assert took > LATE_S / 3, "there was nothing to wait for"
    return [used, float(total[0])]


@pytest.mark.parametrize(("ranks", "late"), [(2, 0), (3, 2), (5, 0), (5, 3)])
def test_a_rank_that_comes_late_costs_little_processor_time(ranks, late):
    results = run_ranks(come_late, ranks, backend="gloo", timeout_s=60, args=(late,))
    assert [total for _, total in results] == [ranks * (ranks + 1) / 2] * ranks
    assert max(used for used, _ in results) < LATE_S / 2, results


def go_without(group, timeout_s):
    for _ in range(4):
        group.all_reduce(ones(4))
    if group.rank == 1:
        # Comes when the others have given up: they say so in the store.
        group._dispatcher._info.store.get("failure/verdict", deadline=float("inf"))
    return caught(lambda: group.all_reduce(ones(4)))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_rank_that_stays_away_is_named_on_all_itself_included(ranks):
    """The rank that comes after the deadline finds no sum of numbers that the others have taken back."""
    outcomes = run_ranks_outcomes(
        go_without, ranks, backend="gloo", timeout_s=40, args=(1.0,), init_options={"timeout_s": 1.0}
    )
    assert all(outcome.ok for outcome in outcomes), [outcome.describe() for outcome in outcomes]
    results = [outcome.result for outcome in outcomes]
    assert [result[0] for result in results] == ["CollectiveTimeout"] * ranks, results
    assert "did not arrive: rank 1 (host " in results[0][1]


def killed_between_calls(group, victim):
    for step in range(1_000_000):
        if group.rank == victim and step == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        found = caught(lambda: group.all_reduce(ones(4)))
        if found[0] != "nothing":
            survivors = group.shrink(timeout_s=20)
            totals = [float(survivors.all_reduce(ones(4))[0]) for _ in range(5)]
            return [found[0], found[2], totals]
    return ["nothing", None, []]


@pytest.mark.parametrize(("ranks", "victim"), [(2, 1), (3, 0), (5, 0), (5, 4)])
def test_a_killed_rank_is_named_and_the_survivors_go_on(ranks, victim):
    outcomes = outcomes_of(killed_between_calls, ranks, victim)
    assert outcomes[victim].signal == "SIGKILL"
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert outcome.ok, outcome.describe()
            assert outcome.result == ["PeerLost", victim, [ranks - 1.0] * 5]


def interrupted(group, repeats):
    for _ in range(4):
        group.all_reduce(ones(4))
    group.barrier(timeout_s=30)
    if group.rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            if repeats:
                while True:
                    group.all_reduce(ones(4))
            group.all_reduce(ones(4))
        except KeyboardInterrupt:
            return ["interrupted", "", None]
    if group.rank == 0 and not repeats:
        return caught(lambda: group.recv(np.empty(1), 1))
    while True:
        found = caught(lambda: group.all_reduce(ones(4)))
        if found[0] != "nothing":
            return found


@pytest.mark.parametrize("repeats", [False, True], ids=["in a wait", "in a loop of calls"])
@pytest.mark.usefixtures("default_sigint")
def test_an_interrupt_ends_the_group(repeats):
    outcomes = outcomes_of(interrupted, 3, repeats)
    assert all(outcome.ok for outcome in outcomes), [outcome.describe() for outcome in outcomes]
    assert outcomes[1].result[0] == "interrupted", outcomes[1].describe()
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.result[0] in ("GroupClosed", "PeerLost"), outcome.result


def aborted(group):
    for _ in range(4):
        group.all_reduce(ones(4))
    if group.rank == 2:
        return caught(lambda: group.recv(np.empty(1), 0))
    if group.rank == 0:
        threading.Timer(0.2, group.abort).start()
    return caught(lambda: group.all_reduce(ones(4)))


def test_abort_from_another_thread_ends_the_waits():
    outcomes = outcomes_of(aborted, 3)
    assert [outcome.result[0] for outcome in outcomes] == ["GroupClosed"] * 3, [o.describe() for o in outcomes]


def close_then_call(group):
    short = Short(group, "all_reduce", np.dtype(np.float32), 4, "sum")
    bound = short.path.bind(ones(4), ones(4))
    assert bound()
    other = group.subgroup(range(group.world_size))
    other.all_reduce(ones(4))
    path = Short(other, "all_reduce", np.dtype(np.float32), 4, "sum").path
    other.close()
    assert path(ones(4), ones(4)) is False
    group.barrier()
    group.abort()
    assert bound() is False
    assert bound.start() is False
    return caught(lambda: group.all_reduce(ones(4)))[0]


def test_a_closed_or_aborted_group_has_no_short_path():
    assert run_ranks(close_then_call, 2, backend="gloo", timeout_s=60) == ["GroupClosed"] * 2


def leave_early(group):
    for _ in range(4):
        total = group.all_reduce(ones(4) * group.rank)
    return float(total[0])


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_that_end_at_different_times_all_end_well(ranks):
    outcomes = outcomes_of(leave_early, ranks)
    assert [outcome.result for outcome in outcomes] == [sum(range(ranks))] * ranks, [o.describe() for o in outcomes]


def threads_run(group):
    """A thread of pure Python counts while the main thread waits for rank 0."""
    for _ in range(4):
        group.all_reduce(ones(4))
    if group.rank == 0:
        threading.Event().wait(LATE_S)
        group.all_reduce(ones(4))
        return 0
    counted, ended = 0, threading.Event()

    def count():
        nonlocal counted
        while not ended.is_set():
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    group.all_reduce(ones(4))
    ended.set()
    thread.join()
    return counted


def test_other_threads_run_while_one_waits():
    assert run_ranks(threads_run, 2, backend="gloo", timeout_s=60)[1] > 10_000
