"""Preemption: SIGTERM becomes a last save and the end of the program."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType

from ferro import UsageError

EXIT_CODE = 128 + signal.SIGTERM


class Preempted(SystemExit):
    """The job was told to end, by SIGTERM to one of its ranks, and has saved its state, if it could.

    It ends the program with code 143, as the signal itself would.

    Attributes:
        step: the step at which the program ends.
        path: the checkpoint of this step; None if it could not be saved in time.
    """

    def __init__(self, message: str, *, step: int, path: str | None) -> None:
        super().__init__(EXIT_CODE)
        self.message = message
        self.step = step
        self.path = path

    def __str__(self) -> str:
        return self.message


class TerminationSignal:
    """A handler of SIGTERM that only notes it, then calls the earlier handler if that is a function.

    Attributes:
        allowed_s: how long after the signal the program may go on.
        received_at: when the first one came, in `time.monotonic()` seconds; None before.
        acted: whether the program has done what the signal asks for.

    Raises:
        UsageError: this is not the main thread, where alone Python handles signals.
    """

    def __init__(self, allowed_s: float) -> None:
        self.allowed_s = allowed_s
        self.received_at: float | None = None
        self.acted = False
        self._closed = False
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("preemption_s needs a handler of SIGTERM, which only the main thread can install")
        self._earlier = signal.signal(signal.SIGTERM, self._handle)
        _at_work.append(self)

    def close(self, *, deliver: bool) -> None:
        """Restore the earlier handler, if nobody has replaced this one.

        Args:
            deliver: send the signal once more if it came and nobody has acted on it, so that it is not lost.
        """
        if self._closed:
            return
        self._closed = True
        _at_work.remove(self)
        ours = self.restore()
        came = self.received_at is not None and not self.acted
        if ours and deliver and came and not callable(self._earlier):
            signal.raise_signal(signal.SIGTERM)

    def restore(self) -> bool:
        """Restore the earlier handler, if nobody has replaced this one; say whether that was so."""
        with contextlib.suppress(ValueError):  # another thread than the main one may not
            if signal.getsignal(signal.SIGTERM) == self._handle:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if self._earlier is None else self._earlier)
                return True
        return False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._closed and self.received_at is None:
            self.received_at = time.monotonic()
        if callable(self._earlier):
            self._earlier(signum, frame)


# A process that is forked, such as a loader's worker, gets the earlier handler, so that SIGTERM ends it. A signal that
# comes to it before it has that handler would be forgotten by Python: it is blocked until then.

_at_work: list[TerminationSignal] = []  # in the order in which they were made
_masks = threading.local()


def _before_fork() -> None:
    if _at_work:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _after_fork() -> None:
    before = getattr(_masks, "before", None)
    if before is not None:
        _masks.before = None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _after_fork_in_child() -> None:
    while _at_work:
        _at_work.pop().restore()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
