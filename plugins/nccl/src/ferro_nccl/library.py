"""The parts of CuPy and NCCL that this package uses, as protocols; `cupy_library` implements them.

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
        """Let the event happen when all work that is on this stream now has ended."""

    def wait_event(self, event: GpuEvent) -> object:
        """Let later work on this stream begin after the event."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...


class Gpu(Protocol):
    """One GPU.

    Attributes:
        index: its number in this process.
        uuid: differs from that of every other GPU anywhere.
    """

    index: int
    uuid: str

    def current(self) -> AbstractContextManager[object]:
        """Make it this thread's current GPU within the block.

        A thread that has not used CUDA before keeps it, so that no context is made on another GPU,
        where it would take hundreds of MB.
        """

    def use(self) -> None:
        """Make it this thread's current GPU."""

    def new_stream(self) -> GpuStream:
        """Make a stream which does not wait for the default one."""

    def current_stream(self) -> GpuStream:
        """Get this thread's current stream."""

    def new_event(self) -> GpuEvent:
        """Make an event, not yet recorded."""

    def ended(self, event: GpuEvent) -> bool:
        """Say whether a recorded event has happened. Never blocks.

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
        """Allocate pinned host memory, which the GPU copies by itself: its address and bytes."""

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
        """End the operations under way; nothing else may be called afterwards."""

    def destroy(self) -> None:
        """Release it; no operation may be under way, nothing else be called afterwards."""


class NcclLibrary(Protocol):
    """CuPy and NCCL."""

    def version(self) -> int:
        """Get NCCL's version, such as 23203 for 2.32.3."""

    def device_count(self) -> int:
        """Count the GPUs that this process sees."""

    def gpu(self, index: int) -> Gpu:
        """Get one of them."""

    def unique_id(self) -> bytes:
        """Make the id of a new communicator; see `ncclGetUniqueId`."""

    def connect(self, world_size: int, unique_id: bytes, rank: int) -> Communicator:
        """Join a communicator with this thread's current GPU; blocks until all ranks do."""

    def grouped(self) -> AbstractContextManager[object]:
        """Let the calls within happen at the same time; the group ends also if one raises."""
