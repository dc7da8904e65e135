"""Saves in the background: a thread of low priority for each, and what becomes of them at the program's end.

The threads are daemons, so that the program's end waits no longer for one than its deadline allows. A function that
runs at exit waits for them, and tells on standard error which saves have failed without anybody having been told.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable

from ferro import PeerLost
from ferro_checkpoint.checkpointer.save_result import SaveResult

NICENESS = 10
_running: dict[SaveResult, None] = {}  # in the order of their beginnings
_registered: list[bool] = []
_untold: dict[SaveResult, str] = {}  # failures that nobody has been told, and whose they are


def start(result: SaveResult, write: Callable[[], None], whose: str) -> None:
    """Call `write` in a thread of its own, and note in `result` how it ended; `whose` names the rank in messages."""
    _register_at_exit()
    _running[result] = None
    thread = threading.Thread(target=_run, args=(result, write, whose), name="ferro-checkpoint", daemon=True)
    try:
        thread.start()
    except BaseException:
        del _running[result]
        raise


def run(result: SaveResult, write: Callable[[], None]) -> None:
    """Call `write` in this thread, and note in `result` how it ended."""
    began = time.monotonic()
    error: Exception | None = None
    try:
        write()
    except Exception as failure:  # noqa: BLE001 - the result has it
        error = failure
    result.end(error, time.monotonic() - began)


def told(result: SaveResult) -> None:
    """Note that the program has been told of a failure, also of one that is still to come."""
    result.told = True
    _untold.pop(result, None)


def _run(result: SaveResult, write: Callable[[], None], whose: str) -> None:
    _lower_priority()
    began = time.monotonic()
    error: Exception | None = None
    try:
        write()
    except BaseException as failure:  # noqa: BLE001 - the next call raises it
        error = failure if isinstance(failure, Exception) else RuntimeError(f"{type(failure).__name__}: {failure}")
        _untold[result] = whose
    result.end(error, time.monotonic() - began)
    _running.pop(result, None)


def _lower_priority() -> None:
    """Let this thread, on Linux, have a core only when the training's threads leave it one."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        except OSError:
            return


def _register_at_exit() -> None:
    """Let the program's end wait for saves, before the groups are closed and thread pools take no more work.

    A thread pool, in which a save writes its segments, refuses work as soon as `concurrent.futures` has learned of the
    end, which is before any function of `atexit` runs; only the private function of `threading` comes earlier (Python
    3.9 to 3.14).
    """
    if not _registered:
        _registered.append(True)
        getattr(threading, "_register_atexit", atexit.register)(_at_exit)


def _forget() -> None:
    """Forget the saves in a forked child: their threads are the parent's."""
    _running.clear()
    _untold.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _at_exit() -> None:
    """Wait for unfinished saves, and tell of failures that no call has raised."""
    for result in list(_running):
        if not result.wait_ended(max(0.0, result.deadline - time.monotonic())) and not result.told:
            tell(f"step {result.step} was not saved as {result.path}: the program ended before")
    for result, whose in list(_untold.items()):
        if not (result.told or _ended_by_the_same(result.error)):
            tell(f"{whose}step {result.step} was not saved as {result.path}: {result.error}")
    _untold.clear()


def _ended_by_the_same(error: BaseException | None) -> bool:
    """Say whether a save failed by the loss of a rank, and the program ended by one: it has told of that already."""
    if not isinstance(getattr(sys, "last_value", None), PeerLost):
        return False
    while error is not None and not isinstance(error, PeerLost):
        error = error.__cause__
    return error is not None


def tell(message: str) -> None:
    """Write a line to standard error, if there is one."""
    if sys.stderr is not None:
        sys.stderr.write(f"ferro-checkpoint: {message}\n")
        sys.stderr.flush()
