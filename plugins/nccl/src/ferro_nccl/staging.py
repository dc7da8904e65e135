"""Staging: arrays as addresses on the GPU; those of the host by way of memory there.

    host array → pinned memory ─ copy → GPU ─ operation ─ copy → pinned memory → host array
                               └──────────── on the stream ───────────┘

Both copies on the stream are the GPU's own, for pinned memory does not move: the host does not
wait, and a late copy never writes into the caller's array.
"""

from __future__ import annotations

import numpy as np

from ferro.types import Array
from ferro_nccl.library import Gpu, Stream
from ferro_nccl.moves import Span


class Stage:
    """The arrays of one operation.

    Args:
        gpu: where they are to be.
        stream: the operation's.
    """

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self._gpu = gpu
        self._stream = stream
        self._fetched: list[tuple[Array, int, Array]] = []  # host array, pinned address and view
        self._written: list[tuple[Array, Span]] = []
        self._kept: list[Array] = []  # until the operation has ended

    def reads(self, array: Array) -> Span:
        """Return where an array is read."""
        return self._span(array, read=True)

    def writes(self, array: Array) -> Span:
        """Return where an array is written, as a whole."""
        span = self._span(array, read=False)
        self._note(array, span)
        return span

    def changes(self, array: Array) -> Span:
        """Return where an array is read and written."""
        span = self._span(array, read=True)
        self._note(array, span)
        return span

    def fetch(self) -> None:
        """Launch the copies of what was written in the host's stead."""
        for array, span in self._written:
            address, view = self._gpu.pinned(span.nbytes)
            self._gpu.copy(address, span.address, span.nbytes, self._stream)
            self._fetched.append((array, address, view))

    def land(self) -> None:
        """Put what was fetched into the host's arrays, when the operation has ended."""
        for array, _, view in self._fetched:
            array.view(np.uint8)[...] = view

    def _note(self, array: Array, span: Span) -> None:
        if isinstance(array, np.ndarray) and span.nbytes:
            self._written.append((array, span))

    def _span(self, array: Array, *, read: bool) -> Span:
        nbytes = array.nbytes
        if not nbytes:
            return Span(0, 0)
        if not isinstance(array, np.ndarray):
            return Span(self._gpu.address(array), nbytes)
        with self._stream:  # so that the memory is free again in this stream's order
            there = self._gpu.empty(nbytes, np.dtype(np.uint8))
        self._kept.append(there)
        address = self._gpu.address(there)
        if read:
            source, view = self._gpu.pinned(nbytes)
            view[...] = array.view(np.uint8)
            self._kept.append(view)
            self._gpu.copy(address, source, nbytes, self._stream)
        return Span(address, nbytes)
