"""SerialExecutor: runs operations one after the other, in the caller's thread or in its own.

A group's collectives run in the order issued, so they share one executor. Transfers between two
ranks have one executor for each direction, peer and tag, so that a receive that waits delays only
the transfers that must come after it.

CPython lets a computing thread keep the interpreter lock for `sys.getswitchinterval()`, 5 ms, when
another thread asks for it, and a thread that carries out a collective asks again and again.
Therefore the interval is 0.1 ms while an executor's own thread carries out an operation. Measured
with 2 ranks on 2 cores that others used too, interleaved, and together with shorter spins of the
backend in such a thread: 16 all_reduces of 1 MiB beside NumPy on small arrays ended after 160 to
300 ms with 5 ms, after 17 ms with 0.1 ms; beside pure Python after 10 to 130 ms, and 15 to 18 ms.
Two threads of pure Python took as long in all with both, within 7 %.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import TypeVar

from ferro.group.work import Work

Result = TypeVar("Result")
_IDLE_S = 5.0  # how long an executor's thread waits for more work
_SWITCH_INTERVAL_S = 1e-4


class _ShortSwitchInterval:
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
                sys.setswitchinterval(min(self._found_s, _SWITCH_INTERVAL_S))
                self._set_s = sys.getswitchinterval()  # in whole microseconds

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and sys.getswitchinterval() == self._set_s:
                sys.setswitchinterval(self._found_s)


_SHORT_SWITCH_INTERVAL = _ShortSwitchInterval()


class _Here(threading.local):
    """What is known of the running thread."""

    on_executor_thread = False


_here = _Here()


def on_executor_thread() -> bool:
    """Say whether this is a lane's thread: the caller's may be computing, and needs its core.

    A backend that waits here does better to sleep than to look again and again.
    """
    return _here.on_executor_thread


class SerialExecutor:
    """A queue of operations that run one after the other, each in its turn.

    An operation that the caller waits for runs in the caller's thread; the others in the lane's,
    which ends when it has had nothing to do for a while.

    Attributes:
        turn: held by whoever carries out an operation.
        pending: operations that wait for the lane's thread.
        closed: whether the lane takes no more operations.
    """

    def __init__(self, name: str) -> None:
        self.turn = threading.Lock()
        self.pending: deque[Work[object]] = deque()
        self.closed = False
        self.number = count().__next__  # the next operation's, to be asked for once
        self._name = name
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is pending or under way."""
        return not self.pending and not self.turn.locked()

    def run(self, op: str, operation: Callable[[int], Result]) -> Result:
        """Run an operation, which is told its number, after all that are pending.

        Raises:
            ExecutorClosed: the lane takes no more operations.
        """
        if self.pending:
            self.let_pending_begin()
        with self.turn:
            if self.closed:
                raise ExecutorClosed(op)
            return operation(self.number())

    def let_pending_begin(self) -> None:
        """Wait until the last pending operation has its turn: who waits for the next comes then."""
        with self._change:
            self._change.wait_for(lambda: not self.pending)

    def start(self, op: str, operation: Callable[[int], Result]) -> Work[Result]:
        """Queue an operation, which is told its number, and return at once.

        Raises:
            ExecutorClosed: the lane takes no more operations.
        """
        with self._change:
            if self.closed:
                raise ExecutorClosed(op)
            seq = self.number()
            work = Work(op, seq, partial(operation, seq))
            self.pending.append(work)  # type: ignore[arg-type]
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._change.notify_all()
            return work

    def close(self, deadline: float) -> bool:
        """Take no more operations; let those there are end, until the deadline.

        Returns:
            Whether they have.
        """
        with self._change:
            self.closed = True
            self._change.notify_all()
            begun = self._change.wait_for(lambda: not self.pending, _left_s(deadline))
        if not begun or not self.turn.acquire(timeout=_left_s(deadline)):
            return False
        self.turn.release()
        return True

    def _loop(self) -> None:
        _here.on_executor_thread = True
        while self._wait():
            with self.turn:
                with self._change:  # not before it has the turn: who comes now must see it waits
                    work = self.pending.popleft()
                    self._change.notify_all()
                with _SHORT_SWITCH_INTERVAL:
                    work._carry_out()
            del work  # its result belongs to whoever holds the handle

    def _wait(self) -> bool:
        """Wait for work; say whether there is any, or else the thread is to end."""
        with self._change:
            while not self.pending:
                if self.closed or not self._change.wait(_IDLE_S):
                    if self.pending:
                        break
                    self._thread = None
                    return False
            return True


def _left_s(deadline: float) -> float:
    """Return the time until a deadline, as locks take it."""
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


class ExecutorClosed(Exception):
    """An operation came after the lane was closed."""
