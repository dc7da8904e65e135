"""Launches: which part launched last in this thread, on a device's queue."""

from __future__ import annotations

import threading

from ferro import Backend, Device
from ferro.backend import Completion


class Launches(threading.local):
    """What this thread has last given to a part; every thread sees its own."""

    _part: Backend | None = None

    def note(self, part: Backend, device: Device) -> None:
        """Remember that a part was given an array on a device."""
        self._part = part if device in part.streams else None

    def completion(self) -> Completion:
        """Return what tells the end of it."""
        return _ENDED if self._part is None else self._part.launched()


class _Ended:
    """The end of what had ended when its method returned."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


_ENDED = _Ended()
