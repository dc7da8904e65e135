"""A turn: the timed calls that one library makes while the other libraries wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from .buffers import Buffers
from .case import BenchCase
from .library import MeasuredLibrary, Operation


def allocate(library: MeasuredLibrary, case: BenchCase, memory: str) -> list[Buffers]:
    """Allocate the memory of every call of a turn: "private" or "group", see `MeasuredLibrary.empty`."""

    def empty(count: int, dtype: str) -> Any:
        return library.empty(count, dtype, memory)

    calls = case.settles + case.calls
    return [Buffers(case, library.rank, library.world_size, empty) for _ in range(calls)]


class PreparedCase:
    """One case on one rank of one library: its prepared calls, for all turns."""

    def __init__(
        self, library: MeasuredLibrary, case: BenchCase, memory: Sequence[Buffers], *, persistent: bool = False
    ) -> None:
        """Prepare the calls.

        Args:
            library: with its ranks connected.
            case: the call.
            memory: that of every call, by `allocate`.
            persistent: make every call a persistent operation.
        """
        self._library = library
        self._case = case
        self._memory = memory
        self._persistent = [library.persistent(case, b.source, b.target) for b in self._memory] if persistent else []
        self._calls = [step.run for step in self._persistent] or [_prepared(library, case, b) for b in self._memory]

    def run(self, turn: int) -> dict[str, Any]:
        """Write new inputs, wait for all ranks in a barrier, time the calls, and check the results.

        Args:
            turn: its number, from 0.

        Returns:
            "seconds": of every timed call; "wrong": number of elements that are wrong.
        """
        first = turn * len(self._calls)
        for call, buffers in enumerate(self._memory, first):
            buffers.renew(call)
        self._library.barrier()
        seconds = self._seconds_apart() if self._case.apart else self._seconds()
        wrong = 0
        if self._case.check:
            wrong = sum(b.mismatches(call) for call, b in enumerate(self._memory, first))
        return {"seconds": seconds[self._case.settles :], "wrong": wrong}

    def _seconds(self) -> list[float]:
        """Make the calls back to back, and return the seconds of each."""
        marks = [0.0] * (len(self._calls) + 1)
        marks[0] = time.perf_counter()
        for index, make in enumerate(self._calls, 1):
            make()
            marks[index] = time.perf_counter()
        return [end - start for start, end in pairwise(marks)]

    def _seconds_apart(self) -> list[float]:
        """Make each call after a barrier, which is not timed, and return the seconds of each."""
        starts, ends = [0.0] * len(self._calls), [0.0] * len(self._calls)
        for index, make in enumerate(self._calls):
            self._library.barrier()
            starts[index] = time.perf_counter()
            make()
            ends[index] = time.perf_counter()
        return [end - start for start, end in zip(starts, ends, strict=True)]

    def release(self) -> None:
        """Give up persistent operations."""
        for step in self._persistent:
            step.free()


def _prepared(library: MeasuredLibrary, case: BenchCase, buffers: Buffers) -> Operation:
    if case.collective == "copy":
        return partial(np.copyto, buffers.target, buffers.source)
    return library.operation(case, buffers.source, buffers.target)
