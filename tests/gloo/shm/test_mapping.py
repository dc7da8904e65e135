"""Whether another thread uses shared memory is found out while threads go on, come and end."""

import sys
import threading
import time

import numpy as np

from ferro_gloo.shm.counters import ProgressCounters
from ferro_gloo.shm.mapping import is_used_by_other_threads

LIMIT_S = 60.0


def until(condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline


def test_a_thread_that_waits_in_a_collective_is_found():
    memory = np.zeros(4096, np.uint8).data
    mine, other = (ProgressCounters(memory, 2, rank, native=False, spin=False) for rank in range(2))
    assert not is_used_by_other_threads()
    waiting = threading.Thread(target=mine.wait, args=(1, LIMIT_S))
    waiting.start()
    try:
        until(is_used_by_other_threads)
    finally:
        mine.publish(1)
        other.publish(1)
        waiting.join(LIMIT_S)
    assert not is_used_by_other_threads()


def test_threads_beyond_those_that_are_listed_may_use_it():
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, args=(LIMIT_S,)) for _ in range(120)]
    for thread in threads:
        thread.start()
    try:
        assert is_used_by_other_threads()
    finally:
        end.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert not is_used_by_other_threads()


def test_others_call_and_return_all_the_time():
    before, end = sys.getswitchinterval(), time.monotonic() + 0.5

    def descend(depth):
        return descend(depth - 1) if depth else [time.sleep(0)]

    def go_on():
        while time.monotonic() < end:
            descend(20)

    def come_and_end():
        while time.monotonic() < end:
            thread = threading.Thread(target=descend, args=(20,))
            thread.start()
            thread.join(LIMIT_S)

    threads = [threading.Thread(target=target) for target in (go_on, go_on, come_and_end)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            assert not is_used_by_other_threads()
    finally:
        sys.setswitchinterval(before)
        for thread in threads:
            thread.join(LIMIT_S)
