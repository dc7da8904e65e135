"""Region: what belongs to one host in a buffer of one block a rank, as one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ferro.collectives.partition import blocks
from ferro.types import Array


@dataclass(frozen=True, slots=True)
class Region:
    """One host's part of a buffer.

    Attributes:
        whole: the host's blocks one after the other: the buffer's own memory where the host's
            ranks follow one another, a copy where others are in between.
        blocks: the host's blocks in the buffer, by place.
        apart: whether `whole` is a copy; `load` and `store` keep the two the same.
    """

    whole: Array
    blocks: tuple[Array, ...]
    apart: bool

    @classmethod
    def of(cls, buffer: Array, counts: Sequence[int], host: Sequence[int]) -> Region:
        """Return the part of these ranks in a buffer of `counts` elements a rank."""
        everyones = blocks(buffer, counts)
        theirs = tuple(everyones[rank] for rank in host)
        size = sum(block.size for block in theirs)
        if len(host) == host[-1] - host[0] + 1:
            start = sum(counts[: host[0]])
            return cls(buffer[start : start + size], theirs, apart=False)
        return cls(np.empty(size, buffer.dtype), theirs, apart=True)

    @property
    def counts(self) -> list[int]:
        """Elements in each block."""
        return [block.size for block in self.blocks]

    def load(self) -> None:
        """Bring `whole` up to date with the buffer."""
        if self.apart:
            np.concatenate(self.blocks, out=self.whole)

    def store(self) -> None:
        """Bring the buffer up to date with `whole`."""
        if self.apart:
            for block, part in zip(self.blocks, blocks(self.whole, self.counts), strict=True):
                block[...] = part
