"""Signals: how far each rank of a group has come, told through shared memory.

Every rank has a counter that only grows. It writes its data, then publishes its counter; who
has waited for the counter sees the data. A wait looks at once, then looks again for a while,
then lets others run, then sleeps; looking long would keep the core from the awaited rank where
ranks are more than cores. In a lane's thread (see `ferro.work`) it hardly looks again, and sleeps:
the core belongs to the caller's thread, which may be computing.

Why the data is seen with the counter. The native helper stores counters with release and loads
them with acquire, on any processor. Pure Python has plain stores and loads only: `memoryview`
copies an aligned int64 with one machine instruction. x86-64 lets other cores see one core's
stores in the order they were made, and keeps loads in order too; so there, and only there, that
is enough. (memcpy may go round this order with non-temporal stores; it fences them itself.)
"""

from __future__ import annotations

import os
import platform
import time

from ferro.errors import UsageError
from ferro.group.serial_executor import on_executor_thread
from ferro_gloo.shm.native import ABSENT, NATIVE

# Two cache lines are fetched at a time, on some processors; a counter has its own in any case.
STRIDE = 256
AVAILABLE = NATIVE is not None

_WORDS = STRIDE // 8
# Measured on two cores. Being woken from sleep costs 15 to 20 us, a pause 20 ns, a yield 0.35 us.
# With 4 ranks on 2 cores a round of publishing and waiting takes 19 us with sleep alone, 29 us with
# spinning and sleep, 2 us with yields and sleep; more yields than 20 change nothing there. But a
# core that has gone idle takes 50 to 100 us to wake up. Whoever sleeps sooner than that while the
# other wakes up makes the other sleep in its turn: bursts of all_reduces of 4 bytes, 2 ranks with a
# core each, took 10 to 60 us on average with 100 yields before sleep, 8 us with 1000. A lane's
# thread competes with its caller's computation. Beside matrix products, 2 ranks on 2 cores that
# others used too, 2 all_reduces of 25 MiB of private arrays ended after 47 ms with the spins and
# yields of a caller's thread, after 31 ms with those of a lane's (medians of one run); 16 of 1 MiB
# after 96 and 68 ms, from group.empty after 114 and 60 ms. Later runs, together with short turns
# (`ferro.group.serial_executor`), agree on 25 MiB of private arrays, and show no difference on the
# others.
_NATIVE_SPINS = 2000
_NATIVE_SPINS_IN_LANE = 200
_NATIVE_YIELDS = 1000
_READS = 300
_YIELDS = 500
_SHORTEST_NAP_S = 20e-6
_LONGEST_NAP_S = 1e-3


def board_bytes(ranks: int) -> int:
    """Return the size of the board of so many ranks."""
    return ranks * STRIDE


def pure_python_is_safe() -> bool:
    """Say whether this processor makes plain stores visible in order, as x86-64 does."""
    return platform.machine() in ("x86_64", "AMD64")


class Signals:
    """The counters of a group, as one rank sees them. All start at what the board holds: zeros.

    Args:
        board: shared memory, writable, uint8, aligned to 8 bytes; `board_bytes(ranks)` at least.
        ranks: how many there are.
        rank: whose counter `publish` moves.
        native: use the native helper. All ranks must say the same: pure Python wakes no sleepers.
        spin: look for some tens of microseconds before letting others run; for ranks that have a
            core each.

    Raises:
        UsageError: the native helper is not built here, or the board is too small.
    """

    __slots__ = ("_board", "_cells", "_counters", "_native", "_own", "_ranks", "_reads", "_spins")

    def __init__(
        self, board: memoryview, ranks: int, rank: int, *, native: bool, spin: bool
    ) -> None:
        if native and NATIVE is None:
            raise UsageError(f"{ABSENT}. Install a C compiler, then ferro-gloo again.")
        if board.nbytes < board_bytes(ranks) or not 0 <= rank < ranks:
            raise UsageError(
                f"rank {rank} of {ranks} needs a board of {board_bytes(ranks)} bytes, "
                f"not {board.nbytes}"
            )
        self._native = NATIVE if native else None
        self._board = board
        self._counters = board[: board_bytes(ranks)].cast("q")
        self._ranks = ranks
        self._own = rank * _WORDS
        self._cells = range(0, ranks * _WORDS, _WORDS)
        self._spins = _NATIVE_SPINS if spin else 0
        self._reads = _READS if spin else 1

    def publish(self, value: int) -> None:
        """Move this rank's counter to `value`: all that it has written so far can be read."""
        if self._native is None:
            self._counters[self._own] = value
        else:
            self._native.publish(self._board, self._own * 8, value)

    def wait(self, value: int, seconds: float) -> int | None:
        """Wait until every counter is at least `value`. Other threads run meanwhile.

        Returns:
            None; or, after at most `seconds` or a signal, the first rank that is behind.
        """
        if self._native is not None:
            spins, yields = self._spins, _NATIVE_YIELDS
            if on_executor_thread():
                spins, yields = min(spins, _NATIVE_SPINS_IN_LANE), 0
            return self._native.wait(
                self._board, 0, STRIDE, self._ranks, value, spins, yields, seconds
            )
        counters = self._counters
        for cell in self._cells:
            if counters[cell] < value:
                return self._wait_in_python(value, time.monotonic() + seconds)
        return None

    def behind(self, value: int) -> list[int]:
        """Return the ranks that are behind `value` just now. Says nothing about their data."""
        counters = self._counters
        return [rank for rank, cell in enumerate(self._cells) if counters[cell] < value]

    def _wait_in_python(self, value: int, deadline: float) -> int | None:
        for rank, cell in enumerate(self._cells):
            if not self._reaches(cell, value, deadline):
                return rank
        return None

    def _reaches(self, cell: int, value: int, deadline: float) -> bool:
        """Wait for one counter; say whether it came in time."""
        counters = self._counters
        reads, yields = (1, 0) if on_executor_thread() else (self._reads, _YIELDS)
        for _ in range(reads):
            if counters[cell] >= value:
                return True
        for _ in range(yields):
            os.sched_yield()
            if counters[cell] >= value:
                return True
        nap = _SHORTEST_NAP_S
        while counters[cell] < value:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(nap, left))
            nap = min(2 * nap, _LONGEST_NAP_S)
        return True
