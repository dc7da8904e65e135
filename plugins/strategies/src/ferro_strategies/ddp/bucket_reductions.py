"""BucketReductions: the exact means of all buckets over a group, by persistent operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ferro import ProcessGroup

from .bucket import Bucket, Pending

# The last bucket is reduced in the caller's thread if it is no larger. Nearly nothing is left to compute beside it, and
# to hand it to the group's thread and back takes longer than to reduce it. Measured with two ranks on two cores: a step
# of a perceptron of 27,000 parameters takes 0.53 ms alone, 1.05 in DDP with the handover and 0.75 without.
_AT_ONCE_BYTES = 1 << 20


class _Repeatable(Protocol):
    """A persistent operation (see `ProcessGroup.persistent`)."""

    def __call__(self) -> object: ...
    def start(self) -> None: ...
    def wait(self) -> object: ...


class _RunsWhenAwaited:
    """A step of a persistent operation that runs in the thread that waits for it."""

    def __init__(self, operation: _Repeatable) -> None:
        self._operation = operation

    def wait(self) -> object:
        return self._operation()


class BucketReductions:
    """One persistent all_reduce for each bucket, which is made when buckets are reduced for the first time.

    The group compares a persistent operation over all ranks when it is made, so they all make it at the same place:
    where the first bucket of the first reduction is launched, which all ranks come to, also those without batches.
    """

    def __init__(self, buckets: Sequence[Bucket], group: ProcessGroup) -> None:
        self._buckets = buckets
        self._group = group
        self._operations: list[_Repeatable] = []

    def start(self, bucket: Bucket) -> Pending:
        """Start to average a bucket over the group, in place."""
        if not self._operations:
            self._operations = [self._make(each) for each in self._buckets]
        operation = self._operations[bucket.gradients.index]
        is_last = bucket is self._buckets[-1]
        if is_last and isinstance(bucket.memory, np.ndarray) and bucket.memory.nbytes <= _AT_ONCE_BYTES:
            return _RunsWhenAwaited(operation)
        operation.start()
        return operation

    def _make(self, bucket: Bucket) -> _Repeatable:
        return self._group.persistent("all_reduce", bucket.memory, "mean", out=bucket.memory)
