"""SerialExecutor: runs operations one after the other, in the caller's thread or in its own.

A group's collectives run in the order issued, so they share one executor. Transfers between two ranks have one executor
for each direction, peer and tag, so that a receive that waits delays only the transfers that must come after it.

CPython lets a computing thread keep the interpreter lock for `sys.getswitchinterval()`, 5 ms, when another thread asks
for it, and a thread that carries out a collective asks again and again. Therefore the interval is 0.1 ms while an
executor's own thread carries out an operation. Measured with 2 ranks on 2 busy cores: beside a thread that computes
with NumPy on small arrays, 16 all_reduces of 1 MiB took 160 to 300 ms at 5 ms and 17 ms at 0.1 ms. Two threads of pure
Python took equally long at both intervals, within 7 %.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from ferro.collectives.fast_path import NUMBER
from ferro.errors import ThreadLimitError
from ferro.group.work import Work

Result = TypeVar("Result")
IDLE_S = 5.0  # how long an executor's thread waits for more work
_SWITCH_INTERVAL_S = 1e-4


class ExecutorClosed(Exception):
    """An operation was issued after the executor had been closed."""


class _ShortSwitchInterval:
    """A context in which the switch interval is 0.1 ms, or the user's own if that is shorter.

    The interval is the process's. The last thread to leave restores the one that the first found, unless somebody has
    changed it meanwhile.
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


class _ThreadState(threading.local):
    on_executor_thread = False
    issuing_thread = 0  # of the operation that an executor's thread runs


SHORT_SWITCH_INTERVAL = _ShortSwitchInterval()
_THREAD_STATE = _ThreadState()


def on_executor_thread() -> bool:
    """Say whether an executor's own thread runs this code.

    The caller's thread may then be computing and need its core: a backend that waits does better to sleep than to poll.
    """
    return _THREAD_STATE.on_executor_thread


def issuing_thread() -> int:
    """Identify the thread that issued the operation which runs in this one."""
    return _THREAD_STATE.issuing_thread or threading.get_ident()


def enter_executor_thread(issued_by: int = 0) -> None:
    """Declare this thread an executor's own, which runs an operation that another thread issued."""
    _THREAD_STATE.on_executor_thread = True
    _THREAD_STATE.issuing_thread = issued_by


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread, or raise an error that names the limit."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        import resource  # here, since it is seldom needed

        most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        limit = "unlimited" if most == resource.RLIM_INFINITY else most
        raise ThreadLimitError(
            f"{name}: {error}; this process has {threading.active_count()}. Raise the limit of processes and threads "
            f"(`ulimit -u`, {limit} here; in a container its pids limit, too), or call without async_op. Nothing was "
            "sent; the group is good"
        ) from error
    return thread


class SerialExecutor:
    """A queue of operations that run one after the other.

    An operation that the caller waits for runs in the caller's thread; the others run in the executor's thread, which
    ends when it has had nothing to do for a while.
    """

    def __init__(self, name: str) -> None:
        self.lock = threading.Lock()  # held by the thread that carries out an operation
        # The operations that wait for the executor's thread, each with its handle.
        self.pending: deque[tuple[Work[Any], Callable[[int], object]]] = deque()
        self.closed = False
        self.state = memoryview(bytearray(16)).cast("q")  # see `ferro.collectives.fast_path.Turn`
        # The operation that was started and not waited for: it holds the lock, and whoever comes next finishes it.
        self.started: deque[Callable[[], object]] = deque()
        self.entering: deque[None] = deque()  # one for each thread that is about to take the lock
        self._name = name
        # Callers enter the lock itself, since an exception inside Condition.__enter__ would leave it locked.
        self._state_lock = threading.RLock()
        self._changed = threading.Condition(self._state_lock)
        self._thread: threading.Thread | None = None

    def next_number(self) -> int:
        """Number an operation; no thread runs between the two lines, as neither calls anything."""
        number = self.state[NUMBER]
        self.state[NUMBER] = number + 1
        return number

    def latest_number(self) -> int:
        """Return the number of the operation that began last."""
        return self.state[NUMBER] - 1

    def start_at_once(self, begin: Callable[[], bool], finish: Callable[[], object]) -> bool:
        """Begin an operation that somebody finishes later; return False, having done nothing, if it must wait its turn.

        `begin` says whether it has begun. From then on it holds the lock, until `finish` calls `end_started`. A thread
        that is about to take the lock announces itself first, then looks for a started operation; this method lets the
        operation be found first, then looks for such threads. So none of them waits for a lock that nobody releases.
        """
        if self.pending or not self.lock.acquire(blocking=False):
            return False
        self.started.append(finish)
        begun = False
        try:
            begun = not (self.entering or self.pending or self.closed) and begin()
        finally:
            if not begun:
                self.end_started()
        return begun

    def finish_started(self) -> None:
        """Finish the operation that was started, unless another thread does."""
        try:
            finish = self.started[0]
        except IndexError:
            return
        finish()

    def end_started(self) -> None:
        """Let go of the operation that was started, and release its lock."""
        try:
            self.started.clear()
        finally:
            self.lock.release()

    def wait_for_pending(self) -> None:
        """Wait until the last pending operation has begun: it holds the lock, and the caller is next."""
        with self._state_lock:
            self._changed.wait_for(lambda: not self.pending)

    def start(self, op: str, operation: Callable[[int], Result]) -> Work[Result]:
        """Queue an operation, given its number, and return at once; or raise ExecutorClosed."""
        with self._state_lock:
            if self.closed:
                raise ExecutorClosed(op)
            if self._thread is None:
                self._thread = start_thread(self._run_pending, self._name)
            work: Work[Result] = Work(op, self.next_number())
            self.pending.append((work, operation))
            self._changed.notify_all()
            return work

    def stop(self) -> None:
        """Take no more operations, and let the thread end; for an executor that nobody uses any more."""
        with self._state_lock:
            self.closed = True
            self._changed.notify_all()

    def close(self, deadline: float) -> bool:
        """Take no more operations; say whether the issued ones have ended by the deadline."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
            begun = self._changed.wait_for(lambda: not self.pending, remaining_s(deadline))
        self.entering.append(None)
        if remaining_s(deadline) > 0:
            self.finish_started()
        if not begun or not self.lock.acquire(timeout=remaining_s(deadline)):
            return False
        self.lock.release()
        return True

    def _run_pending(self) -> None:
        """Run operations as they come, until there has been none for a while or the executor is closed."""
        enter_executor_thread()
        while True:
            with self._changed:
                while not self.pending:
                    if self._thread is not threading.current_thread():
                        return  # an interrupt came while this thread was started, and there may be another
                    if (self.closed or not self._changed.wait(IDLE_S)) and not self.pending:
                        self._thread = None
                        return
            self.entering.append(None)
            self.finish_started()
            with self.lock:
                self.entering.pop()
                with self._changed:  # only under the lock: until then a new caller must see pending work
                    work, operation = self.pending.popleft()
                    self._changed.notify_all()
                with SHORT_SWITCH_INTERVAL:
                    enter_executor_thread(work.thread)
                    work._run(operation)
            del work, operation  # so that only holders of the handle keep its result alive


def remaining_s(deadline: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
