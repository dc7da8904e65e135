"""Persistent operations: collectives and transfers that are checked once and then run many times.

Source: MPI standard 4.0, persistent communication (MPI_Allreduce_init, MPI_Send_init).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ferro.collectives.fast_path import BoundFastPath, PersistentExchange
from ferro.errors import FerroError, UsageError
from ferro.group.work import Work

if TYPE_CHECKING:
    from ferro.group.dispatcher import Dispatcher


# One step at a time is under way. `at_once` runs one, whose result is `result`, or says False, having done nothing; it
# is None where only `run` can. `interrupted` is told of an exception that has left a step in the middle.
_Steps: TypeAlias = "RepeatedSteps | NativeSteps"


class PersistentOperation:
    """A collective or transfer with its arguments, of which all ranks that take part run the same number of steps.

    Its arrays belong to it until `close()`: they are kept alive, may be rewritten between two steps, and may not be
    touched from `start()` until `wait()` returns. Several may be under way together, beside other operations of the
    group: all collectives run in the order issued, the same on all ranks. One thread at a time uses one operation.

    Errors are those of the ordinary call: a step meets only steps of the same operation, and anything else that another
    rank calls instead is a CollectiveMismatch on every rank. `op` is the operation's name, such as "all_reduce";
    `has_native_progress` tells whether the backend itself carries a started step on beside the caller's computation.
    """

    __slots__ = ("_at_once", "_result", "_started", "_steps", "has_native_progress", "op")

    def __init__(self, op: str, steps: _Steps) -> None:
        self.op = op
        self._steps: _Steps | None = steps
        self._at_once, self._result = steps.at_once, steps.result
        self._started = False
        self.has_native_progress = steps.has_native_progress

    def __repr__(self) -> str:
        state = "closed" if self._steps is None else "started" if self._started else "ready"
        return f"<PersistentOperation {self.op}, {state}>"

    def __call__(self) -> Any:
        """Run a step; return its result: `out`, or the operation's own array, which the next step overwrites."""
        if (at_once := self._at_once) is not None:
            try:
                if at_once():
                    return self._result
            except BaseException as error:
                self._ready().interrupted(error)
                raise
        return self._ready().run()

    def start(self) -> None:
        """Begin a step, which goes on beside the caller's computation; `wait()` ends it."""
        self._ready().start()
        self._started, self._at_once = True, None

    def done(self) -> bool:
        """Say whether the started step has ended. Never blocks."""
        return self._under_way().done()

    def wait(self) -> Any:
        """Wait until the started step has ended; return its result, or raise its error."""
        steps = self._under_way()
        try:
            return steps.wait()
        finally:
            self._started, self._at_once = False, steps.at_once

    def close(self) -> None:
        """End the operation, after a step that is under way, and let go of its arrays. Idempotent; not collective."""
        if (steps := self._steps) is None:
            return
        try:
            if self._started:
                self.wait()
        finally:
            self._steps = self._at_once = self._result = None
            steps.close()

    def __enter__(self) -> PersistentOperation:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()

    def _ready(self) -> _Steps:
        if self._steps is None:
            raise UsageError(f"this persistent {self.op} was closed: make a new one", op=self.op)
        if self._started:
            raise UsageError(f"this persistent {self.op} was started before: call wait() first", op=self.op)
        return self._steps

    def _under_way(self) -> _Steps:
        if self._steps is None or not self._started:
            raise UsageError(f"no step of this persistent {self.op} is under way: call start() first", op=self.op)
        return self._steps


class RepeatedSteps:
    """PersistentSteps that repeat an ordinary operation; `run_ordinary` is given `async_op`."""

    at_once = result = None
    has_native_progress = False

    def __init__(self, run_ordinary: Callable[[bool], Any]) -> None:
        self._run_ordinary = run_ordinary
        self._work: Work[Any] | None = None

    def run(self) -> Any:
        return self._run_ordinary(False)

    def start(self) -> None:
        self._work = self._run_ordinary(True)

    def done(self) -> bool:
        return self._work is None or self._work.done()

    def wait(self) -> Any:
        work, self._work = self._work, None
        return None if work is None else work.wait()

    def interrupted(self, error: BaseException) -> None:
        """The ordinary operation ends the group itself."""

    def close(self) -> None:
        """Nothing is kept but the arrays."""


