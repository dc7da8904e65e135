"""Orphans: descendants whose parent has ended, and that may lead sessions of their own, out of a group's reach."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02
_REAP_S = 5.0  # a killed process ends at once, unless the kernel holds it


class Orphans:
    """The orphans that Linux gives to this process; other systems give none."""

    def __init__(self) -> None:
        """Ask for them; children that this process has already are never taken for orphans."""
        self._strangers: set[int] = set()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            self._strangers.update(_children())

    def reap(self, own: Iterable[int]) -> None:
        """Let orphans that have ended go; `own` are the children that this process waits for."""
        own = self._strangers.union(own)
        with contextlib.suppress(ChildProcessError):
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while (ended := os.waitid(os.P_ALL, 0, flags)) is not None and ended.si_pid not in own:
                os.waitpid(ended.si_pid, 0)

    def end(self, own: Iterable[int], grace_s: float, pause: Callable[[float], object]) -> None:
        """Ask all to end, and kill them after `grace_s`; as some end, more may come."""
        if sys.platform != "linux":
            return
        own = self._strangers.union(own)
        asked: set[int] = set()
        deadline = time.monotonic() + grace_s
        while (orphans := set(_children()) - own) and time.monotonic() < deadline + _REAP_S:
            late = time.monotonic() >= deadline
            for pid in orphans if late else orphans - asked:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            asked |= orphans
            pause(_POLL_S)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    """List the processes whose parent is this one; those that have ended and were not waited for, too."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The name of the program, in parentheses, may hold anything.
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found
