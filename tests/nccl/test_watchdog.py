"""Calls that may never return end by their deadline."""

from __future__ import annotations

import threading
import time

import pytest

from ferro_nccl.watchdog import call_with_deadline


def test_a_call_with_a_deadline():
    unblock = threading.Event()
    assert call_with_deadline(lambda: 3, time.monotonic() + 5, "counting") == 3
    with pytest.raises(ZeroDivisionError):
        call_with_deadline(lambda: 1 // 0, time.monotonic() + 5, "dividing")
    with pytest.raises(TimeoutError, match="waiting did not end"):
        call_with_deadline(lambda: unblock.wait(10), time.monotonic() + 0.02, "waiting")
    unblock.set()


def test_a_call_with_a_deadline_where_no_thread_can_be_started(monkeypatch):
    """As in an exit handler from Python 3.12 on; an abort that is left out there is a hang."""

    def start(_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert call_with_deadline(lambda: 3, time.monotonic() + 5, "counting") == 3
