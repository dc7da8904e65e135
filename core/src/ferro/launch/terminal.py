"""The terminal's input on its way to rank 0, which leads a session that the terminal does not belong to."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Self

_POLL_S = 0.2  # between two checks whether the launcher is in the foreground again
_END_S = 1.0  # a process that outlives the rank may hold its input
_READ_BYTES = 4096  # a pipe takes so much as a whole


class TerminalInput:
    """Passes lines typed at the terminal on through a pipe, for as long as the pipe has a reader; use it as a context.

    A thread of its own does it, so that a rank that does not read holds up nothing else. As a background job of the
    shell the launcher leaves the terminal's input to the shell.
    """

    def __init__(self, on_line: Callable[[], object]) -> None:
        """Make the pipe; `on_line` is called after each line, whose echo has moved the cursor."""
        self.reader, self._writer = os.pipe()
        self._on_line = on_line
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="ferro-run-input", daemon=True)

    def __enter__(self) -> Self:
        """Begin, now that the rank holds the reader."""
        os.close(self.reader)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_END_S)

    def _forward(self) -> None:
        # A read in the background then fails in this thread, instead of stopping the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTIN})
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(self._writer, 0)  # an error is reported once there is no reader
        try:
            while not self._over.is_set():
                ready = dict(poll.poll(_POLL_S * 1000))
                if self._writer in ready:
                    return
                if ready and not _in_foreground():
                    self._over.wait(_POLL_S)
                elif ready and not self._forward_piece():
                    return
        finally:
            os.close(self._writer)

    def _forward_piece(self) -> bool:
        """Pass on what was typed; return False at the end of the input, or where nobody can read it any more."""
        try:
            data = os.read(0, _READ_BYTES)
            if data.endswith(b"\n"):
                self._on_line()
            return bool(data and os.write(self._writer, data))
        except OSError:
            return not _in_foreground()


def _in_foreground() -> bool:
    """Say whether this process may read from the terminal."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # the terminal controls no session of ours, so no other process group can have it
        return True
