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
from itertools import count
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
            LaneClosed: the lane takes no more operations.
        """
        if self.pending:
            self.let_pending_begin()
        with self.turn:
            if self.closed:
                raise LaneClosed(op)
            return operation(self.number())

    def let_pending_begin(self) -> None:
        """Wait until the last pending operation has its turn: who waits for the next comes then."""
        with self._change:
            self._change.wait_for(lambda: not self.pending)

    def start(self, op: str, operation: Callable[[int], Result]) -> Work[Result]:
        """Queue an operation, which is told its number, and return at once.

        Raises:
            LaneClosed: the lane takes no more operations.
        """
        with self._change:
            if self.closed:
                raise LaneClosed(op)
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
        _here.in_lane = True
        while self._wait():
            with self.turn:
                with self._change:  # not before it has the turn: who comes now must see it waits
                    work = self.pending.popleft()
                    self._change.notify_all()
                with SHORT_TURNS:
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


class LaneClosed(Exception):
    """An operation came after the lane was closed."""
