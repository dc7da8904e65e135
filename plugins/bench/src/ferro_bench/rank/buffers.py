"""The memory of one call on one rank: its input, and the check of its result.

collective       source         target           expected result
all_reduce       whole, the same memory          the reduction
broadcast        whole, the same memory          rank 0's
reduce           whole          whole            the reduction, on rank 0
all_gather       block          whole            block i: rank i's
gather           block          whole            the same, on rank 0
scatter          whole          block            rank 0's block of this rank
reduce_scatter   whole          block            the reduction's block of this rank
all_to_all       whole          whole            block i: rank i's block of this rank
sendrecv         whole          whole            the whole of the rank before
copy             whole          whole            this rank's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import pattern
from .case import IN_BLOCKS, BenchCase
from .pattern import Numbers

Allocate = Callable[[int, str], Numbers]

_IN_PLACE = ("all_reduce", "broadcast")
_BLOCK_IN = ("all_gather", "gather")
_BLOCK_OUT = ("scatter", "reduce_scatter")
_AT_ROOT = ("reduce", "gather")
_STALE = 99  # overwrites the last result; no tile consists of this number alone


class Buffers:
    """The memory of one call on one rank.

    Attributes:
        source: the input of this rank.
        target: the result of this rank; the same array where the call works in place.
    """

    def __init__(self, case: BenchCase, rank: int, world_size: int, allocate: Allocate) -> None:
        """Allocate; `allocate` takes a number of elements and a dtype's name."""
        self._case = case
        self._rank = rank
        self._world_size = world_size
        self._block = case.count // world_size if case.collective in IN_BLOCKS else case.count
        inputs = self._block if case.collective in _BLOCK_IN else case.count
        outputs = self._block if case.collective in _BLOCK_OUT else case.count
        self.source = allocate(inputs, case.dtype)
        in_place = case.collective in _IN_PLACE
        self.target = self.source if in_place else allocate(outputs, case.dtype)

    def renew(self, call: int) -> None:
        """Write the input of a call, and overwrite the last result."""
        self.target[...] = _STALE
        pattern.write(self.source, self._tile(self._rank), pattern.start_of(call))

    def mismatches(self, call: int) -> int:
        """Count the elements of the result that are wrong."""
        start = pattern.start_of(call)
        return sum(pattern.mismatches(block, numbers, start + place) for block, numbers, place in self._expected())

    def _expected(self) -> Iterator[tuple[Numbers, Numbers, int]]:
        """Yield parts of the target, each with its tile and its distance from the start."""
        collective, n = self._case.collective, self._world_size
        if collective in _AT_ROOT and self._rank != 0:
            return
        own = self._rank * self._block
        if collective in ("all_reduce", "reduce"):
            yield self.target, self._reduced(), 0
        elif collective == "reduce_scatter":
            yield self.target, self._reduced(), own
        elif collective == "broadcast":
            yield self.target, self._tile(0), 0
        elif collective == "scatter":
            yield self.target, self._tile(0), own
        elif collective == "sendrecv":
            yield self.target, self._tile((self._rank - 1) % n), 0
        elif collective == "copy":
            yield self.target, self._tile(self._rank), 0
        else:
            place = own if collective == "all_to_all" else 0
            for rank in range(n):
                first = rank * self._block
                yield self.target[first : first + self._block], self._tile(rank), place

    def _tile(self, rank: int) -> Numbers:
        return pattern.tile(rank, self._world_size, self._case.dtype, self._case.op)

    def _reduced(self) -> Numbers:
        return pattern.reduced(self._world_size, self._case.dtype, self._case.op)
