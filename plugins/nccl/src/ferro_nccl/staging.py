"""Staging: GPU memory for an operation's host arrays, which are copied to the GPU and back.

    host array → pinned memory ─ copy → GPU ─ operation ─ copy → pinned memory → host array
                               └──────────── on the stream ───────────┘

Both copies run on the stream without the host, because the host memory is pinned. A copy that is late after a failure
writes only to pinned memory, never to the caller's array.
"""

from __future__ import annotations

import numpy as np

from ferro.types import Array
from ferro_nccl.collectives import Span
from ferro_nccl.library import Gpu, GpuStream


class StagedArrays:
    """The arrays of one operation.

    Args:
        gpu: the GPU of the operation.
        stream: the operation's stream.
    """

    def __init__(self, gpu: Gpu, stream: GpuStream) -> None:
        self._gpu = gpu
        self._stream = stream
        self._outputs: list[tuple[Array, Span]] = []  # host arrays and their memory on the GPU
        self._copied_back: list[tuple[Array, Array]] = []  # host arrays and pinned memory
        self._kept: list[Array] = []  # until the operation has ended

    def input(self, array: Array) -> Span:
        """Get the memory of an array that the operation reads."""
        return self._span(array, read=True)

    def output(self, array: Array) -> Span:
        """Get the memory of an array that the operation writes as a whole."""
        span = self._span(array, read=False)
        self._add_output(array, span)
        return span

    def in_out(self, array: Array) -> Span:
        """Get the memory of an array that the operation reads and writes."""
        span = self._span(array, read=True)
        self._add_output(array, span)
        return span

    def launch_copies_back(self) -> None:
        """Launch the copies of outputs from the GPU to pinned memory."""
        for array, span in self._outputs:
            address, view = self._gpu.pinned(span.nbytes)
            self._gpu.copy(address, span.address, span.nbytes, self._stream)
            self._copied_back.append((array, view))

    def fill_host_arrays(self) -> None:
        """Fill the host arrays from pinned memory, once the operation has ended."""
        for array, view in self._copied_back:
            array.view(np.uint8)[...] = view

    def _add_output(self, array: Array, span: Span) -> None:
        if isinstance(array, np.ndarray) and span.nbytes:
            self._outputs.append((array, span))

    def _span(self, array: Array, *, read: bool) -> Span:
        nbytes = array.nbytes
        if not nbytes:
            return Span(0, 0)
        if not isinstance(array, np.ndarray):
            return Span(self._gpu.address(array), nbytes)
        with self._stream:  # so that CuPy reuses the memory in the order of this stream
            memory = self._gpu.empty(nbytes, np.dtype(np.uint8))
        self._kept.append(memory)
        address = self._gpu.address(memory)
        if read:
            source, view = self._gpu.pinned(nbytes)
            view[...] = array.view(np.uint8)
            self._kept.append(view)
            self._gpu.copy(address, source, nbytes, self._stream)
        return Span(address, nbytes)
