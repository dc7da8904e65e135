"""Progress counters in shared memory, by which the ranks of a host wait for each other's data.

Every rank has a counter that only grows. The rank writes its data, then publishes its counter; another rank that has
waited for the counter sees the data. A wait loads the counters, spins for a while, then yields the core to other
threads, then sleeps. Where a host has more ranks than cores a rank does not spin, because that would keep the core from
the rank that it waits for. In the thread of asynchronous operations (see `ferro.group.serial_executor`) a wait sleeps
almost at once, because the caller's thread may be computing and needs the core.

Memory order: the native helper stores counters with release and loads them with acquire, on any processor. Pure Python
has only plain stores and loads: `memoryview` copies an aligned int64 with one machine instruction. They are enough on
x86-64, and only there, because other cores see a core's stores in the order in which it made them, and loads keep their
order too. (memcpy may use non-temporal stores, which do not keep this order, but ends with a fence.)
"""

from __future__ import annotations

import os
import platform
import time

from ferro.errors import UsageError
from ferro.group.serial_executor import on_executor_thread
from ferro_gloo.shm.native import ABSENT, NATIVE

# Some processors fetch two cache lines at a time; with this stride no two counters share them.
COUNTER_STRIDE = 256
NATIVE_IS_AVAILABLE = NATIVE is not None

_STRIDE_WORDS = COUNTER_STRIDE // 8
# Measured on two cores. Being woken from sleep costs 15 to 20 us, a pause 20 ns, a yield 0.35 us. With 4 ranks on 2
# cores a round of publishing and waiting takes 19 us with sleep alone, 29 us with spinning and sleep, 2 us with yields
# and sleep; more yields than 20 change nothing there. But an idle core takes 50 to 100 us to wake up. A rank that goes
# to sleep while the core of the other is waking up makes the other rank sleep next: bursts of all_reduces of 4 bytes, 2
# ranks with a core each, took 10 to 60 us on average with 100 yields before sleep, 8 with 1000. The thread of
# asynchronous operations competes with its caller's computation. Beside matrix products, 2 ranks on 2 cores that others
# used too, 2 all_reduces of 25 MiB of private arrays ended after 47 ms with the spins and yields of a caller's thread,
# after 31 ms with its own (medians of one run); 16 of 1 MiB after 96 and 68 ms, from group.empty after 114 and 60 ms.
# Later runs, with short switch intervals (`ferro.group.serial_executor`), agree on 25 MiB of private arrays, and show
# no difference on the others.
_NATIVE_SPINS = 2000
_NATIVE_SPINS_BESIDE_CALLER = 200
_NATIVE_YIELDS = 1000
_READS = 300
_YIELDS = 500
_MIN_SLEEP_S = 20e-6
_MAX_SLEEP_S = 1e-3


def counters_bytes(ranks: int) -> int:
    """Compute the size of the counters of `ranks` ranks."""
    return ranks * COUNTER_STRIDE


def native_spins(spin: bool) -> int:
    """Choose the number of loads before the native helper yields; `spin` as for `ProgressCounters`."""
    return _NATIVE_SPINS if spin else 0


def pure_python_is_safe() -> bool:
    """Return True if this processor makes plain stores visible in order, as x86-64 does."""
    return platform.machine() in ("x86_64", "AMD64")


class ProgressCounters:
    """The counters of a group, as one rank sees them. New shared memory is zero, and so are the counters at first.

    Args:
        memory: writable shared memory, aligned to 8 bytes, of at least `counters_bytes(ranks)`.
        ranks: the number of ranks.
        rank: the rank whose counter `publish` moves.
        native: use the native helper. All ranks must agree: pure Python wakes no sleepers.
        spin: spin for some tens of microseconds before yielding; True where each rank has a core.

    Raises:
        UsageError: the native helper is not built here, or the memory is too small.
    """

    __slots__ = ("_counters", "_indices", "_memory", "_native", "_own", "_ranks", "_reads", "_spins")

    def __init__(self, memory: memoryview, ranks: int, rank: int, *, native: bool, spin: bool) -> None:
        if native and NATIVE is None:
            raise UsageError(f"{ABSENT}. Install a C compiler, then ferro-gloo again.")
        if memory.nbytes < counters_bytes(ranks) or not 0 <= rank < ranks:
            raise UsageError(
                f"rank {rank} of {ranks} needs counters of {counters_bytes(ranks)} bytes, not {memory.nbytes}"
            )
        self._native = NATIVE if native else None
        self._memory = memory
        self._counters = memory[: counters_bytes(ranks)].cast("q")
        self._ranks = ranks
        self._own = rank * _STRIDE_WORDS
        self._indices = range(0, ranks * _STRIDE_WORDS, _STRIDE_WORDS)
        self._spins = native_spins(spin)
        self._reads = _READS if spin else 1

    def publish(self, value: int) -> None:
        """Move this rank's counter to `value`: others may read all that it has written so far."""
        if self._native is None:
            self._counters[self._own] = value
        else:
            self._native.publish(self._memory, self._own * 8, value)

    def wait(self, value: int, seconds: float) -> int | None:
        """Wait until every counter is at least `value`; other threads run meanwhile.

        Returns:
            None; or, after at most `seconds` or a signal, the first rank that is behind.
        """
        if self._native is not None:
            spins, yields = self.patience()
            return self._native.wait(self._memory, 0, COUNTER_STRIDE, self._ranks, value, spins, yields, seconds)
        counters = self._counters
        for index in self._indices:
            if counters[index] < value:
                return self._wait_in_python(value, time.monotonic() + seconds)
        return None

    def patience(self) -> tuple[int, int]:
        """Return the spins and yields of the native helper before it sleeps; see `NativeModule.wait`."""
        if on_executor_thread():
            return min(self._spins, _NATIVE_SPINS_BESIDE_CALLER), 0
        return self._spins, _NATIVE_YIELDS

    def behind(self, value: int) -> list[int]:
        """List the ranks that are behind `value` now; it promises nothing about their data."""
        counters = self._counters
        return [rank for rank, index in enumerate(self._indices) if counters[index] < value]

    def _wait_in_python(self, value: int, deadline: float) -> int | None:
        for rank, index in enumerate(self._indices):
            if not self._wait_for_counter(index, value, deadline):
                return rank
        return None

    def _wait_for_counter(self, index: int, value: int, deadline: float) -> bool:
        """Wait for one counter; return False if it was late."""
        counters = self._counters
        reads, yields = (1, 0) if on_executor_thread() else (self._reads, _YIELDS)
        for _ in range(reads):
            if counters[index] >= value:
                return True
        for _ in range(yields):
            os.sched_yield()
            if counters[index] >= value:
                return True
        sleep_s = _MIN_SLEEP_S
        while counters[index] < value:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            time.sleep(min(sleep_s, remaining_s))
            sleep_s = min(2 * sleep_s, _MAX_SLEEP_S)
        return True
