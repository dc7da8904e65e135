"""ProgressThread: carries on the started steps that need this rank while its program does something else.

A step of small messages is in shared memory once it is started. A long message has more blocks than slots, so its
sender waits for its receiver. If that happened only in `wait()`, two ranks that wait for their started steps in
different orders, or for another collective first, would wait for each other for ever.
"""

from __future__ import annotations

import threading
from typing import Protocol

_LINGER_S = 1.0  # an idle thread ends after this time
_SLEEP_S = 0.01
_SLEEP_BESIDE_OTHERS_S = 0.001  # while the thread sleeps for one exchange it does not see another's messages


class StartedSteps(Protocol):
    """Steps, such as those of an exchange, of which one is under way; see `ferro_gloo.shm.exchange.native_steps`."""

    def progress(self) -> bool:
        """Move what can be moved without waiting; say whether the step has ended."""

    def wait(self, spins: int, yields: int, seconds: float, /) -> bool:
        """Wait until the step has ended; return False after `seconds` at the latest."""


class ProgressThread:
    """A thread that is there while steps need it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps: list[StartedSteps] = []
        self._runs = False

    def add(self, steps: StartedSteps) -> None:
        """Carry a step on until it has ended."""
        with self._changed:
            self._steps.append(steps)
            self._changed.notify()
            if not self._runs:
                try:
                    threading.Thread(target=self._run, name="ferro-gloo-exchange", daemon=True).start()
                except RuntimeError:  # no more threads: the step goes on in `wait()`
                    self._steps.remove(steps)
                else:
                    self._runs = True

    def discard(self, steps: StartedSteps) -> None:
        """Leave a step, whether it has ended or not."""
        with self._changed:
            self._steps = [one for one in self._steps if one is not steps]

    def stop(self) -> None:
        """Leave all steps, and end soon."""
        with self._changed:
            self._steps = []
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._steps and not self._changed.wait_for(lambda: self._steps, _LINGER_S):
                    self._runs = False
                    return
                steps = list(self._steps)
            left = []
            for one in steps:
                if one.progress():
                    self.discard(one)
                else:
                    left.append(one)
            if left:
                left[0].wait(0, 0, _SLEEP_S if len(left) == 1 else _SLEEP_BESIDE_OTHERS_S)
