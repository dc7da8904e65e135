"""Watchdog: a thread that ends what nothing else can: calls of MPI that block past their deadline.

All ranks are inside the same call when one blocks (`agree` has seen to it), so it ends by itself
but where a rank died or stopped in the middle, or MPI is ended after a failure. A blocked call says
by when it is to end in one attribute; that is all it costs.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import weakref
from typing import Protocol

from ferro_mpi.mpi import MPI

_LOOK_S = 0.5
_GRACE_S = 1.0  # past its deadline, for a call that is about to end


class Blocking(Protocol):
    """Whoever makes calls that block.

    Attributes:
        blocked_until: deadline of the call under way, infinite when there is none.
    """

    blocked_until: float

    def interrupt(self) -> None:
        """Make the call fail. Called with recovery only."""

    def describe(self) -> str:
        """Return where this is, in words."""


class Watchdog:
    """Looks now and then for calls that are overdue.

    Args:
        recovers: calls can be made to fail; otherwise the job is ended.
    """

    def __init__(self, *, recovers: bool) -> None:
        self._recovers = recovers
        self._lock = threading.Lock()
        self._watched: weakref.WeakSet[Blocking] = weakref.WeakSet()
        self._end = math.inf
        threading.Thread(target=self._loop, name="ferro-mpi-watchdog", daemon=True).start()

    def watch(self, blocking: Blocking) -> None:
        """Watch the calls of `blocking`, for as long as it lives."""
        with self._lock:
            self._watched.add(blocking)

    def bound_the_end(self, seconds: float) -> None:
        """End the process if it still runs after so many seconds: MPI may not let it go."""
        self._end = time.monotonic() + seconds

    def _loop(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            now = time.monotonic()
            if now > self._end:
                _say("MPI could not be ended after a failure; this process leaves without")
                os._exit(1)
            with self._lock:
                watched = list(self._watched)
            for blocking in watched:
                if now > blocking.blocked_until + _GRACE_S:
                    self._end_call(blocking)
            del watched

    def _end_call(self, blocking: Blocking) -> None:
        if self._recovers:
            blocking.interrupt()
            return
        _say(
            f"{blocking.describe()} did not finish by its deadline inside MPI, which cannot be "
            "interrupted: ending the job. Another rank died or stopped in the same call: read the "
            "other ranks' logs."
        )
        MPI.COMM_WORLD.Abort(1)


def _say(what: str) -> None:
    sys.stderr.write(f"ferro: {what}\n")
    sys.stderr.flush()
