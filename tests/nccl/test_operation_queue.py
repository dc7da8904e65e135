"""Work on the GPU before and after an operation is ordered without the host."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

N = 2


def test_an_operation_waits_for_what_the_caller_launched_before(machine, on_ranks):
    """The operation reads an array that the caller's stream fills late; the host does not wait."""

    def work(group):
        x = machine.array(np.zeros(4))
        unblock = machine.block()
        x[...] = np.full(4, group.rank + 1.0)
        total = group.all_reduce(x)  # returns while the stream stands still
        unblock.set()
        return machine.host(total).tolist()

    assert on_ranks(N, work) == dict.fromkeys(range(N), [3.0] * 4)


def test_what_the_caller_launches_next_waits_for_the_operation(machine, on_ranks):
    """A rank launches the consumer of a result before the other rank has even come."""
    launched = threading.Event()

    def work(group):
        if group.rank == 1:
            assert launched.wait(10)
        total = group.all_reduce(machine.array(np.ones(4)))
        twice = np.multiply(total, 2.0)
        launched.set()
        return machine.host(twice).tolist()

    assert on_ranks(N, work) == dict.fromkeys(range(N), [4.0] * 4)


def test_streams_of_the_callers_choice(machine, on_ranks):
    """The operation is ordered against the stream that is current when it is launched."""

    def work(group):
        own = machine.cupy["cupy"].cuda.Stream(non_blocking=True)
        standing = machine.block()  # the default stream, which has nothing to do with it
        with own:
            x = machine.empty((3,), float)
            unblock = machine.block()
            x[...] = np.arange(3.0)
            work = group.all_reduce(x, async_op=True)
            unblock.set()
            found = machine.host(work.wait()).tolist()
        standing.set()
        return found

    assert on_ranks(N, work) == {key: [0.0, 2.0, 4.0] for key in range(N)}


def test_work_is_done_when_the_device_is(machine, on_ranks):
    def work(group):
        x = machine.array(np.ones(4))
        unblock = machine.block()
        handle = group.all_reduce(x, async_op=True)
        before = handle.done()
        unblock.set()
        total = machine.host(handle.wait())
        return before, handle.done(), total.tolist()

    assert on_ranks(N, work) == dict.fromkeys(range(N), (False, True, [2.0] * 4))


def test_many_outstanding_operations_keep_their_own_inputs(machine, on_ranks):
    def work(group):
        x = machine.array(np.zeros(3))
        unblock = machine.block()
        works = []
        for k in range(20):
            x[...] = np.full(3, float(k))
            works.append(group.all_reduce(x, async_op=True))
        unblock.set()
        return [machine.host(handle.wait())[0] for handle in works]

    assert on_ranks(N, work) == {key: [2.0 * k for k in range(20)] for key in range(N)}


def test_buffers_are_held_until_the_device_has_read_them(machine, on_ranks):
    """The stand-in frees memory in the order of its own stream, and records its use after that."""

    def work(group):
        unblock = machine.block(group.backend._queue.stream)
        x = machine.array(np.arange(1000.0))
        group.broadcast(x, 0, out=x, async_op=True)
        del x
        gc.collect()
        machine.current_stream().synchronize()
        unblock.set()
        group.barrier()

    on_ranks(N, work)  # the fixture finds no fault


def test_buffers_are_let_go_when_it_has_ended(machine, on_ranks):
    def work(group):
        for _ in range(3):
            group.all_reduce(machine.array(np.ones(1000)))
        group.barrier()
        queue = group.backend._queue
        return queue.drain(0.0), len(queue._outstanding), queue.last._holds

    assert on_ranks(N, work) == dict.fromkeys(range(N), (True, 0, []))


def test_a_barrier_waits_for_all_ranks(machine, on_ranks):
    late, left = threading.Event(), []

    def work(group):
        if group.rank == 1:
            late.wait(0.05)
            assert left == []
        group.barrier()
        left.append(group.rank)

    on_ranks(N, work)
    assert sorted(left) == [0, 1]
    kinds = {kind for _, kind in machine.nccl.calls}
    assert kinds == {"all_reduce"}  # one of no elements would be dropped


@pytest.mark.parametrize("asynchronous", [False, True])
def test_host_arrays_are_staged_and_waited_for(machine, on_ranks, asynchronous):
    def work(group):
        result = group.all_reduce(np.arange(3.0), async_op=asynchronous)
        return (result.wait() if asynchronous else result).tolist()

    assert on_ranks(N, work) == {key: [0.0, 2.0, 4.0] for key in range(N)}
