"""Work: the handle of an asynchronous operation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from ferro.errors import UsageError

if TYPE_CHECKING:
    from ferro.backend import Completion

Result = TypeVar("Result")


class Work(Generic[Result]):
    """An operation under way. It ends by itself, by its deadline at the latest.

    Attributes:
        op: name of the operation, such as "all_reduce".
        seq: its number among the group's collectives, from 0; for a transfer, its number among those in this direction,
            with this peer and tag, that are outstanding together.
    """

    def __init__(self, op: str, seq: int) -> None:
        self.op = op
        self.seq = seq
        self.thread = threading.get_ident()  # that issued it
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        state = "running" if not self._is_done() else "failed" if self._error else "done"
        return f"<Work {self.op} #{self.seq}, {state}>"

    def done(self) -> bool:
        """Say whether the operation has ended, with or without an error. Never blocks."""
        if self._is_done():
            return True
        if os.getpid() != self._pid:
            raise UsageError(
                f"{self.op} #{self.seq} was under way in process {self._pid} when this process was forked from it, and "
                "can end only there. Wait for it before the fork."
            )
        return False

    def wait(self) -> Result:
        """Wait until the operation has ended; return its result, or raise its error.

        May be called any number of times. It needs no timeout of its own: the operation has one.

        Raises:
            UsageError: this process was forked from the one in which the operation is under way.
        """
        if not self.done():
            self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _is_done(self) -> bool:
        return self._ended.is_set()

    def _run(self, operation: Callable[[int], Result]) -> None:
        try:
            self._result = operation(self.seq)
        except BaseException as error:  # noqa: BLE001 - wait() raises it, whatever it is
            self._error = error
        finally:
            self._ended.set()


class LaunchedWork(Work[Result]):
    """An operation that was launched on a device's queue, where it ends with or without `wait()`.

    `wait()` orders the caller's next operations on the device after this one.
    """

    def __init__(
        self, op: str, seq: int, result: Result, completion: Completion, failed: Callable[[Exception], BaseException]
    ) -> None:
        super().__init__(op, seq)
        self._result = result
        self._completion = completion
        self._failed = failed

    def _is_done(self) -> bool:
        return self._completion.done()

    def wait(self) -> Result:
        """Order the device's next operations after this one; return its result, or raise its error."""
        try:
            self._completion.wait()
        except Exception as error:
            self._error = self._failed(error)
            raise self._error from error
        return self._result  # type: ignore[return-value]
