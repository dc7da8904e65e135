"""Threads that end waits in NCCL, which knows no deadlines: a watchdog, and calls with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ferro import BackendError

_POLL_S = 0.02
_LINGER_S = 1.0  # an idle thread goes on polling this long, because waking it costs the launching thread time

Result = TypeVar("Result")


class OperationWatchdog:
    """Polls in a thread while operations are under way, because the caller may never wait for them.

    Args:
        poll: checks the operations once; returns True if any is under way.
    """

    def __init__(self, poll: Callable[[], bool]) -> None:
        self._poll = poll
        self._asleep = True
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def notice_launch(self) -> None:
        """Make sure that the thread polls; quick while it is awake."""
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
            if self._poll():
                busy_s = time.monotonic()
            if time.monotonic() - busy_s < _LINGER_S:
                self._wake.clear()
                self._wake.wait(_POLL_S)
                continue
            self._wake.clear()
            self._asleep = True  # before the last poll: a launch after it wakes the thread
            if self._poll():
                self._asleep = False
                busy_s = time.monotonic()
                continue
            while not self._closed and self._asleep:
                self._wake.wait()
            busy_s = time.monotonic()


def call_with_deadline(function: Callable[[], Result], deadline: float, name: str) -> Result:
    """Call `function` in a thread of its own; return its result or raise its error.

    Args:
        function: calls C code that may never return.
        deadline: absolute `time.monotonic()` second.
        name: names the call in the message.

    Raises:
        TimeoutError: the call has not ended by then; its thread is abandoned.
        BackendError: the system lets this process start no more threads.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name=f"ferro-nccl-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        if "shutdown" not in str(error):
            limits = "raise the limit of processes (ulimit -u) or of the container's threads (pids.max)"
            raise BackendError(f"{name} needs a thread, and none can be started ({error}): {limits}") from error
        run()  # from Python 3.12 on no thread may start in an exit handler
    else:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"{name} did not end by its deadline")
    return results[0]
