"""Reductions that NCCL does not have: all contributions meet, in order of rank, and are combined.

    small    every rank gathers all and combines all
    large    segment by segment: rank r gets everybody's block r, combines it, all gather the blocks

So of memory besides the buffer a large one takes a segment's size, whatever the number of ranks.
The arithmetic is core's (`Reduction.into`), on the GPU for arrays there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ferro.collectives.partition import blocks, near_equal
from ferro.collectives.reduction import Reduction
from ferro.types import Array

SMALL_BYTES = 256 << 10  # of all contributions together
SEGMENT_BYTES = 64 << 20


class Steps(Protocol):
    """What a meeting is made of."""

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """Return memory of the kind that is reduced."""

    def all_gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """See `Backend.all_gather`."""

    def all_to_all(self, outgoing: Sequence[Array], incoming: Sequence[Array]) -> None:
        """Send an array to every rank and fill one from every rank."""


class Meeting:
    """One reduction in which all contributions meet.

    Args:
        steps: how to move arrays.
        rank: this rank.
        world_size: number of ranks.
        reduction: what to do.
        segment_bytes: largest part of the buffer that is under way at once.
    """

    def __init__(
        self,
        steps: Steps,
        rank: int,
        world_size: int,
        reduction: Reduction,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._steps = steps
        self._rank = rank
        self._world_size = world_size
        self._reduction = reduction
        self._segment_bytes = segment_bytes

    def all_reduce(self, buffer: Array) -> None:
        """Reduce `buffer` over all ranks, in place, on all ranks."""
        if buffer.nbytes * self._world_size <= SMALL_BYTES:
            self._all_reduce_small(buffer)
            return
        for part in near_equal(buffer, self._parts(buffer.nbytes)):
            pieces = near_equal(part, self._world_size)
            self._combine(pieces, pieces[self._rank])
            self._steps.all_gather(part, [piece.size for piece in pieces])

    def reduce_scatter(self, source: Array, out: Array, counts: Sequence[int]) -> None:
        """Reduce `source`, which is not changed; put this rank's block into `out`."""
        whole = blocks(source, counts)
        parts = self._parts(source.nbytes)
        cuts = [near_equal(block, parts) for block in whole]
        for index, into in enumerate(near_equal(out, parts)):
            self._combine([cut[index] for cut in cuts], into)

    def _all_reduce_small(self, buffer: Array) -> None:
        n, count = self._world_size, buffer.size
        if not count:
            return
        everyones = self._steps.empty(n * count, buffer.dtype)
        operands = blocks(everyones, [count] * n)
        operands[self._rank][...] = buffer
        self._steps.all_gather(everyones, [count] * n)
        self._reduction.into(buffer, operands, at_once=True)

    def _combine(self, pieces: Sequence[Array], out: Array) -> None:
        """Send piece r to rank r; combine what comes into `out`, of the size of this rank's."""
        n, count = self._world_size, pieces[self._rank].size
        arrived = self._steps.empty(n * count, pieces[0].dtype)
        operands = blocks(arrived, [count] * n)
        self._steps.all_to_all(pieces, operands)
        if count:
            self._reduction.into(out, operands, at_once=True)

    def _parts(self, nbytes: int) -> int:
        return max(1, -(-nbytes // self._segment_bytes))
