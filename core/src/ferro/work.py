"""Work, the handle of an asynchronous operation, and Lane, the thread that carries them out.

A group's collectives run in the order issued, so they share one lane; transfers between two
ranks have a lane for each peer and direction, so that a receive that waits holds up no send.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Work(Generic[Result]):
    """An operation under way. It ends by itself, by its deadline at the latest.

    Attributes:
        op: name of the operation, such as "all_reduce".
        seq: its number among the group's collectives, from 0; for a transfer, its number among
            those in this direction with this peer.
    """

    def __init__(self, op: str, seq: int, run: Callable[[], Result]) -> None:
        self.op = op
        self.seq = seq
        self._run: Callable[[], Result] | None = run
        self._ended = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self._error else "done"
        return f"<Work {self.op} #{self.seq}, {state}>"

    def done(self) -> bool:
        """Say whether it has ended, well or badly. Never blocks."""
        return self._ended.is_set()

    def wait(self) -> Result:
        """Wait until it has ended; return its result, or raise its error.

        May be called any number of times. It needs no timeout of its own: the operation has one.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _carry_out(self) -> None:
        run, self._run = self._run, None
        assert run is not None
        try:
            self._result = run()
        except BaseException as error:  # noqa: BLE001 - kept for wait(), whatever it is
            self._error = error
        finally:
            self._ended.set()


class Lane:
    """Runs and numbers operations one after the other, in the caller's thread when it can."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0
        self._turn = threading.Lock()
        self._change = threading.Condition()
        self._pending: deque[Work[object]] = deque()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def run(self, op: str, operation: Callable[[int], Result]) -> Result:
        """Run an operation, which is told its number, after all that are pending."""
        with self._turn:
            seq = self._number()
            if not self._pending and not self._busy:
                return operation(seq)
            work = self._put(Work(op, seq, lambda: operation(seq)))
        return work.wait()

    def start(self, op: str, operation: Callable[[int], Result]) -> Work[Result]:
        """Queue an operation, which is told its number, and return at once."""
        with self._turn:
            seq = self._number()
            return self._put(Work(op, seq, lambda: operation(seq)))

    def close(self, deadline: float) -> bool:
        """Let pending operations end, until the deadline; say whether they have."""
        with self._change:
            drained = self._change.wait_for(
                lambda: not self._pending and not self._busy,
                max(0.0, deadline - time.monotonic()),
            )
            self._closed = True
            self._change.notify_all()
        return drained

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _put(self, work: Work[Result]) -> Work[Result]:
        with self._change:
            self._pending.append(work)  # type: ignore[arg-type]
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._change.notify_all()
        return work

    def _loop(self) -> None:
        while True:
            with self._change:
                self._busy = False
                self._change.notify_all()
                self._change.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                work = self._pending.popleft()
                self._busy = True
            work._carry_out()
            del work  # its result belongs to whoever holds the handle
