"""One launched operation, from its launch to its end on the GPU."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from ferro.errors import BackendError
from ferro.types import Array
from ferro_nccl.library import Gpu, GpuEvent


class LaunchQueue(Protocol):
    """The queue that an operation is launched on.

    Attributes:
        gpu: the GPU of the queue's stream.
    """

    gpu: Gpu

    def begin(self, operation: LaunchedOperation, *, ordered: bool) -> None:
        """Lock the queue for the launch; if `ordered`, make its stream wait for the caller's stream."""

    def end(self, operation: LaunchedOperation) -> None:
        """Record the operation's end on the stream, and unlock the queue."""


class LaunchedOperation:
    """An operation that is launched in its `with` block, and runs on the GPU afterwards.

    Attributes:
        deadline: absolute `time.monotonic()` second.
        started_s: time of the launch.
        event: marks its end on the stream; None while it is being launched.
        error: the reason why it failed.
    """

    __slots__ = ("_gpu", "_holds", "_ordered", "_queue", "deadline", "error", "event", "started_s")

    def __init__(self, queue: LaunchQueue, deadline: float, holds: tuple[Array | None, ...], ordered: bool) -> None:
        self._queue = queue
        self._holds: list[object] = [*holds]
        self._ordered = ordered
        self._gpu = queue.gpu.current()
        self.deadline = deadline
        self.started_s = time.monotonic()
        self.event: GpuEvent | None = None
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
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._queue.end(self)
        finally:
            self._gpu.__exit__(None, None, None)
        # NCCL refuses a launch on a communicator that was aborted meanwhile: raise the cause.
        if self.error is not None and isinstance(error, BackendError):
            raise self.error from error

    def hold(self, item: object) -> None:
        """Keep an object alive until the operation has ended."""
        self._holds.append(item)

    def release(self) -> None:
        """Drop the held objects, because the user may keep a `Work` long after the operation has ended."""
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
