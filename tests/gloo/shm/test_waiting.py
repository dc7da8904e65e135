"""Waiting costs other threads nothing, and the processor little; ranks may outnumber the cores."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ferro_testing import run_ranks

WAIT_S = 0.8


@pytest.fixture(params=[True, False], ids=["native", "pure Python"])
def options(request):
    return {"backend_options": {"native_helper": request.param}}


def wait_for_rank_0(group):
    """Rank 0 comes late; return the processor time of another rank's wait."""
    group.barrier()
    if group.rank == 0:
        threading.Event().wait(WAIT_S)
        group.barrier()
        return 0.0
    before, began = time.process_time(), time.monotonic()
    group.barrier()
    assert time.monotonic() - began > WAIT_S / 2, "there was nothing to wait for"
    return time.process_time() - before


def test_a_long_wait_takes_little_processor_time(options):
    used = run_ranks(wait_for_rank_0, 3, backend="gloo", timeout_s=30, init_options=options)
    assert max(used) < WAIT_S / 2, used


def count_while_waiting(group):
    """Count in a thread of pure Python while the main thread waits for rank 0; return the count."""
    group.barrier()
    if group.rank == 0:
        threading.Event().wait(WAIT_S)
        group.barrier()
        return 0
    counted, ended = 0, threading.Event()

    def count():
        nonlocal counted
        while not ended.is_set():
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    group.barrier()
    ended.set()
    thread.join()
    return counted


def test_other_threads_run_while_one_waits(options):
    counted = run_ranks(count_while_waiting, 2, backend="gloo", timeout_s=30, init_options=options)
    assert counted[1] > 10_000


def compute_beside(group):
    """Many operations are outstanding while the main thread computes in pure Python."""
    arrays = [np.full(50_000, float(group.rank + number)) for number in range(20)]
    works = [group.all_reduce(array, async_op=True) for array in arrays]
    total = sum(number * number for number in range(100_000))
    assert total > 0
    return [float(work.wait()[-1]) for work in works]


def test_asynchronous_operations_progress_by_themselves(options):
    results = run_ranks(compute_beside, 3, backend="gloo", timeout_s=30, init_options=options)
    assert results == [[3.0 + 3 * number for number in range(20)]] * 3
