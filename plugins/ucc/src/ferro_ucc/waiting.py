"""Waiting for libucc: it tells nobody that it is done, so one looks again and again, politely."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ferro.errors import FerroError, GroupClosed, PeerLost
from ferro.group.serial_executor import on_executor_thread

if TYPE_CHECKING:
    from ferro.rendezvous import Store

_LOOKS = 200  # without a pause, in the caller's thread
_YIELDS = 400  # more, letting others run between
_SHORTEST_S = 20e-6
_LONGEST_S = 1e-3
_ASK_S = 0.5  # how often a waiting rank asks the store whether another one aborted or died
_ABORTED = "aborted"


class Abort:
    """Whether a group was aborted, here or on another rank: UCC itself wakes nobody.

    Args:
        store: the group's own part of it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._here = threading.Event()
        self._reachable = True

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
        """Find out whether another rank aborted, as long as there is a store to ask."""
        if not self._reachable:
            return
        try:
            self._store.get(_ABORTED, deadline=time.monotonic())
        except TimeoutError:
            return
        except FerroError:  # the deadline remains
            self._reachable = False
            return
        self._here.set()


class Lost:
    """Whether a member of a group died, as the job's store noticed: UCC itself never does.

    Args:
        ask: returns the world ranks that died; see `BackendConfig.lost`.
        ranks: the members' ranks in the world, by rank in the group.
    """

    def __init__(self, ask: Callable[[], frozenset[int]], ranks: Sequence[int]) -> None:
        self._ask = ask
        self._ranks = tuple(ranks)

    def check(self) -> None:
        """Ask once.

        Raises:
            PeerLost: a member died; the first one by rank in the group.
        """
        gone = self._ask()
        for peer, rank in enumerate(self._ranks):
            if rank in gone:
                raise PeerLost("it ended without a farewell, as the job's store noticed", peer=peer)


class Patience:
    """The pauses of one wait, ever longer, up to its end.

    Args:
        deadline: absolute `time.monotonic()` second.
        abort: what ends it earlier.
        lost: so does this.
    """

    def __init__(self, deadline: float, abort: Abort, lost: Lost) -> None:
        self._deadline = deadline
        self._abort = abort
        self._lost = lost
        self._looks = _LOOKS + _YIELDS if on_executor_thread() else 0
        self._pause_s = _SHORTEST_S
        self._ask_at = 0.0

    def pause(self) -> None:
        """Let others run before the next look.

        Raises:
            TimeoutError: the deadline has passed.
            GroupClosed: the group was aborted.
            PeerLost: one of its ranks died.
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
                self._lost.check()
                self._abort.ask()
            self._ask_at = now + _ASK_S
        time.sleep(min(self._pause_s, self._deadline - now))
        self._pause_s = min(_LONGEST_S, self._pause_s * 1.1)
