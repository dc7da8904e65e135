"""StagingBuffer: the memory into which a state is copied before it is written in the background."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


class StagingBuffer:
    """One buffer, which is used again for each save; it grows when a state needs more.

    Its pages are touched when it is allocated. Otherwise the first copy into it would wait for the system to find them,
    which takes longer than the copy itself.
    """

    def __init__(self) -> None:
        self._buffer: NDArray[np.uint8] | None = None

    @property
    def nbytes(self) -> int:
        """The size of the buffer; 0 before the first save."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def room(self, nbytes: int) -> NDArray[np.uint8]:
        """Return the buffer, of at least `nbytes`; the caller is the only one to use it."""
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self._buffer = None  # so that there are never two
            self._buffer = np.empty(nbytes, np.uint8)
            self._buffer[:: mmap.PAGESIZE] = 0
        return self._buffer

    def release(self) -> None:
        """Let go of the memory."""
        self._buffer = None
