"""Waiting for libucc: it tells nobody that it is done, so one looks again and again, politely."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ferro.errors import FerroError, GroupClosed
from ferro.work import in_lane

if TYPE_CHECKING:
    from ferro.rendezvous import Store

_LOOKS = 200  # without a pause, in the caller's thread
_YIELDS = 400  # more, letting others run between
_SHORTEST_S = 20e-6
_LONGEST_S = 1e-3
_ASK_S = 0.5  # how often a waiting rank asks the store whether another one aborted
_ABORTED = "aborted"


class Abort:
    """Whether a group was aborted, here or on another rank: UCC itself wakes nobody.

    Args:
        store: the group's own part of it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._here = threading.Event()

    def tell(self) -> None:
        """Abort: waits on this rank end at once, those on others within half a second."""
        if not self._here.is_set():
            self._here.set()
            with suppress(FerroError, OSError):  # without a store the others' deadlines remain
                self._store.set(_ABORTED, b"1")

    def told(self) -> bool:
        """Say whether this rank knows of an abort."""
        return self._here.is_set()

    def ask(self) -> None:
        """Find out whether another rank aborted."""
        try:
            self._store.get(_ABORTED, deadline=time.monotonic())
        except TimeoutError:
            return
        self._here.set()


class Patience:
    """The pauses of one wait, ever longer, up to its end.

    Args:
        deadline: absolute `time.monotonic()` second.
        abort: what ends it earlier.
    """

    def __init__(self, deadline: float, abort: Abort) -> None:
        self._deadline = deadline
        self._abort = abort
        self._looks = _LOOKS + _YIELDS if in_lane() else 0
        self._pause_s = _SHORTEST_S
        self._ask_at = 0.0

    def pause(self) -> None:
        """Let others run before the next look.

        Raises:
            TimeoutError: the deadline has passed.
            GroupClosed: the group was aborted.
        """
        self._looks += 1
        if self._looks < _LOOKS:
            return
        if self._abort.told():
            raise GroupClosed("the group was aborted")
        now = time.monotonic()
        if now >= self._deadline:
            raise TimeoutError("the deadline passed while UCC waited for other ranks")
        if self._looks < _LOOKS + _YIELDS:
            os.sched_yield()
            return
        if now >= self._ask_at:
            if self._ask_at:
                self._abort.ask()
            self._ask_at = now + _ASK_S
        time.sleep(min(self._pause_s, self._deadline - now))
        self._pause_s = min(_LONGEST_S, self._pause_s * 1.1)
