"""When to save, and what to keep: pure functions of steps, clocks and metrics."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from ferro import UsageError
from ferro_checkpoint import Best, Checkpointer, Continuous, Every, Last
from ferro_checkpoint.checkpointer.every import SaveSchedules
from ferro_checkpoint.checkpointer.keep import Saved

NOBODY = bytes(8)
BUSY = bytes([0, 0, 0, 1, 0, 0, 0, 0])


def due(schedules, steps, agreed=None):
    return [step for step in steps if schedules.due(step, agreed)[0]]


def test_a_multiple_of_the_steps_is_due_even_if_it_is_passed_over():
    assert due(SaveSchedules(Every(steps=3), None), range(9)) == [3, 6]
    assert due(SaveSchedules(Every(steps=3), None), [0, 2, 4, 8, 9, 9, 20]) == [4, 8, 9, 20]
    assert due(SaveSchedules(Every(steps=3) | Every(steps=4), None), range(1, 9)) == [3, 4, 6, 8]
    resumed = SaveSchedules(Every(steps=3), Every(steps=2))
    resumed.resumed(7)
    assert [resumed.due(step, None) for step in (8, 9)] == [(False, True), (True, False)]
    assert not resumed.needs_agreement


def test_time_and_idleness_are_agreed_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    schedules = SaveSchedules(Every(minutes=2), Continuous())
    assert schedules.needs_agreement
    assert [schedules.due(1, agreed) for agreed in (None, BUSY, NOBODY)] == [(False,) * 2, (False,) * 2, (False, True)]
    assert schedules.due_by_clock() == (False, False)
    now[0] += 120
    assert schedules.due_by_clock() == (True, False)
    assert schedules.due(2, bytes([1, 0, 0, 1, 0, 0, 0, 0])) == (True, False)
    schedules.began(disk=False)
    assert schedules.due_by_clock() == (True, False)
    schedules.began(disk=True)
    assert schedules.due_by_clock() == (False, False)


def test_the_last_and_the_best_are_kept():
    losses = [5.0, 1.0, 3.0, math.nan, 1.0, 4.0]
    saved = [Saved(str(step), step, {"loss": loss}) for step, loss in enumerate(losses)] + [Saved("6", 6, {})]
    assert Last(2).kept(saved) == {"5", "6"}
    assert Best("loss", 3).kept(saved) == {"4", "1", "2"}
    assert Best("loss", 2, mode="max").kept(saved) == {"0", "5"}
    assert (Last(1) | Best("loss", 1) | Best("loss", 1, mode="max")).kept(saved) == {"6", "4", "0"}
    assert Best("accuracy", 1).kept(saved) == set()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(), "either steps or minutes"),
        (lambda: Every(steps=0), "a whole number from 1, not 0"),
        (lambda: Every(minutes=-1), "a positive number, not -1"),
        (lambda: SaveSchedules(Every(steps=5) | 3, None), "not 3"),
        (lambda: Last(0), "from 1, not 0"),
        (lambda: Best("loss", 1, mode="least"), "'min' or 'max', not 'least'"),
        (lambda: Checkpointer(None), "without a directory, give in_memory"),
        (lambda: Every(minutes="x"), "a positive number, not 'x'"),
        (lambda: Last(1) | Every(steps=1), "what to keep is .*, not Every"),
        (lambda: Every(steps=1) | Last(1), "a policy is Every.*, not Last"),
        (lambda: Best(3, 1), "metric is the name"),
        (lambda: Checkpointer("x", timeout_s="x"), "timeout_s is a positive number of seconds, not 'x'"),
        (lambda: Checkpointer("x", preemption_s=math.nan), "preemption_s is a positive number"),
        (lambda: Checkpointer("x", 3), "group is 3"),
        (lambda: Checkpointer(3), "3 is no path"),
        (lambda: Checkpointer("x").step(1, {}, loss="low"), "metric 'loss' is a number, not str 'low'"),
        (lambda: Checkpointer("x").step(1, {}, loss=np.ones(2)), "metric 'loss' is a number, not ndarray"),
        (lambda: Checkpointer("x", timeout_s=0), "timeout_s is a positive number"),
        (lambda: Checkpointer("x", every=500), "a policy is Every"),
        (lambda: Checkpointer("x", keep=3), "keep is Last"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
