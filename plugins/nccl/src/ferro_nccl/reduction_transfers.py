"""The steps of a meeting: on the host's arrays, and on the GPU's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.backend import Backend
from ferro.types import Array
from ferro_nccl.library import Gpu
from ferro_nccl.moves import Moves, Span, cut


class HostSteps:
    """Steps on the host's arrays, each an operation of its own."""

    def __init__(self, backend: Backend, deadline: float) -> None:
        self._backend = backend
        self._deadline = deadline

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """See `Steps.empty`."""
        return np.empty(count, dtype)

    def all_gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """See `Steps.all_gather`."""
        self._backend.all_gather(buffer, counts, deadline=self._deadline)

    def all_to_all(self, outgoing: Sequence[Array], incoming: Sequence[Array]) -> None:
        """See `Steps.all_to_all`."""
        sends, recvs = [*enumerate(outgoing)], [*enumerate(incoming)]
        self._backend.exchange(sends, recvs, tag=self._backend.tag, deadline=self._deadline)


class GpuSteps:
    """Steps on the GPU's arrays, all launched in one operation."""

    def __init__(self, gpu: Gpu, moves: Moves) -> None:
        self._gpu = gpu
        self._moves = moves

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """See `Steps.empty`."""
        return self._gpu.empty(count, dtype)

    def all_gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """See `Steps.all_gather`."""
        self._moves.all_gather(cut(self._span(buffer), counts, buffer.itemsize))

    def all_to_all(self, outgoing: Sequence[Array], incoming: Sequence[Array]) -> None:
        """See `Steps.all_to_all`."""
        self._moves.all_to_all([*map(self._span, outgoing)], [*map(self._span, incoming)])

    def _span(self, array: Array) -> Span:
        return Span(self._gpu.address(array) if array.nbytes else 0, array.nbytes)
