"""The native helper: `NATIVE` is the compiled module, or None where it was not built.

Installing ferro-gloo on 64-bit Linux compiles it from `_native.c` and `_half.c` if there is a C
compiler. `ABSENT` is the reason why it is missing, and empty where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray


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

    def run_chunks(
        self,
        memory: memoryview,
        ring: tuple[int, int, int, int, int],
        stage: Sequence[tuple[NDArray[np.generic], int]],
        own: Sequence[tuple[NDArray[np.generic], NDArray[np.generic]]],
        take: Sequence[tuple[NDArray[np.generic], int, int]],
        reduction: tuple[object, ...] | None,
        numbers: tuple[int, ...],
        seconds: float,
        /,
    ) -> int | None:
        """Run a `ChunkedOperation`, the first chunk of which all ranks have published.

        The GIL is released. The native helper checks that all offsets lie within the slots.

        Args:
            memory: the region.
            ring: this rank, number of ranks, number of slots, byte offset of the slots, bytes of a slot.
            stage: see `ChunkedOperation`; this and the next two are tuples.
            own: pairs of apart arrays of one size.
            take: see `ChunkedOperation`.
            reduction: (out or None, own, byte offsets in the ranks' slots, description).
            numbers: bytes of a chunk, chunks, number of the first chunk, number of the awaited chunk (that of the first
                one, or that which this function has returned before), 1 for two phases, 1 to write results past the
                caches, spins and yields (see `wait`).
            seconds: the longest wait for a chunk, at most 1.

        Returns:
            None when it is done; or, after `seconds` or a signal, the number of the chunk for which others are late.
            When all have published it, call again with this number.
        """

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


def _load() -> tuple[NativeModule | None, str]:
    try:
        module = import_module("ferro_gloo.shm._native")
    except ImportError as error:
        return None, f"the native helper of ferro-gloo is not there: {error}"
    return cast(NativeModule, module), ""


NATIVE, ABSENT = _load()
