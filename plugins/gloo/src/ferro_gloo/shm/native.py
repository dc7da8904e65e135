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

from ferro.collectives.fast_path import FastPath, FastScatter
from ferro_gloo.shm.rooted.native_steps import RootedSteps as Steps

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


class NativePlan(Protocol):
    """This rank's part in a collective of large arrays, for arrays that `accepts` accepts; one call at a time.

    Attributes:
        number: the number of the first chunk of the present call.
        chunks: how many there are; `start` uses those of the plan.
        syncing: True while the first chunk is awaited, and the labels have not been compared.
        announced: True if `start` or `resume` has returned because a rank's array can be used in place; Python does it.
        spins, yields: as in `NativeModule.wait`.
    """

    number: int
    chunks: int
    syncing: bool
    announced: bool
    spins: int
    yields: int

    def accepts(self, source: NDArray[np.generic] | None, target: NDArray[np.generic] | None, /) -> bool:
        """Say whether these arrays are as the plan says, outside of this rank's arena, and the ring is in use."""

    def start(self, source: NDArray[np.generic] | None, target: NDArray[np.generic] | None, /) -> int | None:
        """Run the collective, without the GIL.

        Returns:
            None; or, after 10 ms or a signal, the number of a chunk for which others are late. While `syncing` they may
            also make another call. When they have published the chunk, and have the same label, call `resume`.
        """

    def resume(
        self, source: NDArray[np.generic] | None, target: NDArray[np.generic] | None, awaited: int, /
    ) -> int | None:
        """Go on from a chunk that all ranks have published; returns what `start` returns."""


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

    def ChunkedPlan(  # noqa: N802 - a class
        self,
        *,
        ring: NativeRing,
        stage: tuple[tuple[int, ...], ...],
        own: tuple[tuple[int, ...], ...],
        take: tuple[tuple[int, ...], ...],
        reduction: tuple[int, int, int, tuple[int, ...], str, str] | None,
        sizes: tuple[int, int, int, int, int],
        two_phase: bool,
        past_caches: bool,
        arena: tuple[int, int],
        header: bytes,
    ) -> NativePlan:
        """Make the plan of a `ChunkedLayout`.

        Args:
            ring: the slots.
            stage, own, take: moves (to, start, nbytes, rank).
            reduction: own, out, nbytes, offsets, and the names of dtype and reduction.
            sizes: source_bytes, target_bytes, in_place, length, chunks.
            two_phase: as in the layout.
            past_caches: write `own` and `take` past the caches.
            arena: the addresses between which arrays can be used in place.
            header: that of the operation's first chunk.
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
        sample: NDArray[np.generic],
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
            sample: an array of shape (2, 3) and the elements' dtype, which nobody else uses.
        """

    def RootedSteps(  # noqa: N802 - a class
        self,
        *,
        ring: NativeRing,
        operation: int,
        dtype: str,
        reduction: str,
        block_bytes: int,
        root: int,
        source: NDArray[np.generic] | None,
        target: NDArray[np.generic] | None,
        state: memoryview,
        late: Callable[[Steps], None],
        sample: NDArray[np.generic],
        number: int,
    ) -> Steps:
        """Make the steps of a persistent broadcast, scatter, reduce or gather with these arrays.

        Args: as those of `ShortPath`; `late` is called as that class says. They have no memory before `open`.

        Raises:
            ValueError: the arrays do not fit the collective, or it does not fit a slot of the ring.
        """

    def AnnouncedScatter(  # noqa: N802 - a class
        self, *, tell: FastPath | None, blocks: FastPath, header: bytes
    ) -> FastScatter:
        """Make the fast path of a scatter and of the broadcast that announces it.

        Args:
            tell: the `ShortPath` of the broadcast.
            blocks: the `ShortPath` of the scatter, with the same ring and root.
            header: the bytes that the broadcast sends, at most 48.
        """


def _load() -> tuple[NativeModule | None, str]:
    try:
        module = import_module("ferro_gloo.shm._native")
    except ImportError as error:
        return None, f"the native helper of ferro-gloo is not there: {error}"
    return cast(NativeModule, module), ""


NATIVE, ABSENT = _load()
