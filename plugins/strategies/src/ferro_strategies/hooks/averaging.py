"""Hooks that average the elements of a bucket in their own dtype, in float16 or in bfloat16.

The mean of half-precision elements is computed in float32 and rounded once; every rank gets the
same bits.
"""

from __future__ import annotations

import numpy as np

from ferro import ProcessGroup
from ferro.arrays import dtype_from_name

from ..ddp.bucket import GradBucket, Pending
from ..nn.arrays import Array


def mean(bucket: GradBucket, group: ProcessGroup) -> Pending:
    """Average the gradients in their own dtype, as DDP does without a hook."""
    work: Pending = group.all_reduce(bucket.buffer, "mean", out=bucket.buffer, async_op=True)
    return work


def float16(bucket: GradBucket, group: ProcessGroup) -> Pending:
    """Average in float16, with 11 bits of precision; gradients beyond 65504 become infinite."""
    return _average_as(np.dtype(np.float16), bucket, group)


def bfloat16(bucket: GradBucket, group: ProcessGroup) -> Pending:
    """Average in bfloat16, with 8 bits of precision and the range of float32."""
    return _average_as(dtype_from_name("bfloat16"), bucket, group)


def _average_as(dtype: np.dtype, bucket: GradBucket, group: ProcessGroup) -> Pending:
    if bucket.buffer.dtype.itemsize <= dtype.itemsize:
        return mean(bucket, group)
    small = bucket.buffer.astype(dtype)
    work: Pending = group.all_reduce(small, "mean", out=small, async_op=True)
    return _HalfAverage(work, small, bucket.buffer)


class _HalfAverage:
    """An average in half precision, which `wait` copies back into the bucket."""

    def __init__(self, work: Pending, small: Array, buffer: Array) -> None:
        self._work = work
        self._small = small
        self._buffer = buffer

    def wait(self) -> None:
        self._work.wait()
        self._buffer[...] = self._small
