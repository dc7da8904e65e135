"""Survivors of several deaths go on as soon as all that live have come, whatever the timeout."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

import ferro
from ferro_testing import run_ranks_outcomes


def lose_two(group, decider):
    """Lose rank 3, then another rank: one that does not call shrink, or the one that decides."""
    group.barrier()
    if group.rank == 3 or (group.rank == 2 and not decider):
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(ferro.FerroError):
        while True:
            group.all_reduce(1)
    store = group._info.store.prefix("shrink/0")
    if decider and group.rank == 2:
        store.add("first/0", 1)
        store.set("decider/0", b"2")
        os.kill(os.getpid(), signal.SIGKILL)
    if decider:
        store.get("decider/0", deadline=time.monotonic() + 100)  # rank 2 was the first
    return int(group.shrink(timeout_s=600).all_reduce(1))


@pytest.mark.parametrize("decider", [False, True])
def test_survivors_of_two_deaths_wait_for_no_timeout(decider):
    outcomes = run_ranks_outcomes(lose_two, 4, backend="gloo", args=(decider,), timeout_s=120)
    assert [outcome.result for outcome in outcomes[:2]] == [2, 2], [outcome.describe() for outcome in outcomes]
