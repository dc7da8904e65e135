"""Signals as something to select on: a file descriptor that becomes readable when one arrives."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import FrameType, TracebackType
from typing import Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)  # to ranks that handle them, as under Slurm


class SignalPipe:
    """While entered, signals to this process are collected instead of acted upon.

    SIGCHLD only wakes the selector. What was ignored before (SIGHUP under nohup) stays ignored.
    Use it in the main thread, one at a time.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __enter__(self) -> Self:
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {
            signum: signal.signal(signum, _wake)
            for signum in (*STOPPING, *PASSED_ON, signal.SIGCHLD)
            if signum is signal.SIGCHLD or signal.getsignal(signum) is not signal.SIG_IGN
        }
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """What to select on."""
        return self._reader.fileno()

    def take(self) -> list[signal.Signals]:
        """The signals that arrived since the last call, in order, but for SIGCHLD."""
        received = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := self._reader.recv(4096):
                received += chunk
        return [signal.Signals(n) for n in received if n in (*STOPPING, *PASSED_ON)]


def _wake(_signum: int, _frame: FrameType | None) -> None:
    """Python writes to the wake-up descriptor only for signals that have a handler."""
