"""Reductions that combine every rank's contribution at once, on the transfers of any library.

A backend uses them where its library lacks a reduction. Each rank gathers all contributions to some of the elements and
combines them in order of rank, by NumPy's arithmetic (`Reduction.into`).

    small buffer    every rank gathers all contributions and combines them all
    large buffer    segment by segment: rank r receives block r of the segment from all ranks and combines it; then all
                    ranks gather the combined blocks

       contributions to a segment      rank 0   | a0 | a1 | a2 |
                                       rank 1   | b0 | b1 | b2 |   all_to_all: rank 1 has a1 b1 c1
                                       rank 2   | c0 | c1 | c2 |   all_gather of the combined blocks

So the memory that a large reduction takes is one segment, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np

from ferro.collectives.partition import near_equal
from ferro.collectives.reduction import Reduction
from ferro.types import Array

SMALL_BYTES = 256 << 10  # all contributions together


class ReductionTransfers(Protocol):
    """The memory and the transfers of one reduction.

    The arithmetic between two transfers may raise on one rank only. A transfer must then raise on the other ranks, too,
    rather than wait for the failed rank for ever.
    """

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """Allocate an array of `count` elements on the device of the reduced arrays."""

    def all_gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """Fill `buffer`, block by block of `counts` elements; this rank's block is in it already."""

    def all_to_all(self, source: Array, offsets: Sequence[int], counts: Sequence[int], out: Array) -> None:
        """Send each rank r `counts[r]` elements of `source` from `offsets[r]` on; `out` takes equal blocks, by rank."""


@dataclass(slots=True)
class GatheredReduction:
    """One reduction over all ranks, which combines their contributions in order of rank."""

    transfers: ReductionTransfers
    rank: int
    world_size: int
    reduction: Reduction
    segment_bytes: int = field(kw_only=True)  # bounds the memory that a large buffer takes; the same on all ranks

    def all_reduce(self, buffer: Array) -> None:
        """Reduce `buffer` in place, on all ranks."""
        n = self.world_size
        if buffer.nbytes * n <= SMALL_BYTES:
            if buffer.size:
                gathered = self.transfers.empty(n * buffer.size, buffer.dtype)
                contributions = near_equal(gathered, n)
                contributions[self.rank][...] = buffer
                self.transfers.all_gather(gathered, [buffer.size] * n)
                self.reduction.into(buffer, contributions, at_once=True)
            return
        for segment in near_equal(buffer, self._segments(buffer.nbytes)):
            blocks = near_equal(segment, n)
            counts = [block.size for block in blocks]
            self._combine(segment, _starts(counts), counts, blocks[self.rank])
            self.transfers.all_gather(segment, counts)

    def reduce(self, buffer: Array, root: int) -> None:
        """Reduce `buffer` in place at `root`; the other ranks' buffers stay as they are."""
        n = self.world_size
        for segment in near_equal(buffer, self._segments(buffer.nbytes * n)):
            counts = [segment.size if rank == root else 0 for rank in range(n)]
            self._combine(segment, [0] * n, counts, segment[: counts[self.rank]])

    def reduce_scatter(self, source: Array, out: Array, counts: Sequence[int]) -> None:
        """Reduce `source`, which is not changed, block by block of `counts` elements; put this rank's into `out`."""
        starts = _starts(counts)
        segments = self._segments(source.nbytes)
        for index, segment in enumerate(near_equal(out, segments)):  # a part of every rank's block
            begins = [count * index // segments for count in counts]
            ends = [count * (index + 1) // segments for count in counts]
            offsets = [start + begin for start, begin in zip(starts, begins, strict=True)]
            sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
            self._combine(source, offsets, sizes, segment)

    def _combine(self, source: Array, offsets: Sequence[int], counts: Sequence[int], out: Array) -> None:
        """Send each rank its part of `source`; combine the parts that arrive into `out`."""
        received = self.transfers.empty(self.world_size * out.size, source.dtype)
        self.transfers.all_to_all(source, offsets, counts, received)
        if out.size:
            self.reduction.into(out, near_equal(received, self.world_size), at_once=True)

    def _segments(self, nbytes: int) -> int:
        return max(1, -(-nbytes // self.segment_bytes))


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]
