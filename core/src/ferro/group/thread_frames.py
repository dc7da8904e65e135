"""thread_frames: the frame that each thread of this process is in."""

from __future__ import annotations

import gc
import sys
import threading
from types import FrameType

# Held while the collector's setting is changed and restored. A finalizer may ask in the thread that holds it.
_collector_setting = threading.RLock()


def thread_frames() -> dict[int, FrameType]:
    """List the frame that each thread is in, by the thread's identifier; no garbage is collected meanwhile.

    Python 3.11 may collect garbage in `sys._current_frames` while it holds a lock of the interpreter. If a finalizer or
    callback then lets another thread run that asks for frames, too, the process stands still for ever
    (python/cpython#106883). From Python 3.12 on `sys._current_frames` will do.
    """
    with _collector_setting:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if enabled:
                gc.enable()
