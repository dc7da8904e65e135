"""The options of the backend, and the GPU that a process uses."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ferro import UsageError
from ferro_nccl.process_context import NcclOptions


def test_the_option_device(machine, on_ranks):
    assert on_ranks(1, lambda group: machine.here.device, options={"device": 3}) == {0: 3}


def test_no_thread_makes_a_context_on_another_gpu(machine, on_ranks):
    """New threads begin on GPU 0, where a context takes memory that its own rank needs."""

    def work(group):
        unblock = machine.block(group.backend._queue.stream)
        handle = group.all_reduce(machine.array([1.0]), async_op=True)
        later = group.all_reduce(np.ones(3), async_op=True)  # in a thread of the group's
        for look in (handle.done, group.backend._queue.poll):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(10)
        unblock.set()
        later.wait()
        group.split(0).close()

    on_ranks(1, work, options={"device": 2})
    assert machine.contexts == {2}


def test_a_thread_that_uses_another_gpu_is_left_there(machine, on_ranks):
    def work(group):
        machine._set_device(1)
        group.barrier()
        return machine.here.device

    assert on_ranks(1, work, options={"device": 2}) == {0: 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 1}, "nccl has no option devices"),
        ({"device": "cuda:0"}, "number of a GPU, not 'cuda:0'"),
        ({"device": True}, "number of a GPU"),
        ({"device": -1}, "number of a GPU"),
        ({"check_calls": 1}, "check_calls is True or False"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        NcclOptions.parse(options)
