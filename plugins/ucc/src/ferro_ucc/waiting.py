"""Waiting for libucc by polling: it reports neither the end of an operation, nor aborts, nor lost ranks."""

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

_SPINS = 200  # polls without a pause, in the caller's thread
_YIELDS = 400  # further polls, which let other threads run in between
_SHORTEST_S = 20e-6
_LONGEST_S = 1e-3
_STORE_POLL_S = 0.5  # how often a waiting rank asks the store whether another rank aborted or died
_ABORTED = "aborted"


class AbortFlag:
    """Tells the ranks of a group, through the store, that one of them aborted it.

    Args:
        store: the store, with a prefix for the group.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._here = threading.Event()
        self._reachable = True

    def set(self) -> None:
        """Abort: waits on this rank end at once, those on other ranks within half a second."""
        if not self._here.is_set():
            self._here.set()
            with suppress(FerroError, OSError):  # without a store the others end at their deadlines
                self._store.set(_ABORTED, b"1")

    def is_set(self) -> bool:
        """Say whether this rank knows of an abort, without asking the store."""
        return self._here.is_set()

    def poll(self) -> None:
        """Ask the store, as long as it can be reached, whether another rank aborted."""
        if not self._reachable:
            return
        try:
            self._store.get(_ABORTED, deadline=time.monotonic())
        except TimeoutError:
            return
        except FerroError:  # the wait still ends at its deadline
            self._reachable = False
            return
        self._here.set()


class PeerLiveness:
    """Finds the members of a group that died, as the job's store has noticed.

    Args:
        lost: returns the world ranks that died; see `BackendConfig.lost`.
        ranks: the members' ranks in the world, by rank in the group.
    """

    def __init__(self, lost: Callable[[], frozenset[int]], ranks: Sequence[int]) -> None:
        self._lost = lost
        self._ranks = tuple(ranks)

    def check(self) -> None:
        """Ask the store once.

        Raises:
            PeerLost: a member died; `peer` is the first one by rank in the group.
        """
        gone = self._lost()
        for peer, rank in enumerate(self._ranks):
            if rank in gone:
                raise PeerLost("it ended without a farewell, as the job's store noticed", peer=peer)


class PollBackoff:
    """The pauses between the polls of one wait, which grow longer until an abort, a death or the deadline ends it.

    Args:
        deadline: absolute `time.monotonic()` second.
        abort: the group's abort flag.
        liveness: the group's members.
    """

    def __init__(self, deadline: float, abort: AbortFlag, liveness: PeerLiveness) -> None:
        self._deadline = deadline
        self._abort = abort
        self._liveness = liveness
        self._polls = _SPINS + _YIELDS if on_executor_thread() else 0
        self._pause_s = _SHORTEST_S
        self._next_store_poll = 0.0

    def pause(self) -> None:
        """Let other threads run before the next poll.

        Raises:
            TimeoutError: the deadline has passed.
            GroupClosed: the group was aborted.
            PeerLost: a member died.
        """
        self._polls += 1
        if self._polls < _SPINS:
            return
        if self._abort.is_set():
            raise GroupClosed("the group was aborted")
        now = time.monotonic()
        if now >= self._deadline:
            raise TimeoutError("the deadline passed while UCC waited for other ranks")
        if self._polls < _SPINS + _YIELDS:
            os.sched_yield()
            return
        if now >= self._next_store_poll:
            if self._next_store_poll:
                self._liveness.check()
                self._abort.poll()
            self._next_store_poll = now + _STORE_POLL_S
        time.sleep(min(self._pause_s, self._deadline - now))
        self._pause_s = min(_LONGEST_S, self._pause_s * 1.1)
