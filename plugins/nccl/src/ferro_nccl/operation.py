"""Operation: what was launched in one call, from its launch to its end on the device."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ferro.errors import BackendError
from ferro.types import Array
from ferro_nccl.library import Event

if TYPE_CHECKING:
    from ferro_nccl.queue import Queue


class Operation:
    """One operation: launched within its `with` block, done when the device has come past it.

    Attributes:
        deadline: absolute `time.monotonic()` second.
        started_s: when it was launched.
        event: its end; None while it is being launched.
        error: why it failed.
    """

    __slots__ = ("_gpu", "_holds", "_ordered", "_queue", "deadline", "error", "event", "started_s")

    def __init__(
        self, queue: Queue, deadline: float, holds: tuple[Array | None, ...], ordered: bool
    ) -> None:
        self._queue = queue
        self._holds: list[object] = [*holds]
        self._ordered = ordered
        self._gpu = queue.gpu.current()
        self.deadline = deadline
        self.started_s = time.monotonic()
        self.event: Event | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        self._gpu.__enter__()
        try:
            self._queue.begin(self, ordered=self._ordered)
        except BaseException:
            self._gpu.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._queue.end(self)
        finally:
            self._gpu.__exit__(None, None, None)

    def hold(self, item: object) -> None:
        """Keep what the operation needs until it has ended."""
        self._holds.append(item)

    def release(self) -> None:
        """Let go of what it held: a `Work` may be kept for long after the end."""
        self._holds.clear()

    def done(self) -> bool:
        """See `Completion.done`."""
        if self.error is not None:
            return True
        try:
            return self.event is not None and self._queue.gpu.ended(self.event)
        except BackendError as error:
            self.error = error
            return True

    def wait(self) -> None:
        """See `Completion.wait`: the current stream waits, not the host."""
        if self.error is not None:
            raise self.error
        assert self.event is not None, "it was launched"
        gpu = self._queue.gpu
        with gpu.current():
            gpu.current_stream().wait_event(self.event)
