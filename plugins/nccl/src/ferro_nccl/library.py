"""Protocols of the parts of CuPy and NCCL that this package uses; `cupy_library` implements them.

Memory is given by its address (an int); streams and events are CuPy's own objects. Implementations
translate the errors of CuPy and NCCL to `BackendError`, with NCCL's or CUDA's code.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

import numpy as np

from ferro.types import Array


class GpuEvent(Protocol):
    """A moment in a stream."""


class GpuStream(Protocol):
    """A queue of work on one GPU; as context manager, it becomes this thread's current stream.

    Attributes:
        ptr: the stream's handle, as NCCL takes it.
    """

    ptr: int

    def record(self, event: GpuEvent) -> object:
        """Record the event, which happens when all work now on this stream has ended."""

    def wait_event(self, event: GpuEvent) -> object:
        """Make later work on this stream wait for the event."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...


class Gpu(Protocol):
    """One GPU.

    Attributes:
        index: its number in this process.
        uuid: identifies the GPU among all GPUs of all hosts.
    """

    index: int
    uuid: str

    def current(self) -> AbstractContextManager[object]:
        """Make this GPU the thread's current one within the block.

        A thread that has not used CUDA before keeps this GPU afterwards: going back to CUDA's default would make a
        context of hundreds of MB on that GPU.
        """

    def use(self) -> None:
        """Make this GPU the thread's current one."""

    def new_stream(self) -> GpuStream:
        """Make a stream which does not wait for the default one."""

    def current_stream(self) -> GpuStream:
        """Get this thread's current stream."""

    def new_event(self) -> GpuEvent:
        """Make an event, not yet recorded."""

    def ended(self, event: GpuEvent) -> bool:
        """Return True if a recorded event has happened. Never blocks.

        Raises:
            BackendError: CUDA reports that earlier work on the GPU failed.
        """

    def address(self, array: Array) -> int:
        """Get the address of an array on this GPU.

        Raises:
            UsageError: the array is on another one.
        """

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """Allocate an array of `count` elements, in the order of the current stream."""

    def pinned(self, nbytes: int) -> tuple[int, Array]:
        """Allocate pinned host memory, which the GPU can copy without the host; return its address and its bytes."""

    def copy(self, target: int, source: int, nbytes: int, stream: GpuStream) -> None:
        """Launch a copy between any two addresses on the stream."""


class Communicator(Protocol):
    """One rank's end of an NCCL communicator. Counts are in elements of `dtype`."""

    def all_reduce(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None:
        """See `ncclAllReduce`."""

    def reduce(self, source: int, target: int, count: int, dtype: int, op: int, root: int, stream: int) -> None:
        """See `ncclReduce`."""

    def broadcast(self, source: int, target: int, count: int, dtype: int, root: int, stream: int) -> None:
        """See `ncclBroadcast`."""

    def reduce_scatter(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None:
        """See `ncclReduceScatter`; `count` is that of the target."""

    def all_gather(self, source: int, target: int, count: int, dtype: int, stream: int) -> None:
        """See `ncclAllGather`; `count` is that of the source."""

    def send(self, source: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """See `ncclSend`."""

    def recv(self, target: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """See `ncclRecv`."""

    def async_error(self) -> int:
        """Get NCCL's error code of the operations under way, 0 for none."""

    def split(self, color: int, key: int) -> Communicator | None:
        """See `ncclCommSplit`; blocks until all ranks call it. None for color -1."""

    def abort(self) -> None:
        """End the operations under way; no method may be called afterwards."""

    def destroy(self) -> None:
        """Release the communicator. No operation may be under way, and no method may be called afterwards."""


class NcclLibrary(Protocol):
    """CuPy and NCCL."""

    def version(self) -> int:
        """Get NCCL's version, such as 23203 for 2.32.3."""

    def device_count(self) -> int:
        """Count the GPUs that this process sees."""

    def gpu(self, index: int) -> Gpu:
        """Return the GPU with this index."""

    def unique_id(self) -> bytes:
        """Make the id of a new communicator; see `ncclGetUniqueId`."""

    def connect(self, world_size: int, unique_id: bytes, rank: int) -> Communicator:
        """Join a communicator with this thread's current GPU; blocks until all ranks have joined."""

    def grouped(self) -> AbstractContextManager[object]:
        """Group the NCCL calls in the block, so that they run at the same time; an exception ends the group as well."""
