"""Arena: memory that is filled piece by piece with the bytes of one checkpoint, and then used again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.uint8]
_BLOCK_BYTES = 32 << 20


class Arena:
    """Blocks of memory that are filled one after the other. A block that the system gives is touched when it is used.

    After the first checkpoint there is one block of its size, which the next ones fill again.
    """

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._used: list[int] = []  # bytes, by block; the last one is being filled

    @property
    def nbytes(self) -> int:
        """How much memory the blocks have."""
        return sum(block.nbytes for block in self._blocks)

    def allocate(self, nbytes: int) -> Block:
        """Return the next `nbytes`, contiguous."""
        if not self._used or self._blocks[-1].nbytes - self._used[-1] < nbytes:
            if self._used and not self._used[-1]:
                self._blocks.pop()  # it is too small, and nobody uses it
                self._used.pop()
            self._blocks.append(np.empty(max(nbytes, _BLOCK_BYTES), np.uint8))
            self._used.append(0)
        begin = self._used[-1]
        self._used[-1] = begin + nbytes
        return self._blocks[-1][begin : begin + nbytes]

    def filled(self) -> list[Block]:
        """Return the filled part of each block."""
        return [block[:used] for block, used in zip(self._blocks, self._used, strict=True) if used]

    def reset(self) -> None:
        """Forget what is in it, and keep the memory; of several blocks, one of their whole size remains."""
        if len(self._blocks) > 1:
            nbytes = sum(self._used)
            self._blocks = []
            self._blocks = [np.empty(nbytes, np.uint8)]
        self._used = [0] * len(self._blocks)

    def release(self) -> None:
        """Let go of the memory."""
        self._blocks, self._used = [], []
