"""What every rank is told when one dies, stalls, differs or raises: real processes and sockets."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

import ferro
from ferro.testing import run_ranks_outcomes


def caught(call):
    """Return what a call raises, as a rank's result."""
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


def test_a_killed_rank_is_named_on_all_others():
    outcomes = run_ranks_outcomes(killed_in_the_middle, 4, backend="gloo", timeout_s=30)
    assert outcomes[1].signal == "SIGKILL"
    for outcome in (outcomes[0], outcomes[2], outcomes[3]):
        assert outcome.ok, outcome.describe()
        kind, text, peer = outcome.result
        assert (kind, peer) == ("PeerLost", 1), text
        assert "rank 1 (host " in text


def stay_away(group):
    if group.rank == 2:
        # Comes when the others have given up: they say so in the store.
        group._members.store.get("death/certificate", deadline=float("inf"))
    return caught(lambda: group.all_reduce(np.ones(3), timeout_s=0.5))


def test_a_rank_that_stays_away_is_named_on_all_itself_included():
    outcomes = run_ranks_outcomes(stay_away, 3, backend="gloo", timeout_s=30)
    results = [outcome.result for outcome in outcomes]
    assert [result[0] for result in results] == ["CollectiveTimeout"] * 3, results
    assert "did not arrive: rank 2 (host " in results[0][1]
    assert results[0][1] == results[1][1] == results[2][1]


def raise_alone(group):
    if group.rank == 0:
        raise ValueError("a bug of the program")
    return caught(lambda: group.all_reduce(np.ones(3)))


def test_an_exception_on_one_rank_does_not_leave_the_others_waiting():
    outcomes = run_ranks_outcomes(raise_alone, 3, backend="gloo", timeout_s=30)
    assert outcomes[0].error_type == "ValueError"
    assert [outcome.result[0] for outcome in outcomes[1:]] == ["PeerLost"] * 2
    assert [outcome.result[2] for outcome in outcomes[1:]] == [0, 0]


def leave_early(group):
    """Rank 0 ends well while the others still read what it sent last."""
    x = np.full(200_000, float(group.rank))
    for _ in range(5):
        total = group.all_reduce(x)
    return float(total[0])


def test_ranks_that_end_at_different_times_all_end_well():
    outcomes = run_ranks_outcomes(leave_early, 4, backend="gloo", timeout_s=30)
    assert [outcome.result for outcome in outcomes] == [6.0] * 4, [o.describe() for o in outcomes]
