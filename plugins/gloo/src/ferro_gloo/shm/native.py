"""The native helper: `NATIVE` is the compiled module, or None where it was not built.

Installing ferro-gloo on 64-bit Linux compiles it from the files in `native/` if there is a C compiler. `ABSENT` is the
reason why it is missing, and empty where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ferro.collectives.fast_path import FastPath

# The collectives that a short path runs, in the order of their numbers in `native/native.h`.
OPERATIONS = (
    "barrier",
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "gather",
    "scatter",
    "reduce_scatter",
    "all_to_all",
)


class NativeRing(Protocol):
    """One rank's slots, for the native helper and, through `SlotRing`, for Python.

    Attributes:
        next: the number of the next chunk.
    """

    next: int

    def begin(self, header: bytes, /) -> int:
        """Take the number of an operation's first chunk, and write its header.

        Args:
            header: the label, and more; at most `HEADER_BYTES` bytes, a multiple of 8, and zeros follow.
        """

    def publish(self, number: int, /) -> None:
        """Store the number in the slot's line and in this rank's counter, and wake who sleeps on the counter."""

    def retract(self) -> None:
        """Take back all published chunks, and publish nothing any more."""

    def run_chunks(
        self,
        stage: tuple[tuple[NDArray[np.generic], int], ...],
        own: tuple[tuple[NDArray[np.generic], NDArray[np.generic]], ...],
        take: tuple[tuple[NDArray[np.generic], int, int], ...],
        reduction: tuple[NDArray[np.generic] | None, NDArray[np.generic], tuple[int, ...], str, str] | None,
        numbers: tuple[int, ...],
        seconds: float,
        /,
    ) -> int | None:
        """Run a `ChunkedOperation`, whose first chunk all ranks have published; the GIL is released.

        Args:
            stage, own, take: those of the operation.
            reduction: its `out`, `own` and `offsets`, and the names of dtype and reduction; aligned arrays.
            numbers: bytes of a chunk, chunks, number of the first chunk, number of the awaited chunk (the first one, or
                that which this function has returned before), 1 for two phases, 1 to write `own` and `take` past the
                caches, spins and yields (see `NativeModule.wait`).
            seconds: the longest wait for a chunk, at most 1.

        Returns:
            None when it is done; or, after `seconds` or a signal, the number of the chunk for which other ranks are
            late: when all have published it, call again with this number.
        """


class NativeModule(Protocol):
    """The functions of the compiled module; their arguments are positional.

    A buffer may be any object with the buffer protocol. A call holds its buffers, so that their
    memory cannot be unmapped meanwhile. An offset outside of a buffer is a ValueError.
    """

    def publish(self, counters: memoryview, offset: int, value: int, /) -> None:
        """Store the int64 counter at a byte offset, with release, and wake its sleepers."""

    def wait(
        self,
        counters: memoryview,
        first: int,
        stride: int,
        count: int,
        value: int,
        spins: int,
        yields: int,
        seconds: float,
        /,
    ) -> int | None:
        """Wait until counters are at least `value`; loads are acquire loads.

        The GIL is released, unless all counters have the value at once.

        Args:
            counters: writable shared memory; sleepers count themselves in it.
            first: byte offset of the first counter.
            stride: bytes from one counter to the next, at least 16.
            count: how many counters.
            value: the value that all of the counters are to reach.
            spins: how often to load again after a pause of tens of nanoseconds; at most a million.
            yields: how often, after that, to load again after a `sched_yield`; then it sleeps.
            seconds: the longest wait, at most a day.

        Returns:
            None; or, after `seconds` or a signal, the index of the first counter behind.
        """

    def copy(self, target: NDArray[np.generic], source: NDArray[np.generic], /) -> None:
        """Copy past the caches, on x86-64; both arrays are contiguous, of one size, and do not overlap."""

    def sum_half(
        self, out: NDArray[np.generic], sources: Sequence[NDArray[np.generic]], brain: bool, divisor: float, /
    ) -> None:
        """Sum float16, or bfloat16 when `brain`, from left to right in float32; round once.

        Args:
            out: the contiguous result. It may be a source, but not overlap one in part.
            sources: contiguous arrays of as many numbers as `out`; at least one.
            brain: True if all are bfloat16.
            divisor: divides the float32 sum, unless it is 0.
        """

    def has_arithmetic(self, dtype: str, reduction: str, /) -> bool:
        """Say whether the helper has a reduction of a dtype, both by their names."""

    def reduce(
        self,
        out: NDArray[np.generic],
        sources: Sequence[NDArray[np.generic]],
        dtype: str,
        reduction: str,
        ranks: int,
        /,
    ) -> None:
        """Reduce as `Reduction.into` does, with the same bits but for the signs of zeros and of NaN.

        Args:
            out: the contiguous, aligned result. It may be one of the first two sources.
            sources: contiguous arrays like `out`, in order of rank; at least one.
            dtype: its name.
            reduction: its name.
            ranks: divides a mean.
        """

    def Ring(  # noqa: N802 - a class
        self, *, memory: memoryview, ranks: int, rank: int, headers_at: int, slots_at: int, slot_bytes: int, spins: int
    ) -> NativeRing:
        """Make a rank's view of a region (see `region`), which stays mapped as long as this lives.

        Args:
            memory: the region, whose counters come first.
            ranks: the number of ranks.
            rank: this rank.
            headers_at: byte offset of the headers, a multiple of 64.
            slots_at: byte offset of the first line, a multiple of 64.
            slot_bytes: the size of a slot, a multiple of 64.
            spins: as in `wait`; 0 where the ranks have no core each.
        """

    def ShortPath(  # noqa: N802 - a class
        self,
        *,
        ring: NativeRing,
        operation: int,
        dtype: str,
        reduction: str,
        block_bytes: int,
        root: int,
        label: bytes,
        lock: object,
        pending: object,
        state: memoryview,
        late: Callable[[int, int], None],
    ) -> FastPath:
        """Make the fast path of a collective whose messages fit a slot.

        Args:
            ring: the slots.
            operation: an index of `OPERATIONS`.
            dtype: the name of the elements' dtype; it matters where they are reduced.
            reduction: the reduction's name; "" where there is none.
            block_bytes: the size of one block.
            root: -1 where there is none.
            label: the call's label.
            lock, pending, state: those of the `Turn`.
            late: called as late(number, awaited) when others are late, or have other labels: it waits for chunk
                `awaited` of all ranks, and compares the labels of chunk `number`.
        """


def _load() -> tuple[NativeModule | None, str]:
    try:
        module = import_module("ferro_gloo.shm._native")
    except ImportError as error:
        return None, f"the native helper of ferro-gloo is not there: {error}"
    return cast(NativeModule, module), ""


NATIVE, ABSENT = _load()
