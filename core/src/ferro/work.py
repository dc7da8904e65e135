"""Work, the handle of an asynchronous operation, and Lane, the thread that carries them out.

A group's collectives run in the order issued, so they share one lane; transfers between two
ranks have a lane for each direction, peer and tag, so that a receive that waits holds up nothing
but what must come after it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from ferro.turns import SHORT_TURNS

if TYPE_CHECKING:
    from ferro.backend import Completion

Result = TypeVar("Result")
_IDLE_S = 5.0  # how long a lane's thread waits for more work


class _Here(threading.local):
    """What is known of the running thread."""

    in_lane = False


_here = _Here()


def in_lane() -> bool:
    """Say whether this is a lane's thread: the caller's may be computing, and needs its core.

    A backend that waits here does better to sleep than to look again and again.
    """
    return _here.in_lane


class Work(Generic[Result]):
    """An operation under way. It ends by itself, by its deadline at the latest.

    Attributes:
        op: name of the operation, such as "all_reduce".
        seq: its number among the group's collectives, from 0; for a transfer, its number among
            those in this direction, with this peer and tag, that are outstanding together.
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


class LaunchedWork(Work[Result]):
    """An operation that was launched on a device's queue and ends there, after `wait()` or not.

    `wait()` lets what the caller does next on the device come after it.
    """

    def __init__(
        self,
        op: str,
        seq: int,
        result: Result,
        completion: Completion,
        failed: Callable[[Exception], BaseException],
    ) -> None:
        super().__init__(op, seq, lambda: result)
        self._result = result
        self._completion = completion
        self._failed = failed

    def done(self) -> bool:
        """Say whether it has ended, well or badly. Never blocks."""
        return self._completion.done()

    def wait(self) -> Result:
        """Order what comes next after it; return its result, or raise its error."""
        try:
            self._completion.wait()
        except Exception as error:
            self._error = self._failed(error)
            raise self._error from error
        return self._result  # type: ignore[return-value]


class Lane:
    """Runs and numbers operations one after the other, in the caller's thread when it can.

    An operation that must wait its turn, or that the caller does not wait for, is carried out by
    a thread, which ends when it has had nothing to do for a while.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 0
        self._lock = threading.RLock()  # by itself it is taken more quickly than by the condition
        self._change = threading.Condition(self._lock)
        self._pending: deque[Work[object]] = deque()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is pending or under way."""
        return not self._pending and not self._busy

    def run(self, op: str, operation: Callable[[int], Result], *, here: bool = False) -> Result:
        """Run an operation, which is told its number, after all that are pending.

        Args:
            op: its name.
            operation: the operation.
            here: it belongs to the caller's thread, and runs there even when it must wait.

        Raises:
            LaneClosed: the lane takes no more operations.
        """
        ours = False
        try:  # around all, for an interrupt may come at any moment and the lane must go on
            with self._lock:
                if self._closed:
                    raise LaneClosed
                seq = self._next
                self._next = seq + 1
                work = turn = None
                if not self._pending and not self._busy:
                    ours = self._busy = True
                elif here:
                    turn = _Turn()
                    self._put(Work(op, seq, turn.hold))
                else:
                    work = self._put(Work(op, seq, partial(operation, seq)))
            if turn is not None:
                return turn.take(partial(operation, seq))
            return operation(seq) if work is None else work.wait()
        finally:
            if ours:
                # In this order and without the lock: whoever comes to wait for the turn looks at
                # `_busy` after it has put what is looked at next.
                self._busy = False
                if self._pending or self._closed:
                    with self._change:
                        self._change.notify_all()

    def start(self, op: str, operation: Callable[[int], Result]) -> Work[Result]:
        """Queue an operation, which is told its number, and return at once.

        Raises:
            LaneClosed: the lane takes no more operations.
        """
        with self._change:
            if self._closed:
                raise LaneClosed
            seq = self._next
            self._next = seq + 1
            return self._put(Work(op, seq, partial(operation, seq)))

    def close(self, deadline: float) -> bool:
        """Take no more operations; let those there are end, until the deadline.

        Returns:
            Whether they have.
        """
        with self._change:
            self._closed = True
            drained = self._change.wait_for(
                lambda: self.idle, max(0.0, deadline - time.monotonic())
            )
            self._change.notify_all()
        return drained

    def _put(self, work: Work[Result]) -> Work[Result]:
        """Queue work for the thread. The condition is held."""
        self._pending.append(work)  # type: ignore[arg-type]
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        self._change.notify_all()
        return work

    def _loop(self) -> None:
        _here.in_lane = True
        while (work := self._take()) is not None:
            with SHORT_TURNS:
                work._carry_out()
            del work  # its result belongs to whoever holds the handle
            with self._change:
                self._busy = False
                self._change.notify_all()

    def _take(self) -> Work[object] | None:
        """Wait for work and its turn; None when the thread is to end."""
        with self._change:
            while self._busy or not self._pending:
                if self._closed and self.idle:
                    self._thread = None
                    return None
                if not self._change.wait(_IDLE_S) and self.idle:
                    self._thread = None
                    return None
            self._busy = True
            return self._pending.popleft()


class LaneClosed(Exception):
    """An operation came after the lane was closed."""


class _Turn:
    """A place in a lane, held by its thread while the caller's uses it."""

    def __init__(self) -> None:
        self._come = threading.Event()
        self._over = threading.Event()

    def hold(self) -> None:
        """Let the caller go, and wait until it is done; called by the lane's thread."""
        self._come.set()
        self._over.wait()

    def take(self, operation: Callable[[], Result]) -> Result:
        """Wait for the turn and run the operation in this thread."""
        try:
            self._come.wait()
            return operation()
        finally:
            self._over.set()
