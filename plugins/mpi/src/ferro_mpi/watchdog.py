"""Watchdog: a thread that ends blocking calls of MPI after their deadline, which nothing else can do.

All ranks make the same blocking call at the same time (`agreement` makes sure of it), so the call ends by itself unless
a rank died or stopped in the middle. The watchdog costs a call no more than setting one attribute to its deadline.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from typing import Protocol

from ferro_mpi.mpi import MPI

_CHECK_S = 0.5
_GRACE_S = 1.0  # past its deadline, for a call that is about to end


class BlockingCaller(Protocol):
    """An object that makes blocking calls of MPI.

    Attributes:
        blocked_until: deadline of the call under way, infinite when there is none.
    """

    blocked_until: float

    def has_failed(self) -> bool:
        """Say whether a rank of its group died or aborted it, so that the call may not end."""

    def interrupt(self) -> None:
        """Make its call fail, and let its group shrink; the watchdog calls this only if MPI can recover (ULFM)."""

    def describe(self) -> str:
        """Describe the caller in words."""


class Watchdog:
    """Looks periodically for calls that are past their deadline.

    Args:
        recovers: True if MPI can make blocked calls fail; otherwise the watchdog ends the job.
    """

    def __init__(self, *, recovers: bool) -> None:
        self._recovers = recovers
        self._lock = threading.Lock()
        self._callers: weakref.WeakSet[BlockingCaller] = weakref.WeakSet()
        threading.Thread(target=self._loop, name="ferro-mpi-watchdog", daemon=True).start()

    def watch(self, caller: BlockingCaller) -> None:
        """Watch the calls of `caller`, for as long as it lives."""
        with self._lock:
            self._callers.add(caller)

    def _loop(self) -> None:
        while True:
            time.sleep(_CHECK_S)
            self._check()

    def _check(self) -> None:
        now = time.monotonic()
        with self._lock:
            callers = [c for c in self._callers if self._recovers or c.blocked_until < math.inf]
        for caller in callers:
            if now > caller.blocked_until + _GRACE_S or (self._recovers and caller.has_failed()):
                self._end_call(caller)

    def _end_call(self, caller: BlockingCaller) -> None:
        if self._recovers:
            caller.interrupt()
            return
        _warn(
            f"{caller.describe()} did not finish by its deadline inside MPI, which cannot be "
            "interrupted: ending the job. Another rank died or stopped in the same call: read the "
            "other ranks' logs."
        )
        MPI.COMM_WORLD.Abort(1)


def _warn(text: str) -> None:
    sys.stderr.write(f"ferro: {text}\n")
    sys.stderr.flush()
