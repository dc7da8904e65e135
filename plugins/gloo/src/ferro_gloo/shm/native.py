"""The native helper: `NATIVE` is the compiled module, or None where it was not built.

It is compiled from `_native.c` and `_half.c` when ferro-gloo is installed and a C compiler is
there, on 64-bit Linux. `ABSENT` says why there is none, and is empty otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray


class Native(Protocol):
    """What the compiled module offers. Arguments are positional.

    Buffers may be of any object with the buffer protocol. A call holds on to its buffers, so
    that memory cannot be unmapped under it. Whatever does not lie in them is a ValueError.
    """

    def publish(self, board: memoryview, offset: int, value: int, /) -> None:
        """Store the int64 counter at a byte offset, with release, and wake who sleeps on it."""

    def wait(
        self,
        board: memoryview,
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

        The GIL is released, unless all is there at once.

        Args:
            board: writable shared memory; sleepers count themselves in it.
            first: byte offset of the first counter.
            stride: bytes from one counter to the next, at least 16.
            count: how many counters.
            value: what all of them are to reach.
            spins: how often to look again with a pause of tens of nanoseconds; at most a million.
            yields: how often, after that, to look again having let others run; then it sleeps.
            seconds: how long in all, at most a day.

        Returns:
            None; or, after `seconds` or a signal, the index of the first counter behind.
        """

    def copy(self, target: NDArray[np.generic], source: NDArray[np.generic], /) -> None:
        """Copy as many bytes past the caches, on x86-64; both are contiguous and apart."""

    def sum_half(
        self,
        out: NDArray[np.generic],
        sources: Sequence[NDArray[np.generic]],
        brain: bool,
        divisor: float,
        /,
    ) -> None:
        """Sum float16, or bfloat16 when `brain`, from left to right in float32; round once.

        Args:
            out: contiguous; written to. It may be a source, but not overlap one in part.
            sources: contiguous, as many numbers each as `out`; at least one.
            brain: whether all are bfloat16.
            divisor: what the float32 sum is divided by; 0 for nothing.
        """


def _load() -> tuple[Native | None, str]:
    try:
        module = import_module("ferro_gloo.shm._native")
    except ImportError as error:
        return None, f"the native helper of ferro-gloo is not there: {error}"
    return cast(Native, module), ""


NATIVE, ABSENT = _load()
