"""Turns: how soon a thread that needs the interpreter lock gets it from one that computes.

CPython lets a thread that computes keep the lock for `sys.getswitchinterval()`, 5 ms, when
another asks for it, and a thread that carries out a collective asks again and again. Measured
with 2 ranks on 2 cores that others used too, interleaved, and together with shorter spins of the
backend in a lane's thread: 16 all_reduces of 1 MiB beside NumPy on small arrays ended after 160
to 300 ms with turns of 5 ms, after 17 ms with turns of 0.1 ms; beside pure Python after 10 to 130
ms, and 15 to 18 ms. Two threads of pure Python took as long in all with both lengths, within 7 %.
The length matters only while a thread asks.
"""

from __future__ import annotations

import sys
import threading

_TURN_S = 1e-4


class ShortTurns:
    """Within this context threads take turns of 0.1 ms, or what the user has set if that is less.

    The interval is the process's. The last thread to leave puts back what the first one found,
    unless somebody has changed it meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found_s = self._set_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._found_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._found_s, _TURN_S))
                self._set_s = sys.getswitchinterval()  # in whole microseconds

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and sys.getswitchinterval() == self._set_s:
                sys.setswitchinterval(self._found_s)


SHORT_TURNS = ShortTurns()
