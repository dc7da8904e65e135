"""Progress counters between threads and between processes, with the native helper and without.

Run as a program, this file is the ranks of `test_data_is_seen_with_the_counter`.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ferro.errors import UsageError
from ferro_gloo.shm import counters as module
from ferro_gloo.shm.counters import COUNTER_STRIDE, ProgressCounters, counters_bytes, pure_python_is_safe
from ferro_gloo.shm.native import ABSENT

LONG_S = 30.0
NUMBERS = 500
NATIVE = pytest.param(True, id="native", marks=pytest.mark.skipif(not module.NATIVE_IS_AVAILABLE, reason=ABSENT))
PURE = pytest.param(
    False, id="pure", marks=pytest.mark.skipif(not pure_python_is_safe(), reason="plain stores may be seen late")
)

Make = Callable[..., ProgressCounters]


@pytest.fixture(params=[NATIVE, PURE])
def native(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, 4096))


@pytest.fixture(params=[True, False], ids=["spin", "yield"])
def make(native: bool, memory: memoryview, request: pytest.FixtureRequest) -> Make:
    """Makes the counters of one of several ranks in the memory."""

    def counters(ranks: int, rank: int) -> ProgressCounters:
        return ProgressCounters(memory, ranks, rank, native=native, spin=request.param)

    return counters


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], object]], Callable[[], object]]]:
    """Starts a function in a thread; returns a function that waits for its result."""
    threads: list[threading.Thread] = []

    def start(function: Callable[[], object]) -> Callable[[], object]:
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
        threads.append(thread)
        thread.start()

        def result() -> object:
            thread.join(LONG_S / 3)
            assert results, "the thread did not end in time"
            return results[0]

        return result

    yield start
    for thread in threads:
        thread.join(2 * LONG_S)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S / 3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_is_there_needs_no_waiting(make: Make):
    ranks = [make(3, rank) for rank in range(3)]
    for step, value in enumerate([1, 2, 2**40]):
        for counters in ranks:
            counters.publish(value + step)
        for counters in ranks:
            assert counters.wait(value, 0.0) is None
            assert counters.wait(value + step, 0.0) is None
            assert counters.behind(value) == []


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.01])
def test_tells_the_first_that_is_behind(make: Make, seconds: float):
    for rank, value in enumerate([5, 4, 5, 3]):
        make(4, rank).publish(value)
    assert make(4, 0).wait(5, seconds) == 1
    assert make(4, 3).wait(4, seconds) == 3
    assert make(4, 3).wait(3, seconds) is None
    assert make(4, 3).behind(5) == [1, 3]


def test_publishing_touches_no_other_rank(memory: memoryview, make: Make):
    make(4, 2).publish(-2)
    expected = bytearray(4096)
    struct.pack_into("=q", expected, 2 * COUNTER_STRIDE, -2)
    assert bytes(memory) == expected


def test_a_sleeper_is_woken(native: bool, memory: memoryview, make: Make, in_thread):
    """While it sleeps this thread runs, or the sleeper's time would pass before it is woken."""
    waiting = make(2, 0)
    waiting.publish(7)
    result = in_thread(lambda: waiting.wait(7, LONG_S))
    if native:
        until(lambda: struct.unpack_from("=I", memory, COUNTER_STRIDE + 8)[0] == 1)
    make(2, 1).publish(6)
    make(2, 1).publish(7)
    assert result() is None
    assert struct.unpack_from("=I", memory, COUNTER_STRIDE + 8)[0] == 0


def test_all_sleepers_are_woken(native: bool, memory: memoryview, make: Make, in_thread):
    results = [in_thread(lambda: make(2, 0).wait(1, LONG_S)) for _ in range(5)]
    if native:
        until(lambda: struct.unpack_from("=I", memory, 8)[0] == 5)
    make(2, 1).publish(1)
    make(2, 0).publish(1)
    assert [result() for result in results] == [None] * 5


def test_two_threads_meet_many_times(make: Make, in_thread):
    """A wake-up that was lost would show as a rank that is behind."""

    def rank(counters: ProgressCounters) -> list[int | None]:
        results = []
        for value in range(1, NUMBERS):
            counters.publish(value)
            results.append(counters.wait(value, LONG_S / 4))
        return results

    other = in_thread(lambda: rank(make(2, 1)))
    assert rank(make(2, 0)) == [None] * (NUMBERS - 1)
    assert other() == [None] * (NUMBERS - 1)


def test_a_signal_ends_the_wait_whenever_it_comes(make: Make):
    """Some of the signals come just before the wait goes to sleep."""

    class Rang(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Rang

    def wait(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        make(2, 0).wait(1, LONG_S)
        make(2, 0).wait(1, 0.0)  # by now the handler has run

    before = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    try:
        for number in range(12):
            with pytest.raises(Rang):
                wait(0.02 if number == 0 else 3e-5 * number)
        assert time.monotonic() - began < LONG_S
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("ranks", "rank", "nbytes"), [(2, 2, 4096), (2, -1, 4096), (2, 0, 511), (17, 0, 4096)])
def test_the_memory_must_have_room(native: bool, ranks: int, rank: int, nbytes: int):
    memory = memoryview(bytearray(nbytes))
    with pytest.raises(UsageError, match=f"rank {rank} of {ranks} needs counters of"):
        ProgressCounters(memory, ranks, rank, native=native, spin=False)


def test_a_helper_that_is_not_there_is_not_replaced_quietly(memory, monkeypatch):
    monkeypatch.setattr(module, "NATIVE", None)
    with pytest.raises(UsageError, match="Install a C compiler"):
        ProgressCounters(memory, 2, 0, native=True, spin=False)
    ProgressCounters(memory, 2, 0, native=False, spin=False).publish(1)


@pytest.mark.parametrize(("machine", "safe"), [("x86_64", True), ("aarch64", False)])
def test_pure_python_needs_ordered_stores(monkeypatch, machine: str, safe: bool):
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    assert pure_python_is_safe() is safe


@pytest.mark.parametrize(("ranks", "spin"), [(2, True), (5, False)], ids=["2 ranks", "5 ranks"])
def test_data_is_seen_with_the_counter(native: bool, ranks: int, spin: bool):
    """Processes, also more than cores, write data and publish it, round after round."""
    command = [sys.executable, __file__, str(ranks), str(int(native)), str(int(spin))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * LONG_S)
    assert ended.returncode == 0, ended.stderr


def run_ranks(ranks: int, native: bool, spin: bool) -> int:
    """Fork the ranks; return how many failed."""
    shared = memoryview(mmap.mmap(-1, counters_bytes(ranks) + 2 * ranks * NUMBERS * 8))
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            run_rank(shared, ranks, rank, native, spin)
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def run_rank(shared: memoryview, ranks: int, rank: int, native: bool, spin: bool) -> None:
    """Fill this rank's row of the round's table, publish, wait for all, and check the table."""
    counters = ProgressCounters(shared[: counters_bytes(ranks)], ranks, rank, native=native, spin=spin)
    tables = np.frombuffer(shared[counters_bytes(ranks) :], np.int64).reshape(2, ranks, NUMBERS)
    for number in range(1, 301):
        table = tables[number % 2]
        table[rank] = number
        counters.publish(number)
        behind = counters.wait(number, LONG_S / 3)
        assert behind is None, f"round {number}: rank {behind} did not come"
        assert (table == number).all(), f"round {number}: data came after its counter: {table}"


if __name__ == "__main__":
    world_size, with_native, with_spin = map(int, sys.argv[1:])
    sys.exit(run_ranks(world_size, bool(with_native), bool(with_spin)))
