"""Deadline: one time limit for all collectives of a save or a load."""

from __future__ import annotations

import time


class Deadline:
    """A time by which something must have ended.

    Args:
        timeout_s: seconds from now.
    """

    def __init__(self, timeout_s: float) -> None:
        self._at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the seconds that are left; a little when the time is over, so that the next call says so."""
        return max(self._at - time.monotonic(), 0.001)
