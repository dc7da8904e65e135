"""Watch: a thread that looks after operations nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_POLL_S = 0.02
_LINGER_S = 1.0  # how long it looks on when nothing is under way: waking it costs the launcher


class Watch:
    """Calls `check` again and again while there is anything to look after.

    Args:
        check: looks once; says whether anything is under way.
    """

    def __init__(self, check: Callable[[], bool]) -> None:
        self._check = check
        self._asleep = True
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def notice(self) -> None:
        """Take note that something was launched; quick while the thread is awake."""
        if not self._asleep:
            return
        self._asleep = False
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="ferro-nccl-watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        busy_s = time.monotonic()
        while not self._closed:
            if self._check():
                busy_s = time.monotonic()
            if time.monotonic() - busy_s < _LINGER_S:
                self._wake.clear()
                self._wake.wait(_POLL_S)
                continue
            self._wake.clear()
            self._asleep = True  # before the last look: what is launched after it wakes the thread
            if self._check():
                self._asleep = False
                busy_s = time.monotonic()
                continue
            while not self._closed and self._asleep:
                self._wake.wait()
            busy_s = time.monotonic()
