"""HostBlocks: one host's blocks of a buffer, packed into contiguous memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ferro.collectives.partition import blocks
from ferro.types import Array


@dataclass(frozen=True, slots=True)
class HostBlocks:
    """The blocks of one host's ranks in a buffer that has one block per rank.

    Attributes:
        packed: the host's blocks one after the other: the buffer's own memory where the host's
            ranks are consecutive, a copy where they are not.
        blocks: the host's blocks in the buffer, by local rank.
        is_copy: True if `packed` is a copy, which `pack` and `unpack` keep up to date.
    """

    packed: Array
    blocks: tuple[Array, ...]
    is_copy: bool

    @classmethod
    def of(cls, buffer: Array, counts: Sequence[int], host: Sequence[int]) -> HostBlocks:
        """Select the blocks of these ranks in a buffer of `counts` elements per rank."""
        all_blocks = blocks(buffer, counts)
        selected = tuple(all_blocks[rank] for rank in host)
        size = sum(block.size for block in selected)
        if len(host) == host[-1] - host[0] + 1:
            start = sum(counts[: host[0]])
            return cls(buffer[start : start + size], selected, is_copy=False)
        return cls(np.empty(size, buffer.dtype), selected, is_copy=True)

    @property
    def counts(self) -> list[int]:
        """Elements in each block."""
        return [block.size for block in self.blocks]

    def pack(self) -> None:
        """Copy the buffer's blocks into `packed`, if it is a copy."""
        if self.is_copy:
            np.concatenate(self.blocks, out=self.packed)

    def unpack(self) -> None:
        """Copy `packed` back into the buffer, if it is a copy."""
        if self.is_copy:
            for block, part in zip(self.blocks, blocks(self.packed, self.counts), strict=True):
                block[...] = part
