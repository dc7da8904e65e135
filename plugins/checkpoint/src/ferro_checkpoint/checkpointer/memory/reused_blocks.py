"""ReusedBlocks: memory that is filled piece by piece with the bytes of one checkpoint, and then used again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.uint8]
_LEAST_BLOCK_BYTES = 64 << 10
_MOST_BLOCK_BYTES = 32 << 20  # unless more is asked for at once


class ReusedBlocks:
    """Blocks of memory that are filled one after the other, and again for the next checkpoint.

    A new block has at least a quarter of the size of all before it together, so that at most that much is unused.

    The blocks stay, since memory that is new to the process takes longer to fill than memory that it has had before.
    """

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._used: list[int] = []  # bytes, of each block up to the one that is being filled

    @property
    def nbytes(self) -> int:
        """How much memory the blocks have."""
        return sum(block.nbytes for block in self._blocks)

    def allocate(self, nbytes: int) -> Block:
        """Return the next `nbytes`, contiguous."""
        while not self._used or self._blocks[len(self._used) - 1].nbytes - self._used[-1] < nbytes:
            if self._used and not self._used[-1]:
                del self._blocks[len(self._used) - 1]  # it is too small, and nothing is in it
            else:
                self._used.append(0)
            if len(self._blocks) < len(self._used):
                size = max(nbytes, _LEAST_BLOCK_BYTES, min(self.nbytes // 4, _MOST_BLOCK_BYTES))
                self._blocks.append(np.empty(size, np.uint8))
        begin = self._used[-1]
        self._used[-1] = begin + nbytes
        return self._blocks[len(self._used) - 1][begin : begin + nbytes]

    def filled(self) -> list[Block]:
        """Return the filled part of each block."""
        return [block[:used] for block, used in zip(self._blocks, self._used, strict=False) if used]

    def reset(self) -> None:
        """Forget what is in it, and keep the memory."""
        self._used = []

    def release(self) -> None:
        """Let go of the memory."""
        self._blocks, self._used = [], []
