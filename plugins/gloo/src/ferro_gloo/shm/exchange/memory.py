"""ExchangeMemory: the memory of all persistent exchanges of a process, in its arena.

Other ranks read and write an exchange's channels until they have closed theirs, which may be later than this rank has.
So the memory of a closed exchange is kept until all receivers have told that they use it no more. The arena may give
it to another exchange only then.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.arena import HostArenas
from ferro_gloo.shm.exchange.channels import CLOSED_AT
from ferro_gloo.shm.exchange.progress_thread import ProgressThread

_BELL_BYTES = 64


class Releasable(Protocol):
    """An exchange, as far as its memory is concerned."""

    def release(self) -> None:
        """Let go of all memory. Idempotent."""


class ExchangeMemory:
    """The memory of one process's exchanges.

    Args:
        arenas: the arenas of the host.

    Attributes:
        arenas: see above.
        progress_thread: carries started steps on.
    """

    def __init__(self, arenas: HostArenas) -> None:
        self.arenas = arenas
        self.progress_thread = ProgressThread()
        self._bell: Array | None = None
        self._bell_lock = threading.Lock()
        self._kept: deque[tuple[Array, Sequence[int]]] = deque()  # finalizers append to it, and must not lock
        self._open: weakref.WeakSet[Releasable] = weakref.WeakSet()
        self._pid = os.getpid()

    def allocate(self, nbytes: int) -> Array:
        """Allocate zeros in the arena; in ordinary memory when it is full."""
        self._forget_unused()
        memory: Array = self.arenas.allocate(nbytes)[:nbytes]
        memory[...] = 0
        return memory

    def bell(self) -> Array:
        """Return the bell of this process, on which its threads sleep; others may ring it as long as they live."""
        with self._bell_lock:
            if self._bell is None:
                self._bell = self.allocate(_BELL_BYTES)
            return self._bell

    def keep(self, area: Array, channels: Sequence[int]) -> None:
        """Keep the memory of a closed exchange, with channels at these offsets, until no rank uses it."""
        self._kept.append((area, channels))
        self._forget_unused()

    def add(self, exchange: Releasable) -> None:
        """Note an exchange that is to be closed with the host's memory."""
        self._open.add(exchange)

    def is_in_child(self) -> bool:
        """Return True in a process that was forked from the one whose memory this is."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Close all exchanges, and give back their memory, whoever uses it."""
        if not self.is_in_child():
            self.progress_thread.stop()
        for exchange in list(self._open):
            exchange.release()
        self._bell = None
        self._kept.clear()

    def _forget_unused(self) -> None:
        for _ in range(len(self._kept)):
            try:
                entry = self._kept.popleft()
            except IndexError:  # a finalizer, or another thread, does the same
                return
            if not _are_closed(*entry):
                self._kept.append(entry)


def _are_closed(area: Array, channels: Sequence[int]) -> bool:
    """Return True if the receivers of all these channels have closed them."""
    words = area.view(np.int64)
    return all(words[(channel + CLOSED_AT) // 8] for channel in channels)
