"""The transfers of a `GatheredReduction`, for arrays on the host and for arrays on the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.backend import Backend
from ferro.collectives.partition import near_equal
from ferro.types import Array
from ferro_nccl.collectives import Span, StreamCollectives, split_span
from ferro_nccl.library import Gpu


class HostTransfers:
    """Transfers of host arrays; each is an operation of its own. See `ReductionTransfers`."""

    def __init__(self, backend: Backend, deadline: float) -> None:
        self._backend = backend
        self._deadline = deadline

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """See `ReductionTransfers.empty`."""
        return np.empty(count, dtype)

    def all_gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """See `ReductionTransfers.all_gather`."""
        self._backend.all_gather(buffer, counts, deadline=self._deadline)

    def all_to_all(self, source: Array, offsets: Sequence[int], counts: Sequence[int], out: Array) -> None:
        """See `ReductionTransfers.all_to_all`."""
        blocks = [source[at : at + count] for at, count in zip(offsets, counts, strict=True)]
        sends, recvs = [*enumerate(blocks)], [*enumerate(near_equal(out, len(counts)))]
        self._backend.exchange(sends, recvs, tag=self._backend.tag, deadline=self._deadline)


class GpuTransfers:
    """Transfers of GPU arrays, all launched in one operation. See `ReductionTransfers`."""

    def __init__(self, gpu: Gpu, collectives: StreamCollectives) -> None:
        self._gpu = gpu
        self._collectives = collectives

    def empty(self, count: int, dtype: np.dtype) -> Array:
        """See `ReductionTransfers.empty`."""
        return self._gpu.empty(count, dtype)

    def all_gather(self, buffer: Array, counts: Sequence[int]) -> None:
        """See `ReductionTransfers.all_gather`."""
        self._collectives.all_gather(split_span(self._span(buffer), counts, buffer.itemsize))

    def all_to_all(self, source: Array, offsets: Sequence[int], counts: Sequence[int], out: Array) -> None:
        """See `ReductionTransfers.all_to_all`."""
        n, itemsize = len(counts), source.itemsize
        start = self._span(source).address
        outgoing = [
            Span(start + offset * itemsize, count * itemsize) for offset, count in zip(offsets, counts, strict=True)
        ]
        incoming = split_span(self._span(out), [out.size // n] * n, itemsize)
        self._collectives.all_to_all(outgoing, incoming)

    def _span(self, array: Array) -> Span:
        return Span(self._gpu.address(array) if array.nbytes else 0, array.nbytes)