class NativeSteps:
    """Steps in the backend's own way, which neither wait for a turn nor take it.

    `step` runs one, or says False where the group is no longer open; `finish` ends a started one. The functions of
    `around` are called before and after each step.
    """

    has_native_progress = False

    def __init__(
        self,
        op: str,
        dispatcher: Dispatcher,
        native: BoundFastPath | PersistentExchange,
        step: Callable[[], bool],
        finish: Callable[[], None],
        around: Sequence[Callable[[], None]] = (),
        result: object = None,
    ) -> None:
        self.at_once = None if around else step
        self.result = result
        self.close = native.close
        self._op, self._native, self._step, self._finish = op, native, step, finish
        self._before, self._after = around or (lambda: None, lambda: None)
        self._dispatcher = dispatcher

    def run(self) -> Any:
        self._dispatcher.check_open(self._op)
        self._before()
        if not self._whole(self._step):
            self._dispatcher.check_open(self._op)
        self._after()
        return self.result

    def start(self) -> None:
        self._dispatcher.check_open(self._op)
        self._before()
        self._whole(self._native.start)

    def done(self) -> bool:
        return self._native.test()

    def wait(self) -> Any:
        if not self._whole(self._native.test):
            self._dispatcher.check_open(self._op)  # a forked child must not end its parent's group
            self._whole(self._finish)
        self._after()
        return self.result

    def interrupted(self, error: BaseException) -> None:
        self._dispatcher.interrupted(self._op, error)

    def _whole(self, move: Callable[[], Any]) -> Any:
        """End the group if an exception leaves a move: nobody knows how far the step came."""
        try:
            return move()
        except BaseException as error:
            self.interrupted(error)
            raise


class FastSteps(NativeSteps):
    """Steps on the backend's fast path, and as ordinary operations where it declines.

    A step that was started there holds the lock of the group's collectives, until `wait()` or the next one finishes it.
    """

    def __init__(
        self, op: str, dispatcher: Dispatcher, path: BoundFastPath, ordinary: RepeatedSteps, result: object
    ) -> None:
        super().__init__(op, dispatcher, path, path.__call__, path.finish, result=result)
        self._path = path
        self._ordinary = ordinary
        self._finishing = threading.Lock()
        self._begun = False  # on the fast path, and not finished
        self._fast = False  # begun on the fast path
        self._error: BaseException | None = None

    def run(self) -> Any:
        return self._ordinary.run()

    def start(self) -> None:
        self._dispatcher.check_open(self._op)
        self._whole(self._start_at_once)
        if not self._fast:
            self._ordinary.start()

    def _start_at_once(self) -> None:
        with self._finishing:
            self._fast = self._begun = self._dispatcher.start_at_once(self._path.start, self._finish_for_other)

    def done(self) -> bool:
        if not self._fast:
            return self._ordinary.done()
        self._dispatcher.check_process(self._op)
        if not self._finishing.acquire(blocking=False):
            return False  # another thread finishes it
        try:
            return not self._begun or self._path.test()
        finally:
            self._finishing.release()

    def wait(self) -> Any:
        if not self._fast:
            return self._ordinary.wait()
        self._dispatcher.check_process(self._op)
        self._whole(self._finish_once)
        if (error := self._error) is not None:
            self._error = None
            raise error
        return self.result

    def _finish_once(self) -> None:
        with self._finishing:
            if not self._begun:
                return
            try:
                self._path.finish()
            except BaseException as error:  # noqa: BLE001 - wait() raises it
                self._error = error
                self.interrupted(error)  # the lock is held, and others wait for it
            finally:
                self._begun = False
                self._dispatcher.end_started()

    def _finish_for_other(self) -> None:
        """Finish the step for the group's next operation, in whichever thread that is."""
        self._finish_once()
        if self._error is not None and not isinstance(self._error, FerroError):
            raise self._error  # an interrupt of this thread
