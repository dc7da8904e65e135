"""Persistent operations and remembered calls over shared memory: interrupts, steps that nobody awaits, odd arrays."""

import contextlib
import signal
import time

import numpy as np
import pytest

import ferro
from ferro_testing import run_ranks

DEADLINE_S = 60


class Stop(BaseException):
    """Raised by a signal handler of the program."""


def interrupt(group, size, after_s):
    """Interrupt rank 0 in a call for which rank 1 is late; return what each rank finds then."""
    x = np.full(size, 1.0 + group.rank, np.float32)
    out = np.empty_like(x)
    for _ in range(3):
        group.all_reduce(x, out=out)
    group.barrier()
    if group.rank == 0:

        def stop(number, frame):
            raise Stop

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, after_s)
        try:
            while True:
                group.all_reduce(x, out=out)
        except Stop:
            return group.state
    time.sleep(0.3)
    with contextlib.suppress(ferro.FerroError):
        while True:
            assert (group.all_reduce(x, out=out) == 3.0).all()
    return group.state


@pytest.mark.parametrize("size", [2, 20_000, 500_000])
@pytest.mark.parametrize("after_s", [0.004, 0.1])
def test_an_exception_of_a_signal_handler_ends_the_group_in_a_fast_call(size, after_s):
    assert run_ranks(interrupt, 2, backend="gloo", args=(size, after_s), timeout_s=DEADLINE_S) == ["dead", "dead"]


def leave_started(group):
    step = group.persistent("all_reduce", np.ones(2))
    group.barrier()
    began = time.monotonic()
    if group.rank == 0:
        with contextlib.suppress(ValueError), group:
            step.start()
            raise ValueError
        return time.monotonic() - began
    with pytest.raises(ferro.FerroError):
        group.recv(np.empty(1), 0)
    return time.monotonic() - began


def test_a_program_that_fails_leaves_a_started_step_behind_at_once():
    assert max(run_ranks(leave_started, 2, backend="gloo", timeout_s=DEADLINE_S)) < 20


def start_on_five(group):
    """Rank 0 starts a step, and then waits for a rank that waits for the step."""
    step = group.persistent("all_reduce", np.ones(2), timeout_s=20.0)
    if group.rank == 0:
        step.start()
        group.recv(np.empty(1), 1)
        return step.wait().tolist()
    found = step().tolist()
    if group.rank == 1:
        group.send(np.zeros(1), 0)
    return found


def test_a_started_step_goes_on_beside_rank_0():
    assert run_ranks(start_on_five, 5, backend="gloo", timeout_s=DEADLINE_S) == [[5.0, 5.0]] * 5


def poll(group):
    first, second = (group.persistent("all_reduce", np.ones(2)) for _ in range(2))
    if group.rank:
        time.sleep(0.3)
    first.start()
    second.start()
    while not first.done():
        time.sleep(0.001)
    return [first.wait().tolist(), second.wait().tolist()]


def test_a_step_may_be_asked_whether_it_has_ended_while_another_operation_finishes_it():
    assert run_ranks(poll, 2, backend="gloo", timeout_s=DEADLINE_S) == [[[2.0, 2.0], [2.0, 2.0]]] * 2


def move_unusual(group):
    """Scatter a list, and reduce arrays that are not aligned, again and again, small and large."""
    for size in (4, 400_000):
        source = list(range(size)) if group.rank == 0 else None
        for _ in range(3):
            block = group.scatter(source, 0)
            assert block.tolist() == list(range(size))[group.rank * size // 2 : (group.rank + 1) * size // 2]
        x = np.frombuffer(bytearray(8 * size + 1), np.float64, offset=1)
        for _ in range(3):
            x[:] = 1.0
            assert (group.all_reduce(x, out=x) == 2.0).all()
            assert (group.reduce_scatter(x) == 4.0).all()
    return True


def test_lists_and_arrays_that_are_not_aligned():
    assert run_ranks(move_unusual, 2, backend="gloo", timeout_s=DEADLINE_S) == [True, True]


def gather_overlapping(group):
    """Gather from this rank's block of the result, and then from memory that only overlaps it in part."""
    size = 200_000
    memory = np.zeros(3 * size)
    out = memory[: 2 * size]
    start = group.rank * size
    for shift in (0, 1000):
        block = memory[start + shift : start + shift + size]
        block[:] = 10.0 * shift + group.rank
        result = group.gather(block, 0, out=out if group.rank == 0 else None, timeout_s=30)
        if group.rank == 0:
            assert (result[:size] == 10.0 * shift).all()
            assert (result[size:] == 10.0 * shift + 1).all()
    return True


def test_a_large_gather_whose_input_overlaps_its_result():
    assert run_ranks(gather_overlapping, 2, backend="gloo", timeout_s=DEADLINE_S) == [True, True]


def abort_beside(group):
    """Rank 1 aborts the group while the others are in a step, started or not."""
    step = group.persistent("all_reduce", np.ones(2))
    step()
    if group.rank == 1:
        time.sleep(0.3)
        group.abort()
        return group.state
    if group.rank == 2:
        step.start()
    with pytest.raises(ferro.GroupClosed):
        step.wait() if group.rank == 2 else step()
    with pytest.raises(ferro.GroupClosed):
        step()
    step.close()
    return group.state


def test_an_abort_ends_steps_that_are_under_way():
    assert run_ranks(abort_beside, 3, backend="gloo", timeout_s=DEADLINE_S) == ["dead"] * 3
