"""What is used of CuPy and NCCL, and no more: the seam at which tests put a stand-in.

Memory is named by its address (an int), streams and events are CuPy's own objects. Whatever a
library raises has become a `BackendError`, with NCCL's or CUDA's code, on this side of the seam.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

import numpy as np

from ferro.types import Array


class Event(Protocol):
    """A moment in a stream."""


class Stream(Protocol):
    """A queue of work on one GPU; as context manager, the one that this thread fills.

    Attributes:
        ptr: its handle, as NCCL takes it.
    """

    ptr: int

    def record(self, event: Event) -> object:
        """Let the event happen when all that was put on this stream so far has ended."""

    def wait_event(self, event: Event) -> object:
        """Let what is put on this stream from now on begin after the event."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> object: ...


class Gpu(Protocol):
    """One GPU.

    Attributes:
        index: its number in this process.
        uuid: what distinguishes it from all other GPUs anywhere.
    """

    index: int
    uuid: str

    def current(self) -> AbstractContextManager[object]:
        """Make it this thread's for a while: CUDA remembers one for each thread.

        A thread that has not used CUDA before keeps it, so that no other GPU is touched: a context
        takes hundreds of MB there.
        """

    def use(self) -> None:
        """Make it this thread's."""

    def new_stream(self) -> Stream:
        """Return a stream of its own, which does not wait for the default one."""

    def current_stream(self) -> Stream:
        """Return the stream that this thread fills."""

    def new_event(self) -> Event:
        """Return an event that has not been recorded."""

    def ended(self, event: Event) -> bool:
        """Say whether a recorded event has happened. Never blocks.

        Raises:
            BackendError: CUDA reports that earlier work on the GPU failed.
        """

    def address(self, array: Array) -> int:
        """Return where an array on this GPU begins.

        Raises:
            UsageError: it is on another one.
        """

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """Return new memory for so many elements, which belongs to the current stream's order."""

    def pinned(self, nbytes: int) -> tuple[int, Array]:
        """Return memory of the host that the GPU copies by itself: address, and a view (uint8)."""

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy between any two addresses, in the stream's order."""


class Communicator(Protocol):
    """One rank's end of an NCCL communicator. Counts are in elements of `dtype`."""

    def all_reduce(
        self, source: int, target: int, count: int, dtype: int, op: int, stream: int
    ) -> None:
        """See `ncclAllReduce`."""

    def reduce(
        self, source: int, target: int, count: int, dtype: int, op: int, root: int, stream: int
    ) -> None:
        """See `ncclReduce`."""

    def broadcast(
        self, source: int, target: int, count: int, dtype: int, root: int, stream: int
    ) -> None:
        """See `ncclBroadcast`."""

    def reduce_scatter(
        self, source: int, target: int, count: int, dtype: int, op: int, stream: int
    ) -> None:
        """See `ncclReduceScatter`; `count` is that of the target."""

    def all_gather(self, source: int, target: int, count: int, dtype: int, stream: int) -> None:
        """See `ncclAllGather`; `count` is that of the source."""

    def send(self, source: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """See `ncclSend`."""

    def recv(self, target: int, count: int, dtype: int, peer: int, stream: int) -> None:
        """See `ncclRecv`."""

    def async_error(self) -> int:
        """Return NCCL's code for what has befallen operations under way, 0 for nothing."""

    def split(self, color: int, key: int) -> Communicator | None:
        """See `ncclCommSplit`; blocks until all ranks call it. None for color -1."""

    def abort(self) -> None:
        """End what is under way; nothing else may be called afterwards."""

    def destroy(self) -> None:
        """Release it; nothing may be under way, nothing else be called afterwards."""


class Library(Protocol):
    """CuPy and NCCL."""

    def version(self) -> int:
        """Return NCCL's version, such as 23203 for 2.32.3."""

    def device_count(self) -> int:
        """Return how many GPUs this process sees."""

    def gpu(self, index: int) -> Gpu:
        """Return one of them."""

    def unique_id(self) -> bytes:
        """Return the name of a communicator that is to be made."""

    def connect(self, world_size: int, unique_id: bytes, rank: int) -> Communicator:
        """Join a communicator with this thread's GPU; blocks until all ranks do."""

    def grouped(self) -> AbstractContextManager[object]:
        """Let the calls within happen at the same time. Ended also when one of them raises."""
